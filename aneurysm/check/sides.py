"""Left and right: does the anatomy agree with the labels and with the header?"""

from typing import Final

import numpy as np

from aneurysm.check.findings import Collector
from aneurysm.check.intensities import Levels
from aneurysm.data.labels import LOCATIONS, MIRRORED_LOCATION, VESSEL_LABEL
from aneurysm.data.scan import Grid

# Arteries near the middle (anterior cerebral, communicating) bulge across it by a few mm, and so does a sac.
BEYOND_VESSELS_MM: Final = 6.0
# The middle of the head's outline is off by more: a turned head, hair, a head holder.
BEYOND_HEAD_MM: Final = 14.0
_LEAST_VOXELS: Final = 20  # of a label, for a centre of mass
_SLAB_MM: Final = 15.0
_COARSE_MM: Final = 5.0
_WHOLE_HEAD_MM: Final = 110.0  # along every axis; crops and slabs are too symmetric in other ways
# Measured on heads (time of flight, T1 with and without contrast, T2, CT): left-right 0.75 to 0.95, the other
# axes 0.2 to 0.82 and lower in the same head by 0.12 to 0.67.
_SYMMETRY: Final = 0.6
_MORE_SYMMETRIC: Final = 0.1


def label_centres(vessel: np.ndarray, grid: Grid) -> dict[int, np.ndarray]:
    """Centres (3,) in RAS mm of the arteries of a mask, by location index; tiny ones are left out."""
    marked = np.argwhere(vessel)
    values = vessel[tuple(marked.T)]
    centres = {}
    for location, label in enumerate(VESSEL_LABEL):
        own = marked[values == label]
        if len(own) >= _LEAST_VOXELS:
            centres[location] = grid.to_mm(own.mean(axis=0))
    return centres


def vessel_midline(centres: dict[int, np.ndarray]) -> float | None:
    """World x (mm) halfway between left and right arteries; None without a pair."""
    middles = [
        (centres[i][0] + centres[j][0]) / 2
        for i, j in enumerate(MIRRORED_LOCATION)
        if i < j and i in centres and j in centres
    ]
    return float(np.median(middles)) if middles else None


def check_mask_sides(centres: dict[int, np.ndarray], found: Collector) -> bool:
    """Whether the left arteries of a mask lie left of the right ones; False when they do not."""
    pairs = {
        LOCATIONS[i].removeprefix("Left "): float(centres[j][0] - centres[i][0])
        for i, j in enumerate(MIRRORED_LOCATION)
        if LOCATIONS[i].startswith("Left ") and i in centres and j in centres
    }
    # Anterior cerebral arteries may cross; 2 mm is more than the partial volume of their centres.
    crossed = {name: gap for name, gap in pairs.items() if gap < -2}
    if not crossed:
        return True
    name, gap = min(crossed.items(), key=lambda pair: pair[1])
    found.add(
        "mask-wrong-side",
        f"{len(crossed)} of {len(pairs)} pairs are crossed: the centre of 'Left {name}' lies {-gap:.1f} mm "
        f"to the right of 'Right {name}'.",
    )
    return False


def check_point_side(
    location: str, mm: np.ndarray, midline: float | None, head_offset: float | None, found: Collector
) -> None:
    """A point whose name says left or right against the middle of arteries or head.

    Args:
        mm: (3,) RAS.
        midline: world x of the middle of the arteries, None without a vessel mask.
        head_offset: mm to the right of the middle of the head's outline, None when that is not seen.
    """
    side = 1 if location.startswith("Right ") else -1 if location.startswith("Left ") else 0
    if not side or location not in LOCATIONS:
        return
    if midline is not None:
        offset, margin, of = float(mm[0]) - midline, BEYOND_VESSELS_MM, "arteries"
    elif head_offset is not None:
        offset, margin, of = head_offset, BEYOND_HEAD_MM, "head"
    else:
        return
    if side * offset < -margin:
        where = "right" if offset > 0 else "left"
        text = f"'{location}' lies {abs(offset):.0f} mm to the {where} of the middle of the {of}."
        found.add("localizer-wrong-side", text)


def head_offset_of(
    mm: np.ndarray, volume: np.ndarray, grid: Grid, levels: Levels, modality: str | None
) -> float | None:
    """How far (mm) a point lies to the right of the middle of the head's outline around its level.

    None when the outline is not seen on both sides (a crop), or the point lies outside.
    """
    d, _, w = grid.to_index(mm)
    half = max(round(_SLAB_MM / grid.spacing[0]), 1)
    slab = volume[max(int(d) - half, 0) : int(d) + half + 1 : max(half // 4, 1), ::4]
    if slab.size == 0:
        return None
    # Noise and the table are thin or faint: the outline is where a row is bright over some length.
    limit = (
        levels.air_below(modality) if modality == "CTA" else levels.low + 0.15 * (levels.high - levels.low)
    )
    solid = slab > limit
    if solid[..., :2].mean() > 0.05 or solid[..., -2:].mean() > 0.05:
        return None
    first, last = solid.argmax(axis=-1), solid.shape[-1] - 1 - solid[..., ::-1].argmax(axis=-1)
    wide = solid.any(axis=-1) & ((last - first) * grid.spacing[2] > 80)
    if wide.sum() < 10:
        return None
    middle = float(np.median((first[wide] + last[wide]) / 2))
    return float((w - middle) * grid.spacing[2])


def check_symmetry(volume: np.ndarray, grid: Grid, levels: Levels, found: Collector) -> None:
    """A head is most symmetric from left to right; if another axis is, the header names the wrong axes.

    Args:
        volume: (d, h, w) in canonical orientation.
    """
    if (grid.spacing * np.array(grid.shape) < _WHOLE_HEAD_MM).any():
        return
    symmetry = axis_symmetry(volume, grid, levels)
    other = int(np.argmax(symmetry[:2]))
    if symmetry[other] > _SYMMETRY and symmetry[other] > symmetry[2] + _MORE_SYMMETRIC:
        name = ("inferior-superior", "posterior-anterior")[other]
        found.add(
            "unlikely-orientation",
            f"Mirrored along {name} the image agrees with itself at r = {symmetry[other]:.2f}, "
            f"from left to right only at r = {symmetry[2]:.2f}.",
        )


def axis_symmetry(volume: np.ndarray, grid: Grid, levels: Levels) -> tuple[float, float, float]:
    """Best correlation of a volume with its mirror image along d, h, w, over shifts of the mirror plane."""
    step = np.maximum(np.rint(_COARSE_MM / grid.spacing).astype(int), 1)
    size = np.array(volume.shape) // step
    cut = volume[: size[0] * step[0], : size[1] * step[1], : size[2] * step[2]]
    blocks = cut.reshape(size[0], step[0], size[1], step[1], size[2], step[2])
    coarse = np.clip(blocks.mean(axis=(1, 3, 5), dtype=np.float32), levels.low, levels.high)
    best = []
    for axis in range(3):
        flipped, n = np.flip(coarse, axis), coarse.shape[axis]
        scores = [-1.0]
        for shift in range(-n // 3, n // 3 + 1):
            # The overlap of the image with its mirror image about a plane shifted by half a step each.
            keep = [slice(None)] * 3
            other = [slice(None)] * 3
            keep[axis] = slice(max(shift, 0), n + min(shift, 0))
            other[axis] = slice(max(-shift, 0), n + min(-shift, 0))
            a, b = coarse[tuple(keep)], flipped[tuple(other)]
            if a.std() > 0 and b.std() > 0:
                scores.append(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))
        best.append(max(scores))
    return best[0], best[1], best[2]
