"""Files that are either whole or absent."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def part_of(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{os.getpid()}.part.{path.name}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path` in one step.

    A process killed at any moment leaves the old file or the new one, never a half-written one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder against every other process, and sweep away what killed ones left half written in it.

    The operating system lets go of the lock when a process dies, so a killed one blocks nobody.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("another process is at work in %s; waiting", folder)
        lock.acquire()
    try:
        for part in folder.glob(".*.part.*"):
            part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
