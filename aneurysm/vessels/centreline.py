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
    pinholes: np.ndarray  # (H, 3) RAS mm: rings of the mask that are none here, they fit into a junction


def trace(
    skeleton: Voxels, depth: np.ndarray, mask: Voxels, grid: Grid
) -> Centreline:
    """Follow the skeleton from junction to junction, drop noise spurs, smooth what is left.

    A spur is noise when it hardly leaves the sphere of its junction and is thin at its tip. A short FAT spur
    is how thinning shows the dome of a sidewall aneurysm, and is kept.

    Args:
        skeleton: one voxel thick, as from `thin`.
        depth: (V,) mm inside the vessel, of the skeleton's voxels.
        mask: what was thinned.
        grid: where the voxels lie.
    """
    mm = grid.to_mm(skeleton.index)
    net = chains_of(skeleton, mm, np.asarray(depth, float))
    tidy(net, float(grid.spacing.min()))
    used = sorted({j for chain in net.chains for j in (chain.start, chain.end) if j != FREE})
    renamed = {old: new for new, old in enumerate(used)} | {FREE: FREE}
    wall = Wall(mask, grid)
    return Centreline(
        branches=_branches(net, renamed, wall),
        junction=net.position[used].reshape(-1, 3),
        junction_radius=net.radius[used],
        pruned=net.position[[j for j, _ in net.pruned]].reshape(-1, 3),
        pruned_reach=np.array([reach for _, reach in net.pruned], float),
        pinholes=np.reshape(net.loops, (-1, 3)).astype(float),
    )


def _branches(net: Chains, renamed: dict[int, int], wall: Wall) -> tuple[Branch, ...]:
    """Gaussian smoothing along the lines with fixed ends; curvature from a smoother copy."""
    lines, curves, widths = [], [], []
    for chain in net.chains:
        points, width = net.mm[chain.voxels], net.depth[chain.voxels]
        if chain.start != FREE:
            points = np.concatenate([net.position[[chain.start]], points])
            width = np.concatenate([net.radius[[chain.start]], width])
        if chain.end != FREE:
            points = np.concatenate([points, net.position[[chain.end]]])
            width = np.concatenate([width, net.radius[[chain.end]]])
        line = smooth_line(points, _SMOOTHING, chain.closed)
        curve = smooth_line(points, _CURVATURE_SMOOTHING, chain.closed)
        if chain.closed:
            line, curve = np.concatenate([line, line[:1]]), np.concatenate([curve, curve[:1]])
            width = np.concatenate([width, width[:1]])
        lines.append(line)
        curves.append(_curvature(curve))
        widths.append(width)
    # The voxel nearest to the axis is half a voxel off it, and its depth too small by as much.
    measured = wall.distance(np.concatenate(lines)) if lines else np.zeros(0)
    parts = np.split(measured, np.cumsum([len(line) for line in lines])[:-1])
    return tuple(
        Branch(line, np.maximum(part, width), bend, renamed[chain.start], renamed[chain.end], chain.closed)
        for chain, line, part, width, bend in zip(net.chains, lines, parts, widths, curves, strict=True)
    )


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
