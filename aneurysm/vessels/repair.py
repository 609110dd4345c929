"""Mend a lumen mask by what is known of arteries: they are tubes without breaks, holes or crumbs.

In this order: cavities are filled; gaps between the ends of vessels are bridged; a round piece beside a
vessel, as an aneurysm looks whose neck was missed, is joined to it; pieces that are still too small are
dropped. All rules are deterministic, and every violation found is counted with what became of it.

A gap is bridged only where a vessel would go on: from a free end of the centreline, within an angle of its
direction, to another free end that faces it, or to the flank of a vessel that is met at a steep angle. Of
vessels that run side by side neither holds: the flank of the other is either beside the end, outside the
angle, or ahead of it, met too flatly.
"""

from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree
from skimage import measure

from aneurysm.data.scan import Grid
from aneurysm.vessels.cleanup import bounding_box, check_on_grid
from aneurysm.vessels.repair_bridges import VesselRules, bridges_over, tube

_FAINT_EXTENT_MM = 12.0  # of a faint piece beside the mask, what is looked at at most


@dataclass(frozen=True)
class Violations:
    """What is wrong with a mask."""

    pieces: int = 0
    fragments: int = 0  # pieces below the smallest volume
    holes: int = 0  # enclosed cavities
    gaps: int = 0  # breaks that the rules would bridge


@dataclass(frozen=True, eq=False)
class Repaired:
    """A mended mask, and what was found and done."""

    mask: np.ndarray  # (d, h, w) bool
    before: Violations
    after: Violations
    bridged: int = 0
    joined: int = 0  # round pieces, as sacs
    rescued: int = 0  # faint pieces that came back, bridged or joined
    dropped: int = 0
    dropped_mm3: float = 0.0
    filled: int = 0
    added_mm3: float = field(default=0.0)  # by bridges, joints and filling

    def row(self) -> dict[str, float]:
        """One flat row of a table: pieces_before, pieces_after, ..., bridged, joined, dropped ..."""
        found = {
            f"{name}_{when}": value
            for when, violations in (("before", self.before), ("after", self.after))
            for name, value in asdict(violations).items()
        }
        done = ("bridged", "joined", "rescued", "dropped", "dropped_mm3", "filled", "added_mm3")
        return {**found, **{name: getattr(self, name) for name in done}}


def repair(
    mask: np.ndarray,
    grid: Grid,
    rules: VesselRules,
    probability: np.ndarray | None = None,
    faint: np.ndarray | None = None,
) -> Repaired:
    """Fill, bridge, join and drop.

    Args:
        mask: (d, h, w), non-zero is lumen.
        grid: of the mask.
        rules: what to mend and how far.
        probability: (d, h, w) lumen probability; without it `gap_probability` is not asked for.
        faint: (d, h, w) bool, lumen by a threshold alone: pieces beside the mask that the mask's rule left
            out. They come back where a bridge or a joint ties them to it, and nowhere else.

    Raises:
        ValueError: a volume does not lie on the grid.
    """
    for volume in (mask, probability, faint):
        if volume is not None:
            check_on_grid(volume, grid)
    whole = np.asarray(mask) != 0
    if not whole.any():
        return Repaired(whole, Violations(), Violations())
    reach = max(rules.gap_mm, rules.sac_mm) if faint is not None else 0.0
    margin = np.ceil((reach + _FAINT_EXTENT_MM * (reach > 0)) / grid.spacing).astype(int) + 2
    box = tuple(
        slice(max(0, s.start - m), min(n, s.stop + m))
        for s, m, n in zip(bounding_box(whole), margin, whole.shape, strict=True)
    )
    part, inner = whole[box], _cropped(grid, box)
    likely = None if probability is None else probability[box]
    volumes = np.bincount(np.asarray(measure.label(part, connectivity=3)).ravel())[1:] * inner.voxel_mm3
    mended, holes, filled = _filled(part, inner, rules.hole_mm3)
    before = Violations(len(volumes), int((volumes < rules.smallest_mm3).sum()), holes)
    beside = np.zeros_like(part)
    if faint is not None and reach > 0:
        beside = _pieces_beside(np.asarray(faint[box], bool) & ~mended, mended, inner, reach, rules.sac_mm3)
        mended |= beside
    bridges = list(bridges_over(mended, inner, rules, likely)) if rules.gap_mm > 0 else []
    for bridge in bridges:
        mended |= tube(inner, bridge.start, bridge.stop, bridge.radii)
    mended, joined = _with_sacs(mended, inner, rules)
    label = np.asarray(measure.label(mended, connectivity=3))
    sizes = np.bincount(label.ravel()) * inner.voxel_mm3
    own = np.bincount(label[part], minlength=len(sizes)) > 0  # not faint alone
    keep = own & (sizes >= rules.smallest_mm3)
    keep[0] = False
    dropped = own & ~keep
    dropped[0] = False
    mended = keep[label]
    added = float((mended & ~part).sum() * inner.voxel_mm3)
    back = beside & mended
    rescued = int(np.asarray(measure.label(back, connectivity=3)).max()) if back.any() else 0
    bridges = [b for b in bridges if mended[_voxel(inner, (b.start + b.stop) / 2)]]
    mended, holes, again = _filled(mended, inner, rules.hole_mm3)  # a bridge can close a ring of voxels

    result = np.zeros_like(whole)
    result[box] = mended
    return Repaired(
        result,
        replace(before, gaps=len(bridges)),
        Violations(pieces=int(keep.sum()), holes=holes - again),  # crumbs and gaps are gone
        bridged=len(bridges),
        joined=joined,
        dropped=int(dropped.sum()),
        dropped_mm3=float(sizes[dropped].sum()),
        rescued=rescued,
        filled=filled + again,
        added_mm3=added,
    )


def _pieces_beside(
    faint: np.ndarray, mask: np.ndarray, grid: Grid, reach_mm: float, smallest_mm3: float
) -> np.ndarray:
    """The faint pieces of some size of which a voxel lies within reach of the mask."""
    label = np.asarray(measure.label(faint, connectivity=3))
    large = np.bincount(label.ravel()) * grid.voxel_mm3 >= smallest_mm3
    large[0] = False
    voxels = np.argwhere(large[label])
    if not len(voxels):
        return np.zeros_like(faint)
    surface = np.argwhere(mask & ~np.asarray(ndimage.binary_erosion(mask), bool))
    gap, _ = KDTree(grid.to_mm(surface)).query(grid.to_mm(voxels))
    near = np.zeros(len(large), bool)
    near[label[tuple(voxels[gap <= reach_mm + float(grid.spacing.max())].T)]] = True
    return (near & large)[label]


def _voxel(grid: Grid, place_mm: np.ndarray) -> tuple[int, int, int]:
    index = np.clip(np.rint(grid.to_index(place_mm)).astype(int), 0, np.array(grid.shape) - 1)
    return int(index[0]), int(index[1]), int(index[2])


def _cropped(grid: Grid, box: tuple[slice, ...]) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_mm(np.array([s.start for s in box]))
    shape = tuple(s.stop - s.start for s in box)
    return Grid((shape[0], shape[1], shape[2]), affine)


def _filled(mask: np.ndarray, grid: Grid, hole_mm3: float) -> tuple[np.ndarray, int, int]:
    """The mask without small cavities, how many there were of any size, and how many were filled.

    A bay at the rim of the volume is no cavity.
    """
    outside = np.asarray(measure.label(np.pad(~mask, 1, constant_values=True), connectivity=1))
    sizes = np.bincount(outside.ravel()) * grid.voxel_mm3
    small = sizes <= hole_mm3
    small[[0, outside[0, 0, 0]]] = False
    if not small.any():
        return mask.copy(), len(sizes) - 2, 0
    return mask | small[outside][1:-1, 1:-1, 1:-1], len(sizes) - 2, int(small.sum())


def _with_sacs(mask: np.ndarray, grid: Grid, rules: VesselRules) -> tuple[np.ndarray, int]:
    """The mask with small round pieces joined to the vessel beside them, and how many those are."""
    if rules.sac_mm <= 0:
        return mask, 0
    label = np.asarray(measure.label(mask, connectivity=3))
    sizes = np.bincount(label.ravel()) * grid.voxel_mm3
    sizes[0] = 0
    if len(sizes) < 3:
        return mask, 0
    joined = 0
    result = mask.copy()
    for k in np.flatnonzero((sizes >= rules.sac_mm3) & (np.arange(len(sizes)) > 0)):
        voxels = np.argwhere(label == k)
        if sizes[k] == sizes.max() or not _round(voxels, grid, float(sizes[k])):
            continue
        reach = np.ceil(rules.sac_mm / grid.spacing).astype(int) + 1
        low = np.maximum(voxels.min(0) - reach, 0)
        high = np.minimum(voxels.max(0) + reach + 1, grid.shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        larger = np.argwhere((label[box] > 0) & (sizes[label[box]] > sizes[k])) + low
        if not len(larger):
            continue
        own, other = grid.to_mm(voxels), grid.to_mm(larger)
        gaps, nearest = (np.asarray(found) for found in KDTree(other).query(own))
        best = int(gaps.argmin())
        if gaps[best] - float(np.mean(grid.spacing)) > rules.sac_mm:
            continue
        result |= tube(grid, own[best], other[nearest[best]], (0.0, 0.0))
        joined += 1
    return result, joined


def _round(voxels: np.ndarray, grid: Grid, volume_mm3: float) -> bool:
    """Whether a piece is as compact as a sac: its longest extent is below 1.6 times that of a ball."""
    mm = grid.to_mm(voxels)
    spread = mm - mm.mean(0)
    _, axes = np.linalg.eigh(spread.T @ spread)
    extent = float(np.ptp(spread @ axes[:, -1])) + float(np.mean(grid.spacing))
    return extent <= 1.6 * 2 * (3 * volume_mm3 / (4 * np.pi)) ** (1 / 3)
