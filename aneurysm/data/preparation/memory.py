"""How much memory and disk there is, and what may stay in memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
GIB = 2**30
# (limit, usage) files of a control group; container run times and batch systems set the limit there.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes(cgroups: tuple[tuple[str, str], ...] = _CGROUPS) -> int:
    """Memory that this process may still take: of the machine, and of its control group if that is less."""
    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file in cgroups:
        try:
            limit = Path(limit_file).read_text().strip()
            usage = int(Path(usage_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():  # "max" where there is none
            # The page cache counts as usage, but the system gives it up when asked.
            free = min(free, max(int(limit) - usage + _page_cache(Path(limit_file).parent), 0))
    return free


def _page_cache(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
    return int(counts.get("inactive_file", counts.get("total_inactive_file", 0)))


class Remembered:
    """Values by key, the most recently used ones, within a number of bytes.

    Args:
        limit: bytes; None takes half of the memory that is free at the first use.
        size: bytes of a value.
    """

    def __init__(self, size: Callable[[Any], int], limit: int | None = None) -> None:
        self._size, self._limit = size, limit
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._bytes = 0

    @property
    def limit(self) -> int:
        """Bytes that values may take together."""
        if self._limit is None:
            self._limit = available_bytes() // 2
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        self._shrink(keep=0)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made when it is not here; the one asked for last is always kept."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        self._values[key] = value
        self._bytes += self._size(value)
        self._shrink(keep=1)
        return value

    def _shrink(self, keep: int) -> None:
        while self._bytes > self.limit and len(self._values) > keep:
            _, oldest = self._values.popitem(last=False)
            self._bytes -= self._size(oldest)

    def __len__(self) -> int:
        return len(self._values)
