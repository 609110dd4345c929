"""Slices in space: gaps, doubles, tilt, foreign slices, and voxel sizes that no head scan has."""

from pathlib import Path
from typing import Final

import numpy as np

from aneurysm.check.findings import Collector
from aneurysm.data.dicom.headers import Header
from aneurysm.data.dicom.slices import Slice, by_plane, slices_of
from aneurysm.data.dicom.stack import MIN_SLICES
from aneurysm.data.errors import ReadError
from aneurysm.data.scan import Grid

# A gap of this many times the median has lost a slice; scanners' own rounding stays far below.
_MISSING: Final = 1.5
_MANY: Final = 0.2  # share of wrong gaps above which parts were joined, not slices lost
# Pixels of head scans: 0.2 mm (7T angiography) to 1.1 mm (256 on 280 mm); slices up to 10 mm in CT and T2.
PIXEL_MM: Final = (0.08, 3.0)
STEP_MM: Final = (0.08, 15.0)
# The smallest crops in use show 20 mm (the circle of Willis needs 30); the largest scans reach from the
# vertex to the lungs (RSNA 2025 has some), not to the feet.
EXTENT_MM: Final = (15.0, 800.0)
_TILT_DEGREES: Final = 0.5


def check_slices(headers: dict[Path, Header], found: Collector) -> list[Slice]:
    """Where the images of one series lie.

    Returns:
        The slices of the majority, in spatial order; empty when no geometry is known.
    """
    slices: list[Slice] = []
    faults: list[str] = []
    for header in headers.values():
        try:
            slices += slices_of(header)
        except ReadError as error:
            faults.append(str(error))
    if faults and not found.has_fatal:  # a missing tag has been named already
        found.add("bad-geometry", f"{len(faults)} of {len(headers)} images, first: {faults[0]}")
    groups = by_plane(slices)
    if not groups:
        return []
    if len(groups) > 1:
        if len(groups[0]) == len(groups[1]):
            text = " and ".join(f"{len(g)} like {g[0].name} {_plane(g[0])}" for g in groups[:2])
            found.add("no-majority", f"{text}.")
        else:
            others = sum(map(len, groups[1:]))
            odd = groups[1][0]
            found.add(
                "mixed-geometry",
                f"{others} of {len(slices)} slices differ from the majority {_plane(groups[0][0])}, "
                f"first {odd.name} {_plane(odd)}.",
            )
    stack = groups[0]
    if len(stack) < MIN_SLICES:
        found.add("too-few-slices", f"{len(stack)} slices of one geometry; a volume needs {MIN_SLICES}.")
        return stack
    normal = stack[0].normal
    stack = sorted(stack, key=lambda s: float(s.position @ normal))
    _check_stack(stack, normal, found)
    if not found.has_fatal:
        _check_tags(stack, headers, found)
    return stack


def check_grid(grid: Grid, found: Collector) -> None:
    """Voxel size and field of view of a volume as it is stored (axes in any order)."""
    spacing, extent = np.sort(grid.spacing), np.sort(grid.spacing * np.array(grid.shape))
    # The coarsest axis may be the slice distance, the other two are pixels.
    if spacing[0] < PIXEL_MM[0] or spacing[1] > PIXEL_MM[1] or spacing[2] > STEP_MM[1]:
        sizes = " x ".join(f"{s:.4g}" for s in grid.spacing)
        usual = f"pixels of {PIXEL_MM[0]:g} to {PIXEL_MM[1]:g} mm, slices of at most {STEP_MM[1]:g} mm"
        found.add("implausible-spacing", f"Voxels of {sizes} mm; usual are {usual}.")
    elif extent[2] > EXTENT_MM[1] or extent[1] < EXTENT_MM[0]:
        sizes = " x ".join(f"{e:.4g}" for e in grid.spacing * np.array(grid.shape))
        found.add("implausible-size", f"A field of view of {sizes} mm.")
    elif extent[0] < EXTENT_MM[0]:
        found.add(
            "thin-slab",
            f"Only {extent[0]:.1f} mm along one axis ({min(grid.shape)} to {max(grid.shape)} voxels).",
        )


def _plane(s: Slice) -> str:
    pixel = np.linalg.norm(s.down), np.linalg.norm(s.across)
    axis = ("sagittal", "coronal", "axial")[int(np.abs(s.normal).argmax())]
    return f"({axis}, {s.shape[0]} x {s.shape[1]} pixels of {pixel[0]:.3g} x {pixel[1]:.3g} mm)"


def _check_stack(stack: list[Slice], normal: np.ndarray, found: Collector) -> None:
    along = np.array([s.position @ normal for s in stack])
    if along[-1] - along[0] < 1e-2:
        found.add("one-position", f"All {len(stack)} slices lie at {along[0]:.2f} mm along their normal.")
        return
    gaps = np.diff(along)
    step = float(np.median(gaps[gaps > 1e-2]))
    double = np.flatnonzero(gaps <= 0.02 * step)
    if len(double):
        i = int(double[0])
        found.add(
            "conflicting-slices",
            f"{len(double)} position(s) hold two images, first {stack[i].name} and {stack[i + 1].name} "
            f"at {along[i]:.2f} mm.",
        )
        keep = np.concatenate([[True], gaps > 0.02 * step])
        stack = [s for s, k in zip(stack, keep, strict=True) if k]
        along = along[keep]
        gaps = np.diff(along)
    _check_gaps(gaps, step, stack, found)
    positions = np.array([s.position for s in stack])
    fraction = ((along - along[0]) / (along[-1] - along[0]))[:, None]
    drift = np.linalg.norm(positions - (positions[0] + fraction * (positions[-1] - positions[0])), axis=1)
    pixel = min(np.linalg.norm(stack[0].across), np.linalg.norm(stack[0].down))
    if drift.max() > 0.5 * pixel:
        i = int(drift.argmax())
        found.add("shifted-slices", f"{stack[i].name} is {drift[i]:.2f} mm beside a straight stack.")
        return
    direction = positions[-1] - positions[0]
    sideways = float(np.linalg.norm(direction - (direction @ normal) * normal))
    degrees = float(np.degrees(np.arctan2(sideways, abs(direction @ normal))))
    if degrees > _TILT_DEGREES and sideways > pixel:
        found.add("gantry-tilt", f"{degrees:.1f} degrees; the last slice lies {sideways:.1f} mm sideways.")


def _check_gaps(gaps: np.ndarray, step: float, stack: list[Slice], found: Collector) -> None:
    wide = gaps > _MISSING * step
    wrong = wide | (gaps < step / 2)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        where = f"{gaps[i]:.3g} mm between {stack[i].name} and {stack[i + 1].name}, {step:.3g} mm elsewhere"
        few = wrong.mean() <= _MANY or wrong.sum() <= 2
        if few and not (wrong & ~wide).any():
            lost = int(np.rint(gaps[wide] / step - 1).sum())
            found.add(
                "missing-slices", f"About {lost} slice(s) missing at {int(wide.sum())} place(s): {where}."
            )
        else:
            found.add("mixed-gaps", f"{int(wrong.sum())} of {len(gaps)} gaps are wrong: {where}.")
        return
    along = np.concatenate([[0.0], np.cumsum(gaps)])
    uneven = np.abs(along - np.linspace(0, along[-1], len(along))).max()
    if uneven > max(0.01 * step, 0.01):
        text = f"From {gaps.min():.3g} to {gaps.max():.3g} mm; up to {uneven:.2g} mm from an even stack."
        found.add("uneven-gaps", text)


def _check_tags(stack: list[Slice], headers: dict[Path, Header], found: Collector) -> None:
    """Tags that other tools believe and that contradict the positions."""
    if any(s.frame is not None for s in stack):
        return
    positions = np.array([s.position @ stack[0].normal for s in stack])
    step = float(positions[-1] - positions[0]) / (len(stack) - 1)
    try:
        tagged = abs(headers[stack[0].path].number("SpacingBetweenSlices") or 0)
        numbers = [int(headers[s.path].number("InstanceNumber") or 0) for s in stack]
    except (ReadError, ValueError, OverflowError):  # NaN and infinity are numbers too
        return
    if tagged and step > 1e-2 and abs(tagged / step - 1) > 0.1:
        found.add("spacing-tag", f"The tag says {tagged:.3g} mm, the positions {step:.3g} mm.")
    order = np.diff(numbers)
    if any(numbers) and not ((order > 0).all() or (order < 0).all()):
        swaps = int(min((order <= 0).sum(), (order >= 0).sum()))
        found.add("instance-order", f"{swaps} of {len(order)} steps go against the order in space.")
