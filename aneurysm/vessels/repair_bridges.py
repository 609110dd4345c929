"""Bridges over gaps in a lumen mask: where they may stand, which are built, and the voxels they fill."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid
from aneurysm.vessels.centreline import Branch, trace
from aneurysm.vessels.depth import depth
from aneurysm.vessels.pieces import pieces
from aneurysm.vessels.skeleton import thin
from aneurysm.vessels.voxels import Voxels

_LOOK_BACK_MM = 4.0  # of the centreline, over which the direction of an end is taken
_STEEPER_DEG = 10.0  # by how much a flank must be met more steeply than the end may be off its direction


@dataclass(frozen=True)
class VesselRules:
    """What a lumen mask has to keep to before it becomes a graph; 0 turns a rule off.

    smallest_mm3: smaller pieces are dropped, unless they were bridged or joined.
    hole_mm3: cavities up to this volume are filled; one would turn the skeleton around it into a shell.
    gap_mm: longest way through background that is bridged.
    gap_angle_deg: how far a bridge may be off the direction of a vessel's end; below 40.
    gap_probability: lowest lumen probability along a bridge.
    sac_mm: how far from a vessel a round piece may lie to be joined to it.
    sac_mm3: smallest such piece; a speck of noise is round as well.
    """

    smallest_mm3: float = 20.0
    hole_mm3: float = 10.0
    gap_mm: float = 5.0
    gap_angle_deg: float = 35.0
    gap_probability: float = 0.02
    sac_mm: float = 1.5
    sac_mm3: float = 6.0

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0:
            raise ValueError(f"The rules for vessels are no negative numbers, got {self}.")
        if self.gap_angle_deg >= 40:
            raise ValueError(
                f"gap_angle_deg is {self.gap_angle_deg} and must stay below 40, or parallel vessels would be "
                "joined."
            )


@dataclass(frozen=True, eq=False)
class Bridge:
    """A tube through background from the end of a vessel."""

    start: np.ndarray  # (3,) RAS mm
    stop: np.ndarray
    radii: tuple[float, float]  # mm, at both ends
    gap_mm: float  # of it in background
    end: int  # number of the free end that it starts from
    other: int  # number of the free end that it reaches, -1 for the flank of a vessel


def bridges_over(
    voxels: Voxels, grid: Grid, rules: VesselRules, probability: np.ndarray | None
) -> Iterator[Bridge]:
    """The bridges to build, the surest first; every end is used once, and nothing is joined twice."""
    deep = depth(voxels, grid.spacing)
    voxel = float(np.mean(grid.spacing))
    line = trace(voxels, deep, thin(voxels, deep, float(grid.spacing.min())), grid)
    ends = [(i, end) for i, branch in enumerate(line.branches) for end in _free_ends(branch)]
    if not ends:
        return
    count, label = pieces(voxels)
    piece_of = [_piece(voxels, label, grid, branch.points) for branch in line.branches]
    points = np.concatenate([branch.points for branch in line.branches])
    tangent = np.concatenate([_tangents(branch.points) for branch in line.branches])
    piece = np.concatenate([np.full(len(b.points), k) for b, k in zip(line.branches, piece_of, strict=True)])
    # Depth is measured to the middle of the first voxel outside, from a voxel near the axis.
    radius = np.maximum(np.concatenate([b.radius for b in line.branches]) - voxel / 4, voxel / 2)
    base, outward = np.array([e.base for _, e in ends]), np.array([e.outward for _, e in ends])
    width = np.maximum(np.array([e.depth for _, e in ends]) - voxel / 4, voxel / 2)
    home = [piece_of[i] for i, _ in ends]
    cosine = np.cos(np.radians(rules.gap_angle_deg))
    flattest = np.cos(np.radians(rules.gap_angle_deg + _STEEPER_DEG))
    found: list[Bridge] = []
    base_tree, line_tree = KDTree(base), KDTree(points)
    # Centrelines stop short of the surface, the more so the thicker the vessel and the more slanting the cut.
    reach = rules.gap_mm + 3 * width + 4 * voxel
    for e in range(len(ends)):
        for other in base_tree.query_ball_point(base[e], reach[e] + 3 * float(width.max()) + 4 * voxel):
            way = base[other] - base[e]
            length = float(np.linalg.norm(way))
            if other <= e or length < 1e-6 or not 0.4 <= width[e] / width[other] <= 2.5:
                continue
            if min(outward[e] @ way, -(outward[other] @ way)) >= cosine * length:
                radii = (float(width[e]), float(width[other]))
                found.append(Bridge(base[e], base[other], radii, 0.0, e, other))
        near = np.array(line_tree.query_ball_point(base[e], reach[e] + float(radius.max())), int)
        near = near[(piece[near] != home[e]) & (width[e] <= 1.25 * radius[near])]
        way = points[near] - base[e]
        length = np.linalg.norm(way, axis=1)
        ahead = way @ outward[e] >= cosine * length
        steep = np.abs((tangent[near] * way).sum(1)) <= flattest * length
        for at in near[ahead & steep & (length > 1e-6)]:
            found.append(Bridge(base[e], points[at], (float(width[e]), float(width[e])), 0.0, e, -1))
    measured = []
    for bridge in found:
        gap, lowest = _background(voxels, grid, bridge, probability)
        if 0 < gap <= rules.gap_mm and (lowest is None or lowest >= rules.gap_probability):
            measured.append(replace(bridge, gap_mm=gap))
    used: set[int] = set()
    parent = list(range(count))

    def root(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    # Ends that face each other first: they tell more than an end and a flank.
    ordered = sorted(measured, key=lambda b: (b.other < 0, b.gap_mm, float(np.linalg.norm(b.stop - b.start))))
    for bridge in ordered:
        if bridge.end in used or bridge.other in used:
            continue
        first = root(int(home[bridge.end]))
        second = root(_piece(voxels, label, grid, bridge.stop[None]))
        # Two ends that face each other may belong to one piece: a ring that was cut.
        if first == second and bridge.other < 0:
            continue
        parent[first] = second
        used |= {bridge.end} | ({bridge.other} - {-1})
        yield bridge


@dataclass(frozen=True, eq=False)
class _End:
    """Where a vessel stops."""

    base: np.ndarray  # (3,) RAS mm, on the axis of the vessel, about its radius before the end
    outward: np.ndarray  # (3,) unit
    depth: float  # mm, of the centreline there


def _free_ends(branch: Branch) -> list[_End]:
    """The ends of a branch at which no other begins.

    The last millimetres of a centreline bend into a corner where a vessel was cut at a slant, so they are
    left out as far as the vessel is wide. A round piece has no direction, whatever line runs through it.
    """
    if branch.closed or len(branch.points) < 3 or branch.length < 2 * float(np.median(branch.radius)):
        return []
    ends = []
    for free, points, radius in (
        (branch.start < 0, branch.points, branch.radius),
        (branch.end < 0, branch.points[::-1], branch.radius[::-1]),
    ):
        if not free:
            continue
        arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        base = int(np.searchsorted(arc, min(float(np.median(radius[arc <= 2 * _LOOK_BACK_MM])), arc[-1] / 3)))
        back = min(int(np.searchsorted(arc, arc[base] + _LOOK_BACK_MM)), len(points) - 1)
        way = points[base] - points[back]
        length = float(np.linalg.norm(way))
        if length > 1e-6:
            ends.append(_End(points[base], way / length, float(np.median(radius[base : back + 1]))))
    return ends


def _tangents(points: np.ndarray) -> np.ndarray:
    """Unit directions along a line (m, 3); arbitrary for a single point."""
    if len(points) < 2:
        return np.tile([1.0, 0.0, 0.0], (len(points), 1))
    steps = np.gradient(points, axis=0)
    return steps / np.maximum(np.linalg.norm(steps, axis=1, keepdims=True), 1e-9)


def _piece(voxels: Voxels, label: np.ndarray, grid: Grid, points: np.ndarray) -> int:
    """The piece that most points of a line lie in; smoothing may move some out of it."""
    found = np.append(label, -1)[voxels.find(_nearest_index(grid, points))]
    if (found < 0).all():
        gap = np.linalg.norm(grid.to_mm(voxels.index) - points[0], axis=1)
        return int(label[gap.argmin()])
    return int(np.bincount(found[found >= 0]).argmax())


def _background(
    voxels: Voxels, grid: Grid, bridge: Bridge, probability: np.ndarray | None
) -> tuple[float, float | None]:
    """How much of a bridge lies in background, in mm, and the lowest probability there."""
    length = float(np.linalg.norm(bridge.stop - bridge.start))
    steps = max(2, int(np.ceil(length / (0.25 * float(grid.spacing.min())))))
    share = (np.arange(steps) + 0.5) / steps
    path = bridge.start + share[:, None] * (bridge.stop - bridge.start)
    outside = voxels.find(_nearest_index(grid, path)) == len(voxels)
    if not outside.any() or probability is None:
        return float(outside.mean() * length), None
    index = grid.to_index(path[outside])
    low = np.clip(np.floor(index.min(0)).astype(int), 0, np.array(grid.shape) - 1)
    high = np.maximum(np.minimum(np.ceil(index.max(0)).astype(int) + 1, grid.shape), low + 1)
    near = probability[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].astype(np.float32)
    along = ndimage.map_coordinates(near, (index - low).T, order=1, mode="nearest")
    return float(outside.mean() * length), float(along.min())


def _nearest_index(grid: Grid, mm: np.ndarray) -> np.ndarray:
    """Index of the voxel nearest to points (m, 3), within the volume."""
    return np.clip(np.rint(grid.to_index(mm)).astype(int), 0, np.array(grid.shape) - 1)


def tube(grid: Grid, start: np.ndarray, stop: np.ndarray, radii: tuple[float, float]) -> Voxels:
    """Voxels within a tube whose radius goes evenly from one end to the other, at least one voxel wide."""
    thinnest = 0.87 * float(grid.spacing.max())  # half the diagonal of a voxel: the tube stays in one piece
    wide = max(*radii, thinnest)
    corners = grid.to_index(np.stack([start, stop]))
    reach = wide / grid.spacing + 1
    low = np.maximum(np.floor(corners.min(0) - reach), 0).astype(int)
    high = np.minimum(np.ceil(corners.max(0) + reach) + 1, grid.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    index = np.moveaxis(np.mgrid[box], 0, -1).reshape(-1, 3)
    mm = grid.to_mm(index)
    way = stop - start
    along = np.clip((mm - start) @ way / max(float(way @ way), 1e-9), 0, 1)
    gap = np.linalg.norm(mm - start - along[:, None] * way, axis=1)
    return Voxels.at_index(
        grid.shape, index[gap <= np.maximum(radii[0] + (radii[1] - radii[0]) * along, thinnest)]
    )
