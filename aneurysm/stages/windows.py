"""Where the windows of a sliding network lie: on one lattice, placed so that a box needs few of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

AXES = "dhw"
Index = tuple[int, ...]  # three voxels or counts along d, h, w


@dataclass(frozen=True)
class View:
    """How a network that was trained on patches looks at a whole volume.

    window: voxels per side of the sliding window; overlap: of neighbouring windows, as a share;
    flips: axes among d, h, w. The mean is taken over the volume as it is and flipped along each of them;
    every one costs another pass.
    """

    window: int
    overlap: float
    flips: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.overlap < 1:
            raise ValueError(
                f"A window has at least one voxel and an overlap in 0..1, got {self.window}, {self.overlap}."
            )
        if unknown := sorted(set(self.flips) - set(AXES)):
            raise ValueError(f"Volumes are flipped along d, h or w, not {', '.join(unknown)}.")

    @property
    def axes(self) -> list[tuple[int, ...]]:
        """The axes, counted from the last, along which each look is flipped; none for the first."""
        return [(), *((AXES.index(axis) - 3,) for axis in self.flips)]


@dataclass(frozen=True)
class Box:
    """Voxels start <= i < stop along d, h, w."""

    start: Index
    stop: Index

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        if len(self.start) != 3 or any(a >= b for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"A box holds voxels along three axes, not {self.start} to {self.stop}.")

    @property
    def size(self) -> Index:
        """Voxels along each axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """To cut the box out of (d, h, w)."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def moved(self, by: Sequence[int]) -> "Box":
        """The same box elsewhere."""
        start = tuple(a + m for a, m in zip(self.start, by, strict=True))
        return Box(start, tuple(a + n for a, n in zip(start, self.size, strict=True)))

    def check_inside(self, shape: Sequence[int]) -> None:
        """Raises ValueError where the box leaves a volume of this shape."""
        if min(self.start) < 0 or any(b > n for b, n in zip(self.stop, shape, strict=True)):
            raise ValueError(f"The box {self.start} to {self.stop} leaves the volume {tuple(shape)}.")


@dataclass(frozen=True)
class Region:
    """A box of a volume that a network is to look at; `exact` as in `place`."""

    box: Box
    exact: bool

    def flipped(self, axis: int, size: int) -> "Region":
        """The same voxels in a volume that is flipped along an axis (0, 1, 2) of `size` voxels."""
        start, stop = list(self.box.start), list(self.box.stop)
        start[axis], stop[axis] = size - stop[axis], size - start[axis]
        return Region(Box(tuple(start), tuple(stop)), self.exact)


Starts = tuple[list[int], ...]  # first voxels of the windows along d, h, w, rising


@dataclass(frozen=True)
class Placement:
    """The windows that are visited for a box.

    starts: of these windows; box: all voxels that get a result; exact: those of them that no other window of
    the lattice sees, None if there are none. There the result is that of the whole volume; elsewhere in the
    box it comes from fewer windows, as it does at the border of a volume. anchor: of the lattice.
    """

    starts: Starts
    box: Box
    exact: Box | None
    anchor: Index

    @property
    def count(self) -> int:
        """Windows per look."""
        return int(np.prod([len(s) for s in self.starts]))


def stride(window: int, overlap: float) -> int:
    """Voxels from one window to the next."""
    return max(int(window * (1 - overlap)), 1)


def window_starts(size: int, window: int, overlap: float, anchor: int = 0) -> list[int]:
    """First voxels of the windows along an axis, rising; they cover it, the outer ones are moved inwards.

    Args:
        size: voxels of the axis; one window starts at 0 where it is not longer than that.
        anchor: a voxel at which a window starts; 0 gives the places of MONAI's `sliding_window_inference`.
    """
    if size <= window:
        return [0]
    step = stride(window, overlap)
    starts = np.arange(anchor % step - step, size - window + step, step)
    return [int(s) for s in np.unique(np.clip(starts, 0, size - window))]


def lattice(shape: Sequence[int], view: View, anchor: Sequence[int] = (0, 0, 0)) -> Starts:
    """All windows of a volume."""
    return tuple(window_starts(n, view.window, view.overlap, a) for n, a in zip(shape, anchor, strict=True))


def place(box: Box, shape: Sequence[int], view: View, exact: bool) -> Placement:
    """Choose the lattice so that few windows suffice for a box of a volume.

    Args:
        exact: every voxel of the box gets what it would get in a pass over the whole volume, so all windows
            that reach into the box are visited, and results are given as far as only these see. If false, the
            windows only have to cover the box: for a box of two windows a side, a third as many.
    """
    box.check_inside(shape)
    along = [
        (_reaching if exact else _covering)(low, high, size, view)
        for low, high, size in zip(box.start, box.stop, shape, strict=True)
    ]
    starts = tuple(axis.starts for axis in along)
    given = Box(tuple(axis.low for axis in along), tuple(axis.high for axis in along))
    alike = [(axis.exact_low, axis.exact_high) for axis in along]
    core = None
    if all(low < high for low, high in alike):
        core = Box(tuple(low for low, _ in alike), tuple(high for _, high in alike))
    return Placement(starts, given, core, tuple(axis.anchor for axis in along))


@dataclass(frozen=True)
class _Along:
    """Placement along one axis."""

    starts: list[int]
    low: int
    high: int
    exact_low: int
    exact_high: int
    anchor: int


def _reaching(low: int, high: int, size: int, view: View) -> _Along:
    """All windows that see a voxel of low..high; of the best anchors the one that leaves most around it."""
    best, chosen = None, None
    for anchor in range(stride(view.window, view.overlap)):
        starts = window_starts(size, view.window, view.overlap, anchor)
        visited = [s for s in starts if s < high and s + view.window > low]
        first, last = _unseen_by_others(starts, visited, size, view.window)
        # Beyond the end of the volume there is nothing to leave.
        spare = min(low - first if first else size, last - high if last < size else size)
        if best is None or (len(visited), -spare) < best:
            best, chosen = (len(visited), -spare), _Along(visited, first, last, first, last, anchor)
    assert chosen is not None
    return chosen


def _covering(low: int, high: int, size: int, view: View) -> _Along:
    """The fewest windows that cover low..high, with the box in their middle."""
    window, step = view.window, stride(view.window, view.overlap)
    count = max(-(-(high - low - window) // step), 0) + 1
    reach = (count - 1) * step + window
    if reach >= size:
        return _Along(window_starts(size, window, view.overlap), 0, size, 0, size, 0)
    first = min(max(low - (reach - (high - low)) // 2, 0), size - reach)
    visited = [first + i * step for i in range(count)]
    others = window_starts(size, window, view.overlap, first)
    return _Along(
        visited, first, first + reach, *_unseen_by_others(others, visited, size, window), anchor=first
    )


def _unseen_by_others(starts: list[int], visited: list[int], size: int, window: int) -> tuple[int, int]:
    """The voxels that only the visited windows see, as start and stop."""
    before = [s + window for s in starts if s < visited[0]]
    after = [s for s in starts if s > visited[-1]]
    return max(before, default=0), min(after, default=size)
