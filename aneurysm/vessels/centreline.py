"""From skeleton voxels to smooth centreline branches between junctions.

Notation: V skeleton voxels, J junctions (touching junction voxels count as one), B branches, m points of one
branch. World positions are RAS mm.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from aneurysm.data.scan import Grid
from aneurysm.vessels.chains import FREE, Chains, chains_of, tidy
from aneurysm.vessels.depth import Wall
from aneurysm.vessels.voxels import Voxels

_SMOOTHING = 1.5  # voxels; unbiased length (a raw chain is 14-22 % too long)
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
    pinholes: np.ndarray  # (H, 3) RAS mm: rings of the mask that are none here, they fit into a junction


def trace(voxels: Voxels, depth: np.ndarray, skeleton: np.ndarray, grid: Grid) -> Centreline:
    """Follow the skeleton from junction to junction, drop noise spurs, smooth what is left.

    A spur is noise when it hardly leaves the sphere of its junction and is thin at its tip. A short FAT spur
    is how thinning shows the dome of a sidewall aneurysm, and is kept.

    Args:
        voxels: of the mask.
        depth: (n,) mm inside the vessel.
        skeleton: (n,) bool, as from `thin`.
        grid: where the voxels lie.
    """
    mm = _centred(voxels, depth, skeleton, grid)
    net = chains_of(voxels.only(skeleton), mm, depth[skeleton])
    tidy(net, float(grid.spacing.min()))
    used = sorted({j for chain in net.chains for j in (chain.start, chain.end) if j != FREE})
    renamed = {old: new for new, old in enumerate(used)} | {FREE: FREE}
    wall = Wall(voxels, grid)
    junction = net.position[used].reshape(-1, 3)
    return Centreline(
        branches=_branches(net, renamed, voxels, wall, grid),
        junction=junction,
        junction_radius=np.maximum(net.radius[used], wall.distance(junction)),
        pruned=net.position[[j for j, _ in net.pruned]].reshape(-1, 3),
        pruned_reach=np.array([reach for _, reach in net.pruned], float),
        pinholes=np.reshape(net.loops, (-1, 3)).astype(float),
    )


def _centred(voxels: Voxels, depth: np.ndarray, skeleton: np.ndarray, grid: Grid) -> np.ndarray:
    """Where the axis passes each skeleton voxel, (V, 3) RAS mm: the mean of the deepest voxels around it.

    The axis of a vessel two voxels wide lies between voxels; a skeleton has to take one side.
    """
    places = np.flatnonzero(skeleton)
    near = np.column_stack([voxels.neighbours[places], places])
    deep = np.append(depth, -np.inf)[near]
    weight = np.maximum(deep - deep.max(1, keepdims=True) + float(grid.spacing.min()), 0) ** 2
    index = np.concatenate([voxels.index, np.zeros((1, 3), np.int32)])[near]
    mm = grid.to_mm((index * weight[..., None]).sum(1) / weight.sum(1, keepdims=True))
    # A tip moves sideways only.
    before = np.append(skeleton, False)[near[:, :-1]]
    tip = np.flatnonzero(before.sum(1) == 1)
    home = grid.to_mm(voxels.index[places[tip]])
    along = home - grid.to_mm(voxels.index[near[tip, np.argmax(before[tip], axis=1)]])
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    mm[tip] -= ((mm[tip] - home) * along).sum(1, keepdims=True) * along
    return mm


def _branches(
    net: Chains, renamed: dict[int, int], voxels: Voxels, wall: Wall, grid: Grid
) -> tuple[Branch, ...]:
    """Gaussian smoothing along the lines with fixed ends; curvature from a smoother copy."""
    lines, curves = [], []
    for chain in net.chains:
        points = net.mm[chain.voxels]
        if chain.start != FREE:
            points = np.concatenate([net.position[[chain.start]], points])
        if chain.end != FREE:
            points = np.concatenate([points, net.position[[chain.end]]])
        line = smooth_line(points, _SMOOTHING, chain.closed)
        curve = smooth_line(points, _CURVATURE_SMOOTHING, chain.closed)
        if chain.closed:
            line, curve = np.concatenate([line, line[:1]]), np.concatenate([curve, curve[:1]])
        lines.append(line)
        curves.append(_curvature(curve))
    lines, curves = _with_ends(lines, curves, net, voxels, wall, grid)
    radius = _split(wall.distance(np.concatenate(lines)), lines) if lines else []
    return tuple(
        Branch(line, width, bend, renamed[chain.start], renamed[chain.end], chain.closed)
        for chain, line, width, bend in zip(net.chains, lines, radius, curves, strict=True)
    )


def _with_ends(
    lines: list[np.ndarray], curves: list[np.ndarray], net: Chains, voxels: Voxels, wall: Wall, grid: Grid
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Free ends moved to where the vessel's end is one radius ahead, or to the rim of the volume.

    Thinning stops anywhere between there and the wall, the sooner the wider the vessel.
    """
    free = [
        (i, side)
        for i, chain in enumerate(net.chains)
        for side, junction in ((0, chain.start), (1, chain.end))
        if junction == FREE and not chain.closed and len(lines[i]) > 2
    ]
    if not free:
        return lines, curves
    step = 0.25 * float(grid.spacing.min())
    radius = _split(wall.distance(np.concatenate(lines)), lines)
    lines, curves = list(lines), list(curves)
    tips, headings, widths = np.zeros((len(free), 3)), np.zeros((len(free), 3)), np.zeros(len(free))
    for k, (i, side) in enumerate(free):
        points, width = (lines[i][::-1], radius[i][::-1]) if side else (lines[i], radius[i])
        gap = np.linalg.norm(points - points[0], axis=1)
        # Where the radius grows by half the way or more, the line has run on towards the wall.
        over = int(np.argmax((width - 0.5 * gap)[: max(1, len(width) // 2)]))
        if over:
            points, width, gap = points[over:], width[over:], gap[over:] - gap[over]
            kept = slice(None, len(points)) if side else slice(over, None)
            lines[i], curves[i], radius[i] = lines[i][kept], curves[i][kept], radius[i][kept]
        behind = np.flatnonzero(gap > max(width[: 1 + len(width) // 2].max(), 8 * step))
        last = int(behind[0]) if len(behind) else len(points) - 1
        tips[k], widths[k] = points[0], max(float(np.median(width[: last + 1])), float(width[0]))
        headings[k] = (points[0] - points[last]) / max(gap[last], 1e-9)
    ahead = np.arange(0, 3 * widths.max() + 8 * step, step)
    ray = tips[:, None] + ahead[:, None] * headings[:, None]  # (k, steps, 3)
    index = np.rint(grid.to_index(ray)).astype(int)
    out = voxels.find(index) == len(voxels)
    out[:, -1] = True
    first = np.argmax(out, axis=1)
    exit_ = index[np.arange(len(free)), first]
    rim = ((exit_ < 0) | (exit_ >= grid.shape)).any(1)
    # In a sac the radius grows on the way: not beyond where the wall ahead is as near as that beside.
    inner = np.arange(len(ahead)) < first[:, None]
    beside = np.zeros(out.shape)
    beside[inner] = wall.distance(ray[inner])
    left = ahead[first][:, None] - ahead
    there = ahead[np.argmax((beside >= left - step) | ~inner, axis=1)]
    reach = np.where(rim, ahead[first], np.minimum(ahead[first] - widths, there))
    lone = [chain.start == chain.end == FREE for chain in net.chains]
    for (i, side), tip, heading, width, more in zip(free, tips, headings, widths, reach, strict=True):
        points, bend = (lines[i][::-1], curves[i][::-1]) if side else (lines[i], curves[i])
        arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        if more > step:
            extra = (
                tip + heading * np.linspace(min(more, 3 * width), 0, int(more / (4 * step)) + 2)[:-1, None]
            )
            points, bend = (
                np.concatenate([extra, points]),
                np.concatenate([np.repeat(bend[0], len(extra)), bend]),
            )
        elif more < -step and arc[-1] + more > (2.5 if lone[i] else 0.5) * width:
            keep = arc > -more
            start = np.stack([np.interp(-more, arc, points[:, k]) for k in range(3)])[None]
            points, bend = np.concatenate([start, points[keep]]), np.concatenate([bend[:1], bend[keep]])
        lines[i], curves[i] = (points[::-1], bend[::-1]) if side else (points, bend)
    return lines, curves


def _split(values: np.ndarray, lines: list[np.ndarray]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(line) for line in lines])[:-1])


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
