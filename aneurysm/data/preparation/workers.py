"""The same work on many cases in several processes; one that dies takes only its own case along."""

import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from multiprocessing import current_process
from pathlib import Path
from typing import Any, Final

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from aneurysm.data.errors import UserError

log = logging.getLogger(__name__)

BACKENDS: Final = ("loky", "dask", "ray")

Task = Callable[[str, Any], str | None]


def run_each(
    task: Task, work: Mapping[str, Any], jobs: int, backend: str, running: Path, verb: str = "prepared"
) -> Iterator[tuple[str, str | None]]:
    """Do `task(name, argument)` for every item of `work`, in any order.

    When a worker process dies (a crash in a decoder, the kernel out of memory), those cases that were being
    worked on are done again one at a time, each in a fresh process. The one that kills its process again is
    named; the others go on.

    Args:
        task: returns what went wrong, or None. It may be done twice for a name, so it must not mind.
        jobs: processes; 1 with loky works in this one.
        backend: "loky" on this machine; "dask" or "ray" on a cluster that is up (DASK_SCHEDULER_ADDRESS,
            RAY_ADDRESS), else on this machine.
        running: folder for notes of what is being worked on; it must be seen by all workers.
        verb: what is done to a case, for messages.

    Yields:
        (name, what went wrong or None)

    Raises:
        UserError: the backend is unknown or not installed.
    """
    left = list(work)
    running.mkdir(parents=True, exist_ok=True)
    while left:
        _forget(running)
        done: set[str] = set()
        try:
            with _backend(backend, jobs) as processes:
                call = _noted if backend == "loky" else _guarded
                calls = (delayed(call)(task, name, work[name], running, verb) for name in left)
                # Batches of one: what a dying worker had done is known case by case.
                one: Any = 1
                parallel = Parallel(n_jobs=processes, return_as="generator_unordered", batch_size=one)
                results: Any = parallel(calls)
                for name, problem in results:
                    done.add(name)
                    yield name, problem
            break
        except Exception as error:
            if not isinstance(error, BrokenProcessPool):
                raise
        left = [name for name in left if name not in done]
        suspects = [name for name in left if (running / name).exists()] or left[:jobs]
        log.warning(
            "A worker process died while %d cases were being %s; trying these one by one: %s",
            len(suspects), verb, ", ".join(suspects),
        )  # fmt: skip
        for name in suspects:
            yield name, _alone(task, name, work[name], verb)
        left = [name for name in left if name not in suspects]
    _forget(running)
    running.rmdir()


def _noted(task: Task, name: str, argument: Any, running: Path, verb: str) -> tuple[str, str | None]:
    """Note the case while it is being worked on: a note that is left tells which one a dead process had."""
    note = running / name
    note.touch()
    try:
        return name, task(name, argument)
    finally:
        note.unlink(missing_ok=True)


def _guarded(task: Task, name: str, argument: Any, running: Path, verb: str) -> tuple[str, str | None]:
    """Do one case in a child of a cluster's worker: what dies is the child, and the cluster never notices.

    A worker that may not have children (a Dask worker under a nanny, unless the cluster sets
    `distributed.worker.daemon: false`) does the case itself.
    """
    if current_process().daemon:
        return name, task(name, argument)
    if not _children:
        _children.append(_child())
    child = _children[0]
    try:
        return name, child.submit(task, name, argument).result()
    except BrokenProcessPool:
        if child in _children:
            _children.remove(child)
        return name, _alone(task, name, argument, verb)  # it may have died of another thread's case


_children: list[ProcessPoolExecutor] = []  # of this worker; one is enough


def _child() -> ProcessPoolExecutor:
    """An executor of one process that ends with this one."""
    return ProcessPoolExecutor(max_workers=1, initializer=_end_with, initargs=(os.getpid(),))


def _end_with(leader: int) -> None:
    """End this process when its parent has died: joblib's workers would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == leader:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alone(task: Task, name: str, argument: Any, verb: str) -> str | None:
    """Do one case in a process of its own."""
    executor = _child()
    try:
        return executor.submit(task, name, argument).result()
    except BrokenProcessPool as error:
        codes = re.search(r"\{(.*?)\}", str(error))
        return (
            f"the process that {verb} it died ({codes.group(1) if codes else 'exit code unknown'}): "
            "out of memory, or a crash in a decoder. Free memory, or check the files of this series."
        )
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def _forget(running: Path) -> None:
    for note in running.iterdir():
        note.unlink(missing_ok=True)


class _backend(AbstractContextManager):
    """Make joblib use a backend; gives the number of processes to ask for."""

    def __init__(self, name: str, jobs: int) -> None:
        self.name, self.jobs, self.stack = name, jobs, ExitStack()

    def __enter__(self) -> int:
        if self.name == "loky":
            self.stack.enter_context(
                parallel_config(backend="loky", initializer=_end_with, initargs=(os.getpid(),))
            )
            return self.jobs
        if self.name == "dask":
            self._start_dask()
        elif self.name == "ray":
            self._start_ray()
        else:
            raise UserError(f"parallel.backend is one of {', '.join(BACKENDS)}, not {self.name!r}.")
        self.stack.enter_context(parallel_config(backend=self.name))
        return -1 if self.name == "dask" else self.jobs

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def _start_dask(self) -> None:
        distributed, dask = _imported("distributed", "dask"), _imported("dask", "dask")
        try:
            distributed.get_client()
        except ValueError:
            elsewhere = dask.config.get("scheduler-address", None)
            local = {} if elsewhere else {"n_workers": self.jobs, "threads_per_worker": 1}
            self.stack.enter_context(dask.config.set({"distributed.worker.daemon": False}))
            self.stack.enter_context(distributed.Client(**local))

    def _start_ray(self) -> None:
        ray = _imported("ray", "ray")
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
            self.stack.callback(ray.shutdown)
        _imported("ray.util.joblib", "ray").register_ray()


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"parallel.backend={extra} needs {module}, which is not installed: "
            f"pip install 'aneurysm[{extra}]', or use parallel.backend=loky."
        ) from error
