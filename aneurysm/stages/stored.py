"""Prepared cases and probability volumes of earlier stages, read from their files or kept in memory.

While all scans of a stage fit in memory, patches are cut from whole volumes; when they do not, every patch
reads the blocks of the file that it touches. `fit_in_memory` decides, `case_at` and `probabilities_at` give
either, and what cuts patches takes either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aneurysm.data.errors import ReadError
from aneurysm.data.preparation.chunked import ArrayFile, open_arrays, write_arrays
from aneurysm.data.preparation.memory import GIB, Remembered, available_bytes
from aneurysm.data.preparation.prepared import Index, PreparedCase, StoredCase, open_prepared, overlap_windows
from aneurysm.stages.processes import barrier, neighbours

AnyCase = PreparedCase | StoredCase


def _bytes(value: Any) -> int:
    return sum(v.nbytes for v in value.values()) if isinstance(value, dict) else value.nbytes


_memory = Remembered(_bytes)  # of whole cases and probability volumes


def limit_memory(gigabytes: float | None) -> None:
    """How much the scans kept in memory may take, in all processes that train together on this machine.

    None: half of what is free, when it is first asked if this process is alone.
    """
    if (processes := neighbours()) == 1:
        _memory.limit = None if gigabytes is None else int(gigabytes * GIB)
    else:
        _memory.limit = (available_bytes() // 2 if gigabytes is None else int(gigabytes * GIB)) // processes
        barrier()  # before anybody takes of it


def fit_in_memory(cases: Sequence[Path], probabilities: int = 0, processes: int = 1) -> bool:
    """Whether whole prepared cases, with probability volumes beside them, fit in every one of the processes.

    Args:
        probabilities: volumes per case.
    """
    headers = [opened(path) for path in cases]
    need = sum(h.nbytes + 4 * probabilities * int(np.prod(h.grid.shape)) for h in headers)
    return need * max(processes, 1) <= _memory.limit


def case_at(path: Path, whole: bool) -> AnyCase:
    """A prepared case to cut patches from.

    Args:
        whole: keep all of it in memory (`fit_in_memory`), or read every patch from the file.
    """
    return remembered(path) if whole else opened(path)


def remembered(path: Path) -> PreparedCase:
    """Load a whole prepared case, keeping the most recent ones in memory."""
    return _memory.get(path, lambda: opened(path).load())


@lru_cache(maxsize=16384)
def opened(path: Path) -> StoredCase:
    """Open a prepared case: what is known about it, without its voxels."""
    return open_prepared(path)


def write_probabilities(path: Path, volumes: Mapping[str, np.ndarray]) -> None:
    """Store probability volumes as uint8 (1/255 steps), atomically."""
    write_arrays(path, {k: np.round(v * 255).astype(np.uint8) for k, v in volumes.items()}, {})


def read_probabilities(path: Path) -> dict[str, np.ndarray]:
    """Read probability volumes back as float32 in 0..1, keeping the most recent ones in memory."""
    return _memory.get(path, lambda: opened_probabilities(path).load())


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Store a label volume (d, h, w) uint8, atomically."""
    write_arrays(path, {"labels": np.ascontiguousarray(labels, dtype=np.uint8)}, {})


def read_labels(path: Path) -> np.ndarray:
    """Read a label volume back, (d, h, w) uint8.

    Raises:
        ReadError: it is not there, or damaged.
    """
    try:
        return open_arrays(path).read("labels")
    except ReadError as error:
        raise ReadError(f"{error} Run the stage that writes it again with force=true.") from error


@lru_cache(maxsize=16384)
def opened_probabilities(path: Path) -> "StoredProbabilities":
    """Open probability volumes without reading them.

    Raises:
        ReadError: they are not there, or were written by an older version.
    """
    try:
        return StoredProbabilities(open_arrays(path))
    except ReadError as error:
        raise ReadError(f"{error} Run the stage that writes it again with force=true.") from error


@dataclass(frozen=True)
class StoredProbabilities:
    """Probability volumes on disk, float32 in 0..1 when read."""

    file: ArrayFile

    def load(self) -> dict[str, np.ndarray]:
        """All of them, whole."""
        return {name: self.file.read(name).astype(np.float32) / 255 for name in self.file.frames}

    def box(self, name: str, start: Index, size: Index) -> np.ndarray:
        """A box of one of them, 0 outside; reads only the blocks of the file that it touches."""
        out = np.zeros(size, np.float32)
        d, h, w = self.file.frames[name].shape
        inside, window = overlap_windows((d, h, w), start, size)
        if inside is not None and window is not None:
            out[inside] = self.file.read(name, window).astype(np.float32) / 255
        return out


Probabilities = dict[str, np.ndarray] | StoredProbabilities


def probabilities_at(path: Path, whole: bool) -> Probabilities:
    """Probability volumes to cut patches from; `whole` as in `case_at`."""
    return read_probabilities(path) if whole else opened_probabilities(path)
