"""From skeleton voxels to chains between junctions, without the noise of thinning.

Notation: V skeleton voxels, J junctions (touching crossing voxels count as one), chains of voxels in order.
Two voxels whose cubes meet are neighbours; the skeleton is thin, so away from junctions it has no choice of
way, and to contract a junction changes pieces and rings only where its own voxels enclose a hole, which is
counted (`Chains.loops`).
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from aneurysm.vessels.voxels import Voxels

FREE = -1  # a chain end that is not at a junction
_BRIDGE = 1.6  # junctions closer than so many radii are one: a crossing, not two bifurcations
_OUT_MM = 1.0  # a thin spur that sticks out of its junction's sphere by less is roughness


@dataclass
class Chain:
    """Voxels of a branch in order, with the junctions at both ends."""

    voxels: list[int]
    start: int
    end: int
    closed: bool = False  # a ring without junction


@dataclass(eq=False)
class Chains:
    """All chains of a skeleton; pruning and joining change it in place."""

    mm: np.ndarray  # (V, 3) RAS mm
    depth: np.ndarray  # (V,) mm
    chains: list[Chain]
    position: np.ndarray  # (J, 3) RAS mm
    radius: np.ndarray  # (J,) mm, largest depth of the junction's voxels
    core: np.ndarray  # (J,) the deepest voxel of a junction
    pruned: list[tuple[int, float]] = field(default_factory=list)  # junction and reach of dropped spurs
    loops: list[np.ndarray] = field(default_factory=list)  # RAS mm (3,): pinholes that are no ring any more


def chains_of(skeleton: Voxels, mm: np.ndarray, depth: np.ndarray) -> Chains:
    """Split a skeleton at its crossings: voxels with three or more neighbours."""
    total, near = len(skeleton), skeleton.neighbours
    crossing = (near < total).sum(1) > 2
    cluster = np.full(total + 1, FREE)
    places = np.flatnonzero(crossing)
    rows, columns = np.nonzero(np.append(crossing, False)[near[places]])
    joined = sparse.coo_matrix(
        (np.ones(len(rows), np.int8), (places[rows], near[places[rows], columns])), shape=(total, total)
    )
    piece = connected_components(joined, directed=False)[1] if len(places) else np.zeros(total, int)
    first, member = np.unique(piece[places], return_inverse=True)
    cluster[places] = member
    count = len(first)

    size = np.maximum(np.bincount(member, minlength=count), 1)
    position = np.stack([np.bincount(member, mm[places, k], count) / size for k in range(3)], axis=-1)
    radius = np.zeros(count)
    np.maximum.at(radius, member, depth[places])
    core = np.zeros(count, int)  # stands for the junction when two branches are joined
    order = places[np.argsort(depth[places], kind="stable")]
    core[cluster[order]] = order

    found = Chains(mm, depth, _walks(near, crossing, cluster), position, radius, core)
    linked = {j for chain in found.chains for j in (chain.start, chain.end)}
    found.chains += [Chain([int(core[j])], FREE, FREE) for j in range(count) if j not in linked]
    for junction, many in enumerate(_holes(skeleton.only(crossing), member, count)):
        found.loops += [position[junction]] * int(many)
    return found


def _walks(near: np.ndarray, crossing: np.ndarray, cluster: np.ndarray) -> list[Chain]:
    total = len(near)
    beside = np.sort(near, axis=1)[:, :2]  # all there are, of a voxel that is no crossing
    plain = np.flatnonzero(~crossing)
    inner = np.append(~crossing, False)
    ways: list[list[int]] = [[] for _ in range(total)]
    ends: list[list[int]] = [[] for _ in range(total)]
    for i, two in zip(plain.tolist(), beside[plain].tolist(), strict=True):
        ways[i] = [j for j in two if inner[j]]
        ends[i] = [int(cluster[j]) for j in two if cluster[j] != FREE]
    seen = crossing.tolist()
    tips = [i for i in plain.tolist() if len(ways[i]) < 2]
    chains = []
    for tip in [*tips, *plain.tolist()]:  # what is left after the tips are rings
        if seen[tip]:
            continue
        line, at = [tip], tip
        seen[tip] = True
        while True:
            following = [j for j in ways[at] if not seen[j]]
            if not following:
                break
            at = following[0]
            seen[at] = True
            line.append(at)
        if len(line) == 1:
            start, end = [*ends[tip], FREE, FREE][:2]
        else:
            start, end = [*ends[tip], FREE][0], [*ends[at], FREE][0]
        chains.append(Chain(line, start, end, len(line) > 2 and tip in ways[at]))
    return chains


def _holes(crossing: Voxels, junction: np.ndarray, count: int) -> np.ndarray:
    """How many rings the voxels of each junction form among themselves, (J,)."""
    offsets = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    cells = (2 * crossing.index[:, None].astype(np.int64) + 2 + offsets).reshape(-1, 3)
    size = 2 * np.array(crossing.shape) + 4
    key = np.ravel_multi_index(tuple(cells.T), tuple(size))
    _, at = np.unique(key, return_index=True)
    # An even coordinate is the middle of a voxel: a corner has none, an edge one, a face two, a cube three.
    sign = 2 * ((cells[at] & 1).sum(1) & 1) - 1
    euler = np.bincount(junction[at // 27], sign, count)
    return np.maximum(1 - np.rint(euler).astype(int), 0)


def tidy(net: Chains, voxel_mm: float) -> None:
    """Drop spurs and pinholes that are noise, join what then meets in twos, merge split crossings."""
    while True:
        noise = _noise(net, voxel_mm)
        for i, reach in noise.items():
            chain = net.chains[i]
            if FREE in (chain.start, chain.end):
                net.pruned.append((max(chain.start, chain.end), reach))
            else:
                net.loops.append(net.mm[chain.voxels].mean(0))
        net.chains = [chain for i, chain in enumerate(net.chains) if i not in noise]
        _join(net)
        if not noise and not _merge(net):
            return


def _noise(net: Chains, voxel_mm: float) -> dict[int, float]:
    """Chains to drop, with how far each spur sticks out of its junction's sphere in junction radii."""
    noise: dict[int, float] = {}
    shortest: dict[tuple[int, int], tuple[int, float]] = {}
    radius, position, depth = net.radius, net.position, net.depth
    for i, chain in enumerate(net.chains):
        if chain.start == FREE and chain.end == FREE:
            continue
        if chain.start != FREE and chain.end != FREE:
            length = _length(net, chain)
            if length > 2 * max(radius[chain.start], radius[chain.end]) + 2 * voxel_mm:
                continue
            if chain.start == chain.end:  # a loop inside the junction's own sphere
                noise[i] = 0.0
                continue
            key = (min(chain.start, chain.end), max(chain.start, chain.end))
            rival = shortest.setdefault(key, (i, length))
            if rival[0] != i:  # two ways round a pinhole: keep the shorter
                longer = i if length >= rival[1] else rival[0]
                noise[longer] = 0.0
                shortest[key] = rival if longer == i else (i, length)
            continue
        junction = max(chain.start, chain.end)
        tip = chain.voxels[-1] if chain.start != FREE else chain.voxels[0]
        reach = float(np.linalg.norm(net.mm[tip] - position[junction]))
        # Not so the corner of a thick elbow: its spheres stay within the junction's.
        out = reach + depth[tip] - radius[junction]
        fat = depth[tip] >= max(0.55 * radius[junction], 1.9 * voxel_mm) and out >= 0.3 * depth[tip]
        if reach < radius[junction] + _OUT_MM and not fat:
            noise[i] = out / radius[junction]
    for members in _meeting(net.chains).values():
        if all(i in noise for i in members):  # a blob: something must stay
            del noise[max(members, key=lambda i: noise[i])]
    return noise


def _length(net: Chains, chain: Chain) -> float:
    points = net.mm[chain.voxels]
    ends = [net.position[[chain.start]]] if chain.start != FREE else []
    points = np.concatenate([*ends, points, net.position[[chain.end]]])
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def _meeting(chains: list[Chain]) -> dict[int, list[int]]:
    """Chains at every junction, twice where both ends are there."""
    meeting: dict[int, list[int]] = {}
    for i, chain in enumerate(chains):
        for j in (chain.start, chain.end):
            if j != FREE:
                meeting.setdefault(j, []).append(i)
    return meeting


def _merge(net: Chains) -> bool:
    """Make one junction of the two that lie closest together inside one sphere; whether there were such."""
    changed = False
    while True:
        ends = np.array([(chain.start, chain.end) for chain in net.chains], int).reshape(-1, 2)
        inner = _BRIDGE * net.radius[ends].max(1, initial=0) if len(net.radius) else np.zeros(len(ends))
        between = (ends != FREE).all(1) & (ends[:, 0] != ends[:, 1])
        gap = np.full(len(ends), np.inf)
        gap[between] = np.linalg.norm(np.diff(net.position[ends[between]], axis=1)[:, 0], axis=1)
        close = [i for i in np.argsort(gap, kind="stable") if gap[i] < inner[i]]
        bridge = next((i for i in close if _length(net, net.chains[i]) < 1.5 * inner[i]), None)
        if bridge is None:
            return changed
        changed = True
        gone = net.chains.pop(bridge)
        keep, drop = gone.start, gone.end
        net.position[keep] = (net.position[keep] + net.position[drop]) / 2
        if net.radius[drop] > net.radius[keep]:
            net.radius[keep], net.core[keep] = net.radius[drop], net.core[drop]
        net.pruned = [(keep if j == drop else j, reach) for j, reach in net.pruned]
        for chain in net.chains:
            chain.start = keep if chain.start == drop else chain.start
            chain.end = keep if chain.end == drop else chain.end


def _join(net: Chains) -> None:
    """Make one chain of two that meet at a junction where nothing else meets."""
    chains = net.chains
    meeting = _meeting(chains)
    gone: set[int] = set()
    for junction, members in meeting.items():
        middle = int(net.core[junction])
        if len(members) == 1:  # the other branches were noise: the junction is a free end
            chain = chains[members[0]]
            if chain.start == junction:
                chain.voxels, chain.start = [middle, *chain.voxels], FREE
            else:
                chain.voxels, chain.end = [*chain.voxels, middle], FREE
        elif len(members) == 2 and members[0] == members[1]:
            chain = chains[members[0]]
            chain.voxels, chain.start, chain.end = [middle, *chain.voxels], FREE, FREE
            chain.closed = len(chain.voxels) > 3
            if not chain.closed:
                net.loops.append(net.position[junction])
        elif len(members) == 2:
            first, second = chains[members[0]], chains[members[1]]
            if first.end != junction:
                first.voxels, first.start, first.end = first.voxels[::-1], first.end, first.start
            if second.start != junction:
                second.voxels, second.start, second.end = second.voxels[::-1], second.end, second.start
            first.voxels = [*first.voxels, middle, *second.voxels]
            first.end = second.end
            gone.add(members[1])
            if second.end != FREE:
                others = meeting[second.end]
                others[others.index(members[1])] = members[0]
    net.chains = [chain for i, chain in enumerate(chains) if i not in gone]
