"""Masks against their image: same grid, known labels, on vessels and not in air."""

from pathlib import Path
from typing import Final

import numpy as np
from scipy.ndimage import distance_transform_edt

from aneurysm.check.findings import Collector
from aneurysm.check.intensities import Levels
from aneurysm.check.items import stem
from aneurysm.data.errors import ReadError
from aneurysm.data.formats.metaimage import SUFFIXES, load_metaimage
from aneurysm.data.formats.nifti import load_nifti, read_mask
from aneurysm.data.labels import UNNAMED_VESSEL
from aneurysm.data.scan import Grid

_SHELL_MM: Final = (1.5, 5.0)  # beyond the partial volume of the border, within the same surroundings
# Share of vessel voxels brighter than the middle of their surroundings: above 0.9 in CTA and time of flight
# where the mask fits (0.99 in phantoms), 0.4 to 0.9 where it was moved or mirrored: vessels are still near.
_LEAST_BRIGHTER: Final = 0.6
# Between the two a mask may be coarse. It is misplaced when it fits clearly better elsewhere.
_FITS: Final = 0.85
_BETTER_BY: Final = 0.15
_MOVES_MM: Final = (4.0, 8.0)
_AXES: Final = ("inferior-superior", "posterior-anterior", "left-right")
_MOST_AIR: Final = 0.3  # share of a mask in air; sinus walls and partial volume give up to a tenth


def load_mask(path: Path, grid: Grid, source: Grid, found: Collector) -> np.ndarray | None:
    """A label file on the grid of its scan, (d, h, w) uint8; None when it cannot be used.

    Args:
        grid: canonical, of the scan's volume.
        source: of the stored image; the mask should share it, in any axis order.
    """
    load = load_metaimage if path.name.lower().endswith(SUFFIXES) else load_nifti
    try:
        own = load(path).grid
    except ReadError as error:
        found.add("mask-unreadable", str(error))
        return None
    same_matrix = _check_grids(path, own, source, found)
    try:
        labels = read_mask(path, grid)
    except ReadError as error:
        if same_matrix and "outside" in str(error):
            return None  # has been said with numbers
        found.add("mask-unreadable", str(error))
        return None
    if not labels.any():
        found.add("mask-empty", f"{path.name} has no voxel above 0 inside the image.")
        return None
    return labels


def _check_grids(path: Path, mask: Grid, source: Grid, found: Collector) -> bool:
    """Compare without regard to the order and direction of axes; True when a difference of place was said."""
    if sorted(mask.shape) != sorted(source.shape):
        found.add(
            "mask-shape", f"{stem(path)} has {_times(mask.shape)} voxels, the image {_times(source.shape)}."
        )
        return False
    offset = float(np.linalg.norm(mask.centre_mm - source.centre_mm))
    # Half a voxel is a matter of conventions (corner or centre); the sheared stack of a tilted gantry has the
    # same centre as its upright copy.
    if offset > max(1.5 * float(source.spacing.max()), 1.0):
        found.add(
            "mask-affine", f"The centre of {stem(path)} lies {offset:.1f} mm from the centre of the image."
        )
        return True
    if not np.allclose(np.sort(mask.spacing), np.sort(source.spacing), rtol=0.02):
        sizes = " x ".join(f"{s:.3g}" for s in mask.spacing), " x ".join(f"{s:.3g}" for s in source.spacing)
        found.add(
            "mask-affine", f"Voxels of {stem(path)} are {sizes[0]} mm, those of the image {sizes[1]} mm."
        )
    return False


def check_vessel_values(vessel: np.ndarray, found: Collector) -> None:
    """Labels of a vessel mask in the numbering of RSNA."""
    values = np.unique(vessel)
    unknown = values[values > UNNAMED_VESSEL]
    if len(unknown):
        count = int((vessel > UNNAMED_VESSEL).sum())
        found.add("mask-values", f"Values {unknown[:8].tolist()} in {count} voxels of the vessel mask.")


def check_in_air(
    name: str, mask: np.ndarray, volume: np.ndarray, levels: Levels, modality: str | None, found: Collector
) -> bool:
    """A mask over air lies outside the head; True when it does. Flow voids of T2 are as dark as air."""
    if modality in (None, "T2"):
        return False
    limit = levels.air_below(modality)
    share = float((volume[mask > 0] < limit).mean())
    if share > _MOST_AIR:
        found.add(
            "mask-in-air",
            f"{share:.0%} of the {name} mask lies where the image shows air (below {limit:.4g}).",
        )
    return share > _MOST_AIR


def check_brightness(
    vessel: np.ndarray, volume: np.ndarray, grid: Grid, modality: str | None, found: Collector
) -> None:
    """Vessels are brighter than their surroundings in CTA and MRA, unless the mask lies elsewhere."""
    if modality not in ("CTA", "MRA"):
        return
    surroundings = _surroundings(vessel, volume, grid)
    if surroundings is None:
        return
    brighter = float((volume[vessel > 0] > surroundings).mean())
    if brighter >= _FITS:
        return
    where, share = _best_elsewhere(vessel, volume, grid, surroundings)
    fits_elsewhere = share >= max(_FITS, brighter + _BETTER_BY)
    if brighter < _LEAST_BRIGHTER or fits_elsewhere:
        text = f"{brighter:.0%} of its voxels are brighter than their surroundings"
        text += f"; {where} it would be {share:.0%}." if fits_elsewhere else ", no more than by chance."
        found.add("mask-misplaced", text)


def _surroundings(vessel: np.ndarray, volume: np.ndarray, grid: Grid) -> float | None:
    """Median of the shell around a mask; None when there is hardly any."""
    marked = np.argwhere(vessel)
    pad = np.ceil(_SHELL_MM[1] / grid.spacing).astype(int)
    low = np.maximum(marked.min(axis=0) - pad, 0)
    high = np.minimum(marked.max(axis=0) + pad + 1, vessel.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    distance = np.asarray(distance_transform_edt(vessel[box] == 0, sampling=grid.spacing))
    shell = volume[box][(distance > _SHELL_MM[0]) & (distance <= _SHELL_MM[1])]
    return float(np.median(shell)) if shell.size >= 50 else None


def _best_elsewhere(
    vessel: np.ndarray, volume: np.ndarray, grid: Grid, surroundings: float
) -> tuple[str, float]:
    """The mirrored or moved place where most of a mask is bright, in words, and the share there."""
    marked = np.argwhere(vessel)
    best = ("", 0.0)
    for axis, name in enumerate(_AXES):
        along = np.arange(3) == axis
        places = [(f"mirrored along {name}", np.where(along, vessel.shape[axis] - 1 - marked, marked))]
        for mm in (*_MOVES_MM, *(-m for m in _MOVES_MM)):
            moved = marked + np.rint(np.where(along, mm / grid.spacing[axis], 0)).astype(int)
            places.append((f"moved by {mm:+g} mm along {name}", moved))
        for words, place in places:
            inside = place[((place >= 0) & (place < vessel.shape)).all(axis=1)]
            # A mask that has been pushed out of the image fits nowhere.
            if len(inside) > 0.8 * len(marked):
                share = float((volume[tuple(inside.T)] > surroundings).mean())
                best = max(best, (words, share), key=lambda pair: pair[1])
    return best


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
