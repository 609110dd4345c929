"""From the slices of a DICOM series to one stack: the majority geometry, in spatial order, without gaps."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aneurysm.data.dicom.slices import Slice, by_plane
from aneurysm.data.errors import ReadError
from aneurysm.data.resample import canonicalise, resample
from aneurysm.data.scan import Grid

MIN_SLICES = 3  # fewer slices are a localiser, not a volume
_MISSING = 1.5  # a gap this many times the usual gap has lost a slice
_SAME_MM = 1e-2  # slices closer than this lie at one position
_LISTED = 4  # names in a message before "and n more"


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices of one geometry in spatial order, checked for gaps.

    Notation: n slices, gaps (n - 1,) in mm along the normal.
    """

    series: str
    slices: list[Slice]
    along: np.ndarray  # (n,) mm along the slice normal, rising
    grid: Grid  # (slice, row, column); evenly spaced from the first to the last slice

    @property
    def uneven(self) -> bool:
        """Whether slices lie beside the places that the grid gives them."""
        return self._unevenness() > max(0.01 * float(np.median(np.diff(self.along))), 0.01)

    @property
    def tilt_degrees(self) -> float:
        """How far the gantry was tilted: the angle between the stack and its slices' normal; 0 when no
        slice is off by half a pixel."""
        rows, columns = self._drift()
        if max(abs(rows), abs(columns)) < 0.5:
            return 0.0
        step, normal = self.grid.affine[:3, 0], self.slices[0].normal
        return float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))

    def evened(self, volume: np.ndarray, notes: list[str]) -> np.ndarray:
        """The images (n, rows, columns) interpolated from where they lie to where the grid has them."""
        gaps = np.diff(self.along)
        notes.append(
            f"slice distances vary from {gaps.min():.3g} to {gaps.max():.3g} mm; interpolated to even spacing"
        )
        even = np.linspace(self.along[0], self.along[-1], len(self.along))
        right = np.clip(np.searchsorted(self.along, even, side="right"), 1, len(even) - 1)
        weight = ((even - self.along[right - 1]) / gaps[right - 1]).astype(np.float32)
        out = np.empty_like(volume)
        for i, (r, w) in enumerate(zip(right, weight, strict=True)):
            out[i] = volume[r - 1] * (1 - w) + volume[r] * w
        return out

    def straightened(self, volume: np.ndarray, notes: list[str]) -> tuple[np.ndarray, Grid]:
        """A stack that leans to one side, on perpendicular and canonical axes."""
        notes.append(f"gantry tilt of {self.tilt_degrees:.1f} degrees; resampled onto perpendicular axes")
        rows, columns = self._drift()
        step, down, across = self.grid.affine[:3, :3].T
        normal, n = self.slices[0].normal, self.grid.shape
        affine = self.grid.affine.copy()
        affine[:3, 0] = (step @ normal) * normal
        affine[:3, 3] += min(rows, 0) * down + min(columns, 0) * across
        onto = Grid((n[0], n[1] + int(np.ceil(abs(rows))), n[2] + int(np.ceil(abs(columns)))), affine)
        return canonicalise(resample(volume, self.grid, onto, order=1, fill=float(volume.min())), onto)

    def _unevenness(self) -> float:
        even = np.linspace(self.along[0], self.along[-1], len(self.along))
        return float(np.abs(self.along - even).max())

    def _drift(self) -> tuple[float, float]:
        """Sideways drift from the first to the last slice, in rows and columns."""
        step, down, across = self.grid.affine[:3, :3].T
        normal = self.slices[0].normal
        lateral = (step - (step @ normal) * normal) * (self.grid.shape[0] - 1)
        return float(lateral @ down / (down @ down)), float(lateral @ across / (across @ across))


def stack_of(
    slices: list[Slice], series: str, same_pixels: Callable[[Slice, Slice], bool], notes: list[str]
) -> Stack:
    """The stack that most slices form; what is left out is added to `notes`.

    Args:
        same_pixels: whether two slices at one position show the same image.

    Raises:
        ReadError: too few slices, all at one place, no majority, different images at one place, missing or
            foreign slices, or slices shifted in their plane. The message names them.
    """
    slices = _majority(slices, series, notes)
    if len(slices) < MIN_SLICES:
        raise ReadError(
            f"Series {series}: {len(slices)} slices are not a volume, at least {MIN_SLICES} needed. "
            "Is it a localiser?"
        )
    normal = slices[0].normal
    slices = sorted(slices, key=lambda s: (float(s.position @ normal), s.name))
    along = np.array([s.position @ normal for s in slices])
    if along[-1] - along[0] < _SAME_MM:
        raise ReadError(
            f"Series {series}: all {len(slices)} slices lie at the same position (a time series or a "
            "faulty export). Export the series with one image per position."
        )
    slices, along = _without_copies(slices, along, series, same_pixels, notes)
    _check_gaps(slices, np.diff(along), series)
    _check_straight(slices, along, series)
    affine = np.eye(4)
    affine[:3, 0] = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    affine[:3, 1], affine[:3, 2], affine[:3, 3] = slices[0].down, slices[0].across, slices[0].position
    return Stack(series, slices, along, Grid((len(slices), *slices[0].shape), affine))


def names(items: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _majority(slices: list[Slice], series: str, notes: list[str]) -> list[Slice]:
    """The largest set of slices with one matrix size, pixel spacing and orientation."""
    groups = by_plane(slices)
    if len(groups) > 1:
        if len(groups[0]) == len(groups[1]):
            raise ReadError(
                f"Series {series}: slices with different size, spacing or orientation and no majority "
                f"({groups[0][0].name} and {groups[1][0].name}, {len(groups[0])} each). Split the series."
            )
        others = [s.name for g in groups[1:] for s in g]
        notes.append(f"dropped {len(others)} slices of another size, spacing or orientation: {names(others)}")
    return groups[0]


def _without_copies(
    slices: list[Slice],
    along: np.ndarray,
    series: str,
    same_pixels: Callable[[Slice, Slice], bool],
    notes: list[str],
) -> tuple[list[Slice], np.ndarray]:
    step = _usual(np.diff(along)[np.diff(along) > _SAME_MM])
    keep, copies = [0], []
    for i in range(1, len(slices)):
        kept = slices[keep[-1]]
        if along[i] - along[keep[-1]] > 0.02 * step:
            keep.append(i)
        elif np.linalg.norm(slices[i].position - kept.position) > max(0.02 * step, _SAME_MM):
            raise ReadError(
                f"Series {series}: {kept.name} and {slices[i].name} lie beside each other in one plane "
                "(tiles, not a volume). Export one field of view per series."
            )
        elif same_pixels(kept, slices[i]):
            copies.append(f"{slices[i].name} (of {kept.name})")
        else:
            raise ReadError(
                f"Series {series}: {kept.name} and {slices[i].name} are different images at the same "
                "position (two phases or echoes in one series). Export one series per phase."
            )
    if copies:
        notes.append(f"dropped {len(copies)} copies: {names(copies)}")
    if len(keep) < MIN_SLICES:
        raise ReadError(f"Series {series}: {len(keep)} positions are not a volume, {MIN_SLICES} needed.")
    return [slices[i] for i in keep], along[keep]


def _usual(gaps: np.ndarray) -> float:
    """The lower median: with every second slice missing, the mean of two middle gaps would hide it."""
    return float(np.sort(gaps)[(len(gaps) - 1) // 2])


def _check_gaps(slices: list[Slice], gaps: np.ndarray, series: str) -> None:
    step = _usual(gaps)
    wrong = (gaps > _MISSING * step) | (gaps < step / 2)
    if not wrong.any():
        return
    i = int(np.flatnonzero(wrong)[0])
    found = (
        f"slices are {step:.3g} mm apart, "
        f"but {gaps[i]:.3g} mm between {slices[i].name} and {slices[i + 1].name}"
    )
    lost = gaps[wrong] / step
    whole = bool((np.abs(lost - np.rint(lost)) < 0.1).all() and (lost > 1).all())
    if wrong.mean() > 0.2 and not whole:
        problem = "the series joins parts with different slice distances. Reconstruct it with even spacing."
    elif gaps[i] > step:
        problem = f"a slice is missing at {int(wrong.sum())} place(s). Export the complete series again."
    else:
        problem = "a foreign slice lies between its neighbours. Remove it from the series."
    raise ReadError(f"Series {series}: {found}; {problem}")


def _check_straight(slices: list[Slice], along: np.ndarray, series: str) -> None:
    positions = np.array([s.position for s in slices])
    fraction = (along - along[0]) / (along[-1] - along[0])
    drift = positions - (positions[0] + fraction[:, None] * (positions[-1] - positions[0]))
    off = np.linalg.norm(drift, axis=1)
    pixel = min(np.linalg.norm(slices[0].across), np.linalg.norm(slices[0].down))
    if off.max() > 0.5 * pixel:
        i = int(off.argmax())
        raise ReadError(
            f"Series {series}: {slices[i].name} is shifted in its plane by "
            f"{off[i]:.2f} mm against a straight stack. Reconstruct the series."
        )
