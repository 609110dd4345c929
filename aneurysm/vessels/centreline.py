"""From skeleton voxels to smooth centreline branches between junctions.

Notation: V skeleton voxels, J junctions (touching junction voxels count as one), B branches, m points of one
branch. World positions are RAS mm.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.csgraph import connected_components

from aneurysm.data.scan import Grid

_FREE = -1  # a branch end that is not at a junction
_SMOOTHING = 2.0  # voxels; unbiased length (a raw chain is 14-22 % too long)
_CURVATURE_SMOOTHING = 3.0  # voxels; sharper curves are voxel noise


@dataclass(frozen=True, eq=False)
class Branch:
    """One smooth line between two ends; a ring without junction has both ends free and `closed`."""

    points: np.ndarray  # (m, 3) RAS mm
    radius: np.ndarray  # (m,) mm, largest inscribed sphere
    curvature: np.ndarray  # (m,) 1/mm
    start: int  # junction of the first point, -1 when free
    end: int  # junction of the last point, -1 when free
    closed: bool = False

    @property
    def arc(self) -> np.ndarray:
        """Distance along the line from its first point, (m,) in mm."""
        return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(self.points, axis=0), axis=1))])

    @property
    def length(self) -> float:
        """In mm."""
        return float(self.arc[-1])


@dataclass(frozen=True, eq=False)
class Centreline:
    """All branches of one vessel mask."""

    branches: tuple[Branch, ...]
    junction: np.ndarray  # (J, 3) RAS mm
    junction_radius: np.ndarray  # (J,) mm
    pruned: np.ndarray  # (Q, 3) RAS mm: where a thin spur was removed
    pruned_reach: np.ndarray  # (Q,) how far the spur stuck out of the junction's sphere, in junction radii


@dataclass
class _Chain:
    """Voxels of a branch in order, with the junctions at both ends."""

    voxels: list[int]
    start: int
    end: int
    closed: bool = False


def trace(skeleton: np.ndarray, distance: np.ndarray, grid: Grid) -> Centreline:
    """Follow the skeleton from junction to junction, drop noise spurs, smooth what is left.

    A spur is noise when it hardly leaves the sphere of its junction and is thin at its tip. A short FAT spur
    is how thinning shows the dome of a sidewall aneurysm, and is kept.

    Args:
        skeleton: (d, h, w) bool, one voxel thick.
        distance: (d, h, w) depth inside the vessel in mm.
        grid: where the voxels lie.
    """
    voxels = np.argwhere(skeleton)
    mm = grid.to_mm(voxels)
    depth = distance[skeleton].astype(float)
    near = _neighbours(skeleton, voxels)
    chains, cluster = _chains(near)
    count = int(cluster.max(initial=-1)) + 1
    member = cluster >= 0
    size = np.maximum(np.bincount(cluster[member], minlength=count), 1)
    position = np.stack(
        [np.bincount(cluster[member], mm[member, k], minlength=count) / size for k in range(3)], axis=-1
    )
    radius = np.zeros(count)
    np.maximum.at(radius, cluster[member], depth[member])
    core = np.zeros(count, int)  # the deepest voxel of a junction stands for it when two branches are joined
    order = np.flatnonzero(member)[np.argsort(depth[member], kind="stable")]
    core[cluster[order]] = order

    linked = {j for chain in chains for j in (chain.start, chain.end)}
    chains += [_Chain([int(core[j])], _FREE, _FREE) for j in range(count) if j not in linked]

    pruned: list[tuple[int, float]] = []
    while True:
        noise = _noise(chains, mm, depth, position, radius, float(grid.spacing.min()))
        pruned += [(max(chains[i].start, chains[i].end), reach) for i, reach in noise.items()]
        chains = _join([chain for i, chain in enumerate(chains) if i not in noise], core)
        if not noise:
            break
    used = sorted({j for chain in chains for j in (chain.start, chain.end) if j != _FREE})
    renamed = {old: new for new, old in enumerate(used)} | {_FREE: _FREE}
    branches = tuple(
        _smooth(chain, mm, depth, position, radius, renamed[chain.start], renamed[chain.end])
        for chain in chains
    )
    return Centreline(
        branches=branches,
        junction=position[used].reshape(-1, 3),
        junction_radius=radius[used],
        pruned=position[[j for j, _ in pruned]].reshape(-1, 3),
        pruned_reach=np.array([reach for _, reach in pruned], float),
    )


def _neighbours(skeleton: np.ndarray, voxels: np.ndarray) -> list[list[int]]:
    """Indices of the 26-neighbours of every skeleton voxel."""
    number = np.full(np.array(skeleton.shape) + 2, -1, np.int64)
    number[tuple((voxels + 1).T)] = np.arange(len(voxels))
    steps = np.argwhere(np.ones((3, 3, 3))) - 1
    steps = steps[np.any(steps != 0, axis=1)]
    found = number[tuple(np.moveaxis(voxels[:, None] + 1 + steps, -1, 0))]  # (V, 26)
    return [row[row >= 0].tolist() for row in found]


def _chains(near: list[list[int]]) -> tuple[list[_Chain], np.ndarray]:
    """Split the voxels at those with three or more neighbours; also the junction of each voxel, or -1."""
    total = len(near)
    crossing = np.array([len(n) > 2 for n in near], bool)
    pairs = [(i, j) for i in np.flatnonzero(crossing) for j in near[i] if crossing[j]]
    rows, columns = np.array(pairs, int).reshape(-1, 2).T
    touching = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(total, total))
    cluster = np.full(total, -1)
    if crossing.any():
        _, piece = connected_components(touching, directed=False)
        cluster[crossing] = np.unique(piece[crossing], return_inverse=True)[1]

    seen = crossing.copy()

    def walk(first: int) -> list[int]:
        line = [first]
        seen[first] = True
        while True:
            following = [j for j in near[line[-1]] if not seen[j]]
            if not following:
                return line
            line.append(following[0])
            seen[following[0]] = True

    def junctions(voxel: int) -> list[int]:
        return [int(cluster[j]) for j in near[voxel] if crossing[j]]

    chains = []
    plain = np.flatnonzero(~crossing)
    tips = [i for i in plain if len(near[i]) < 2 or any(crossing[j] for j in near[i])]
    for first in [*tips, *plain]:  # what is left after the tips are rings
        if seen[first]:
            continue
        line = walk(int(first))
        ends = [junctions(line[0]), junctions(line[-1])]
        if len(line) == 1:
            pair = [*ends[0], _FREE, _FREE][:2]
            chains.append(_Chain(line, pair[0], pair[1]))
        else:
            closed = not ends[0] and not ends[1] and len(line) > 3 and line[0] in near[line[-1]]
            chains.append(_Chain(line, [*ends[0], _FREE][0], [*ends[1], _FREE][0], closed))
    return chains, cluster


def _noise(
    chains: list[_Chain],
    mm: np.ndarray,
    depth: np.ndarray,
    position: np.ndarray,
    radius: np.ndarray,
    voxel_mm: float,
) -> dict[int, float]:
    """Chains to drop, with how far each reaches beyond its junction's sphere in junction radii."""
    noise: dict[int, float] = {}
    lengths: dict[tuple[int, int], tuple[int, float]] = {}
    for i, chain in enumerate(chains):
        if chain.start == _FREE and chain.end == _FREE:
            continue
        points = mm[chain.voxels]
        if chain.start != _FREE and chain.end != _FREE:
            length = float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum()) + 2 * voxel_mm
            if length > 2 * max(radius[chain.start], radius[chain.end]):
                continue
            if chain.start == chain.end:  # a loop inside the junction's own sphere
                noise[i] = 0.0
                continue
            key = (min(chain.start, chain.end), max(chain.start, chain.end))
            rival = lengths.setdefault(key, (i, length))
            if rival[0] != i:  # two ways round a pinhole: keep the shorter
                longer = i if length >= rival[1] else rival[0]
                noise[longer] = 0.0
                lengths[key] = rival if longer == i else (i, length)
            continue
        junction = max(chain.start, chain.end)
        tip = chain.voxels[-1] if chain.start != _FREE else chain.voxels[0]
        reach = float(np.linalg.norm(mm[tip] - position[junction]))
        fat = depth[tip] >= max(0.55 * radius[junction], 1.9 * voxel_mm)
        if reach < radius[junction] + 1.0 and not fat:
            noise[i] = (reach + depth[tip] - radius[junction]) / radius[junction]
    meeting: dict[int, list[int]] = {}
    for i, chain in enumerate(chains):
        for j in {chain.start, chain.end} - {_FREE}:
            meeting.setdefault(j, []).append(i)
    for members in meeting.values():
        if all(i in noise for i in members):  # a blob: something must stay
            del noise[max(members, key=lambda i: noise[i])]
    return noise


def _join(chains: list[_Chain], core: np.ndarray) -> list[_Chain]:
    """Make one chain of two that meet at a junction where nothing else meets."""
    chains = list(chains)
    meeting: dict[int, list[int]] = {}
    for i, chain in enumerate(chains):
        for j in (chain.start, chain.end):
            if j != _FREE:
                meeting.setdefault(j, []).append(i)
    gone: set[int] = set()
    for junction, members in meeting.items():
        middle = int(core[junction])
        if len(members) == 1:  # the other branches were noise: the junction is a free end
            chain = chains[members[0]]
            if chain.start == junction:
                chain.voxels, chain.start = [middle, *chain.voxels], _FREE
            else:
                chain.voxels, chain.end = [*chain.voxels, middle], _FREE
        elif len(members) == 2 and members[0] == members[1]:
            chain = chains[members[0]]
            chain.voxels, chain.start, chain.end = [middle, *chain.voxels], _FREE, _FREE
            chain.closed = len(chain.voxels) > 3
        elif len(members) == 2:
            first, second = chains[members[0]], chains[members[1]]
            if first.end != junction:
                first.voxels, first.start, first.end = first.voxels[::-1], first.end, first.start
            if second.start != junction:
                second.voxels, second.start, second.end = second.voxels[::-1], second.end, second.start
            first.voxels = [*first.voxels, middle, *second.voxels]
            first.end = second.end
            gone.add(members[1])
            if second.end != _FREE:
                others = meeting[second.end]
                others[others.index(members[1])] = members[0]
    return [chain for i, chain in enumerate(chains) if i not in gone]


def _smooth(
    chain: _Chain,
    mm: np.ndarray,
    depth: np.ndarray,
    position: np.ndarray,
    radius: np.ndarray,
    start: int,
    end: int,
) -> Branch:
    """Gaussian smoothing along the line with fixed ends; curvature from a smoother copy."""
    points, widths = mm[chain.voxels], depth[chain.voxels]
    if chain.start != _FREE:
        points = np.concatenate([position[chain.start : chain.start + 1], points])
        widths = np.concatenate([radius[chain.start : chain.start + 1], widths])
    if chain.end != _FREE:
        points = np.concatenate([points, position[chain.end : chain.end + 1]])
        widths = np.concatenate([widths, radius[chain.end : chain.end + 1]])
    line = smooth_line(points, _SMOOTHING, chain.closed)
    curve = smooth_line(points, _CURVATURE_SMOOTHING, chain.closed)
    if chain.closed:
        line = np.concatenate([line, line[:1]])
        curve = np.concatenate([curve, curve[:1]])
        widths = np.concatenate([widths, widths[:1]])
    return Branch(line, widths, _curvature(curve), start, end, chain.closed)


def smooth_line(points: np.ndarray, sigma: float, closed: bool) -> np.ndarray:
    """Gaussian smoothing of (m, 3) points; an open line keeps its ends by odd reflection about them."""
    if len(points) < 3:
        return points
    if closed:
        return ndimage.gaussian_filter1d(points, sigma, axis=0, mode="wrap")
    reach = min(int(3 * sigma) + 1, len(points) - 1)
    before = 2 * points[0] - points[reach:0:-1]
    after = 2 * points[-1] - points[-2 : -2 - reach : -1]
    longer = np.concatenate([before, points, after])
    return ndimage.gaussian_filter1d(longer, sigma, axis=0, mode="nearest")[reach : reach + len(points)]


def _curvature(points: np.ndarray) -> np.ndarray:
    """|p' x p''| / |p'|^3 by central differences, 0 on lines too short for it."""
    if len(points) < 5:
        return np.zeros(len(points))
    first = np.gradient(points, axis=0)
    second = np.gradient(first, axis=0)
    speed = np.maximum(np.linalg.norm(first, axis=1), 1e-6)
    bend = np.linalg.norm(np.cross(first, second), axis=1) / speed**3
    bend[:2], bend[-2:] = bend[2], bend[-3]  # one-sided differences at the ends are unreliable
    return bend
