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
from functools import cached_property

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid
from aneurysm.vessels.pieces import filled, pieces
from aneurysm.vessels.repair_bridges import VesselRules, bridges_over, tube
from aneurysm.vessels.voxels import Voxels, check_on_grid

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

    voxels: Voxels  # of the mended mask
    before: Violations
    after: Violations
    bridged: int = 0
    joined: int = 0  # round pieces, as sacs
    rescued: int = 0  # faint pieces that came back, bridged or joined
    dropped: int = 0
    dropped_mm3: float = 0.0
    filled: int = 0
    added_mm3: float = field(default=0.0)  # by bridges, joints and filling

    @cached_property
    def mask(self) -> np.ndarray:
        """The mended mask, (d, h, w) bool."""
        return self.voxels.to_volume()

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
    mask: np.ndarray | Voxels,
    grid: Grid,
    rules: VesselRules,
    probability: np.ndarray | None = None,
    faint: np.ndarray | None = None,
) -> Repaired:
    """Fill, bridge, join and drop, all on the list of voxels: what is no vessel costs nothing.

    Args:
        mask: (d, h, w), non-zero is lumen, or its voxels.
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
    found = mask if isinstance(mask, Voxels) else Voxels.of(mask)
    if not len(found):
        return Repaired(found, Violations(), Violations())
    largest = int(rules.hole_mm3 / grid.voxel_mm3 + 1e-6)  # voxels of a cavity that is filled
    volumes = _volumes(found, grid)[0]
    mended, holes, closed = filled(found, largest)
    before = Violations(len(volumes), int((volumes < rules.smallest_mm3).sum()), holes)
    reach = max(rules.gap_mm, rules.sac_mm)
    beside = found.only(np.zeros(len(found), bool))
    if faint is not None and reach > 0:
        beside = _pieces_beside(mended, Voxels.of(faint), grid, reach, rules.sac_mm3)
        mended = mended.plus(beside)
    bridges = list(bridges_over(mended, grid, rules, probability)) if rules.gap_mm > 0 else []
    for bridge in bridges:
        mended = mended.plus(tube(grid, bridge.start, bridge.stop, bridge.radii))
    mended, joined = _with_sacs(mended, grid, rules)
    sizes, piece = _volumes(mended, grid)
    own = np.bincount(piece[mended.among(found)], minlength=len(sizes)) > 0  # not faint alone
    keep = own & (sizes >= rules.smallest_mm3)
    dropped = own & ~keep
    mended = mended.only(keep[piece])
    added = float((~mended.among(found)).sum() * grid.voxel_mm3)
    rescued = pieces(beside.only(beside.among(mended)))[0]
    middles = np.array([(b.start + b.stop) / 2 for b in bridges]).reshape(-1, 3)
    built = int((mended.find(np.rint(grid.to_index(middles))) < len(mended)).sum())
    mended, holes, again = filled(mended, largest)  # a bridge can close a ring of voxels
    return Repaired(
        mended,
        replace(before, gaps=built),
        Violations(pieces=int(keep.sum()), holes=holes - again),  # crumbs and gaps are gone
        bridged=built,
        joined=joined,
        dropped=int(dropped.sum()),
        dropped_mm3=float(sizes[dropped].sum()),
        rescued=rescued,
        filled=closed + again,
        added_mm3=added,
    )


def _volumes(voxels: Voxels, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The volume of every piece in mm^3, and the piece of every voxel."""
    count, piece = pieces(voxels)
    return np.bincount(piece, minlength=count) * grid.voxel_mm3, piece


def _pieces_beside(mask: Voxels, faint: Voxels, grid: Grid, reach_mm: float, smallest_mm3: float) -> Voxels:
    """The faint pieces of some size that come within reach of the mask."""
    margin = np.ceil((reach_mm + _FAINT_EXTENT_MM) / grid.spacing).astype(int) + 2
    low, high = mask.index.min(0) - margin, mask.index.max(0) + margin
    faint = faint.only(((faint.index >= low) & (faint.index <= high)).all(1)).minus(mask)
    sizes, piece = _volumes(faint, grid)
    large = sizes >= smallest_mm3
    if not large.any():
        return faint.only(np.zeros(len(faint), bool))
    candidate = large[piece]
    near = reach_mm + float(grid.spacing.max())
    tree = KDTree(grid.to_mm(mask.index), balanced_tree=False, compact_nodes=False)
    gap, _ = tree.query(grid.to_mm(faint.index[candidate]), distance_upper_bound=near)
    tied = np.zeros(len(sizes), bool)
    tied[piece[candidate][np.isfinite(gap)]] = True
    return faint.only(tied[piece])


def _with_sacs(voxels: Voxels, grid: Grid, rules: VesselRules) -> tuple[Voxels, int]:
    """The mask with small round pieces joined to the vessel beside them, and how many those are."""
    if rules.sac_mm <= 0:
        return voxels, 0
    sizes, piece = _volumes(voxels, grid)
    if len(sizes) < 2:
        return voxels, 0
    joined = 0
    result = voxels
    size_here = sizes[piece]
    for k in np.flatnonzero((sizes >= rules.sac_mm3) & (sizes < sizes.max())):
        index = voxels.index[piece == k]
        if not _round(index, grid, float(sizes[k])):
            continue
        margin = np.ceil(rules.sac_mm / grid.spacing).astype(int) + 1
        inside = ((voxels.index >= index.min(0) - margin) & (voxels.index <= index.max(0) + margin)).all(1)
        larger = voxels.index[inside & (size_here > sizes[k])]
        if not len(larger):
            continue
        own, other = grid.to_mm(index), grid.to_mm(larger)
        gaps, nearest = (np.asarray(found) for found in KDTree(other).query(own))
        best = int(gaps.argmin())
        if gaps[best] - float(np.mean(grid.spacing)) > rules.sac_mm:
            continue
        result = result.plus(tube(grid, own[best], other[nearest[best]], (0.0, 0.0)))
        joined += 1
    return result, joined


def _round(index: np.ndarray, grid: Grid, volume_mm3: float) -> bool:
    """Whether voxels (n, 3) are as compact as a sac: at most 1.6 times as long as a ball of their volume."""
    mm = grid.to_mm(index)
    spread = mm - mm.mean(0)
    _, axes = np.linalg.eigh(spread.T @ spread)
    extent = float(np.ptp(spread @ axes[:, -1])) + float(np.mean(grid.spacing))
    return extent <= 1.6 * 2 * (3 * volume_mm3 / (4 * np.pi)) ** (1 / 3)
