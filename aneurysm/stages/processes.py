"""Several processes that train together: which one this is, and how they share work and agree.

What has to happen once happens in the first process. Every process calls these functions at the same places;
for one process alone they are the plain computation.
"""

import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from aneurysm.global_batch import rank, world

__all__ = [
    "PATIENCE",
    "anywhere",
    "barrier",
    "from_first",
    "gathered",
    "gathered_by_first",
    "neighbours",
    "rank",
    "shared",
    "world",
]

T = TypeVar("T")
# The others may wait long while the first one prepares data; whoever started them notices a dead one.
PATIENCE = timedelta(days=7)


def neighbours() -> int:
    """How many of the processes run on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier(group=_conversation())


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes or decides, such as what it finds on disk; the others wait for it.

    An exception there is raised in every process.
    """
    if world() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told = [make(), None]
        except Exception as error:
            dist.broadcast_object_list([None, _portable(error)], src=0, group=_conversation())
            raise
    dist.broadcast_object_list(told, src=0, group=_conversation())
    value, error = told
    if error is not None:
        raise error
    return value


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process, for decisions that all must take at the same step."""
    if world() == 1:
        return flag
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=_conversation())
    return bool(raised.item())


def shared(items: Sequence[T]) -> list[T]:
    """This process's part of a list of work."""
    return list(items[rank() :: world()])


def gathered(results: Sequence[T]) -> list[T]:
    """The results of all processes, one per item of `shared`, in the order of the items."""
    if world() == 1:
        return list(results)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(results), group=_conversation())
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def gathered_by_first(results: Sequence[T]) -> list[T]:
    """As `gathered`, but large results travel one by one, and to the first process only.

    The others get an empty list.
    """
    if world() == 1:
        return list(results)
    rounds = max(gathered([len(results)]))
    found: list[T] = []
    for i in range(rounds):
        parts: list[Any] | None = [None] * world() if rank() == 0 else None
        one = (results[i],) if i < len(results) else ()
        dist.gather_object(one, parts, dst=0, group=_conversation())
        found += [value for part in parts or () for value in part]
    return found


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _conversation() -> Any:
    return _group_beside(dist.group.WORLD)


@lru_cache(maxsize=1)
def _group_beside(default: Any) -> Any:
    """A group for objects and waiting: on the CPU, and patient, whatever the gradients travel by."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
