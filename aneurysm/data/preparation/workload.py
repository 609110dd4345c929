"""What preparing a data set will take, before it starts: memory per process, and disk."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from aneurysm.data.errors import UserError
from aneurysm.data.preparation.memory import GIB, available_bytes

log = logging.getLogger(__name__)

# Measured at the peak on series of 300 slices of 512 x 512: the reader holds the stored pixels and the volume
# as float32, sometimes twice; the result is held as float32 and int16, with two masks and their copies.
_BYTES_PER_INPUT_VOXEL = 12
_BYTES_PER_PREPARED_VOXEL = 10
_BYTES_PER_PROCESS = 300 * 2**20  # an interpreter with its libraries
_DISK_PER_PREPARED_VOXEL = 1.25  # bytes; noise that fills the field of view, the most we have seen
_SHARE = 0.8  # of the free memory; the estimate is one
# The largest head there is fits: left to right, front to back (with the holder) and the height that is kept.
_HEAD_MM = np.array([230.0, 260.0, 220.0])
# Where a source does not tell: a large CTA.
_ASSUMED_SHAPE, _ASSUMED_SPACING = (400, 512, 512), (0.625, 0.5, 0.5)


@dataclass(frozen=True)
class Extent:
    """The size of a series as far as its headers tell, before any pixel is read."""

    shape: tuple[int, int, int]  # voxels, in any order of axes
    spacing_mm: tuple[float, float, float]  # along the same axes


@runtime_checkable
class Measured(Protocol):
    """A source that can tell cheaply how large a series is."""

    def extent(self, series_uid: str) -> Extent | None:
        """Size from the headers, None where they do not tell."""
        ...


@dataclass(frozen=True)
class Need:
    """What one case takes to prepare."""

    memory: int  # bytes at the peak
    disk: int  # bytes of the prepared file, at most


def need_of(extent: Extent | None, spacing_mm: float | None, crop: bool, margin_mm: float) -> Need:
    """Estimate from the size of a series and how it will be prepared.

    Args:
        spacing_mm: of the prepared grid; None keeps that of the scan.
        crop: to the head.
        margin_mm: around it.
    """
    extent = extent or Extent(_ASSUMED_SHAPE, _ASSUMED_SPACING)
    voxels = float(np.prod(extent.shape))
    field = np.prod(np.array(extent.shape) * extent.spacing_mm)  # mm3
    if crop:
        field = min(field, np.prod(_HEAD_MM + 2 * margin_mm))
    own = np.prod(extent.spacing_mm)
    prepared = field / (own if spacing_mm is None else min(spacing_mm**3, 1e9))
    return Need(
        int(_BYTES_PER_PROCESS + _BYTES_PER_INPUT_VOXEL * voxels + _BYTES_PER_PREPARED_VOXEL * prepared),
        int(_DISK_PER_PREPARED_VOXEL * prepared),
    )


def affordable_jobs(needs: dict[str, Need], jobs: int, memory_bytes: int | None) -> int:
    """How many processes may run at once, so that the largest cases meeting each other still fit.

    Args:
        memory_bytes: for all processes together; None takes most of what is free.
    """
    limit = int(_SHARE * available_bytes()) if memory_bytes is None else memory_bytes
    largest = sorted((need.memory for need in needs.values()), reverse=True)
    together = np.cumsum(largest[:jobs])
    fit = int((together <= limit).sum())
    if fit < min(jobs, len(largest)):
        uid = max(needs, key=lambda name: needs[name].memory)
        log.warning(
            "%d processes would take about %.1f GiB and %.1f GiB may be used: preparing with %d. "
            "The largest series, %s, takes about %.1f GiB.",
            jobs, together[-1] / GIB, limit / GIB, max(fit, 1), uid, largest[0] / GIB,
        )  # fmt: skip
        return max(fit, 1)
    return jobs


def check_disk(needs: dict[str, Need], folder: Path) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        UserError: the disk is too full for the cases that are to be prepared.
    """
    need, free = sum(one.disk for one in needs.values()), shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{len(needs)} prepared cases take up to {need / GIB:.1f} GiB and {folder} has "
            f"{free / GIB:.1f} GiB free. Free some, or point paths.outputs to a larger disk."
        )
    log.debug("preparing takes up to %.1f GiB of %.1f GiB free", need / GIB, free / GIB)
