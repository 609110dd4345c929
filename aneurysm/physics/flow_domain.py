"""The fluid of a candidate: lumen between caps.

The lumen is cut off where its vessels leave the crop, and each cut becomes a cap with its share of the flow.
Where the graph gives no two usable caps, the domain ends with the parent vessel's path and nothing is
prescribed: the flow is then driven by its normalisation alone, see `flow_field`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from scipy.spatial import KDTree

from aneurysm.physics.caps import Cap, Guide
from aneurysm.physics.lumen import Lumen, Wall
from aneurysm.physics.network_flow import VesselTree, edge_flow, murray_outflow
from aneurysm.physics.sections import Path, cut_across, star_quadrature

CAP_RAYS = 16
CAP_STEPS = (0.25, 0.75, 1.5, 2.5)  # radii inwards from an exit at which a whole cross-section is sought
GUIDE_POINTS = 40
SHORTEST_MM = 1e-3  # edges between nodes at one place, as around a junction
RESOLVED = 0.2  # mean of the wall function over a cap: below, smoothing has all but closed the vessel
NARROW = 0.4  # of the widest exit's radius: below, an exit carries a few percent and is walled off
STILL = 0.3  # of the inflow: less through the parent vessel, and the crop is about another vessel's flow


@dataclass(frozen=True, eq=False)
class Domain:
    """The fluid of one candidate; positions in mm in the axes of its wall function.

    centreline, downstream: points along all vessels of the domain with their unit direction of flow.
    centreline_flux: what flows there, in the flux of the parent vessel.
    """

    wall: Wall
    path: Path  # of the parent vessel, downstream
    caps: Sequence[Cap]
    centreline: Float[np.ndarray, "c 3"]
    downstream: Float[np.ndarray, "c 3"]
    centreline_flux: Float[np.ndarray, "c"]
    radius_mm: float  # R
    guide: Guide | None = None  # where the network's flow starts from

    def inside(self, points: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """Whether points lie between the caps, or between the ends of the path where there are none; (n,)."""
        if not self.caps:
            return self.path.between_ends(points)
        return ~np.any([cap.behind(points) for cap in self.caps], axis=0)


def undriven_domain(wall: Wall, path: Path, radius_mm: float) -> Domain:
    """Fluid along a path, with nothing prescribed at its ends."""
    return Domain(wall, path, (), path.position, path.tangent, np.ones(len(path.arc_mm)), radius_mm)


def driven_domain(lumen: Lumen, path: Path, tree: VesselTree, radius_mm: float) -> Domain | None:
    """Fluid between the caps of a vessel tree, or None where it has no two usable ones.

    A cap needs a cross-section that is walled all around. Those that have none at their exit are sought
    further inside. Nothing passes the cap of a narrow exit; an exit that has no cross-section at all, as when
    two vessels touch there, gets no share of the flow and stays open.
    """
    cuts = [_cap_cut(lumen, tree, k) for k in range(len(tree.exit_radius))]
    # Of the lumen as it is resolved: what the graph takes for wider or narrower cannot be flowed through.
    width = np.array([0.0 if cut is None else cut.radius for cut in cuts])
    kept = np.flatnonzero((width > 0) & (width >= NARROW * width.max(initial=0.0)))
    if len(kept) < 2:
        return None
    outflow = np.zeros(len(cuts))
    outflow[kept] = murray_outflow(width[kept])
    flow = edge_flow(tree, outflow)
    centreline, downstream, flux = _centreline(tree, flow, outflow, cuts, lumen.step_mm / 2)
    # The parent vessel's own flow is the unit; it runs the way of the path, or the path is turned around.
    middle = path.nearest(np.zeros((1, 3)))[0]
    beside = int(KDTree(centreline).query(path.position[middle])[1])
    parent = flux[beside]
    if parent < STILL:
        return None
    if downstream[beside] @ path.tangent[middle] < 0:
        path = path.reversed()
    caps = []
    for cut, amount in zip(cuts, outflow / parent, strict=True):
        if cut is not None:
            strength = -amount * np.pi * radius_mm**2 / cut.openness_mm2
            caps.append(Cap(cut.centre, cut.inward, cut.reach, float(strength)))
    guide = _guide(lumen, tree, flow / parent, radius_mm)
    domain = Domain(lumen, path, tuple(caps), centreline, downstream, flux / parent, radius_mm, guide)
    stretch = _beside_candidate(path, domain.inside(path.position))
    closed = _between_caps(lumen, replace(domain, path=stretch)) if stretch is not None else None
    if stretch is None or closed is None:
        return None
    return replace(domain, wall=closed, path=stretch)


def _guide(wall: Wall, tree: VesselTree, flow: np.ndarray, radius_mm: float) -> Guide | None:
    """Points along the edges, at most `GUIDE_POINTS` about, with the speed that their flow asks for there.

    Args:
        flow: through the edges, in that of the parent vessel.
    """
    ends = tree.position[tree.edges]  # (e, 2, 3)
    long = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1) > SHORTEST_MM  # others have no direction
    if not long.any():
        return None
    ends, flow, edge_radius = ends[long], flow[long], tree.edge_radius[long]
    many = max(1, GUIDE_POINTS // len(flow))
    share = ((np.arange(many) + 0.5) / many)[None, :, None]
    start, end = ends[:, :1], ends[:, 1:]
    position = (start + share * (end - start)).reshape(-1, 3)  # (e * many, 3)
    length = np.linalg.norm(end - start, axis=2, keepdims=True)
    along = np.repeat((end - start) / length, many, axis=1).reshape(-1, 3)
    amount, radius = np.repeat(flow, many), np.repeat(edge_radius, many)
    centre, directions, distance, closed = cut_across(wall, position, along, radius, CAP_RAYS)
    at, area = star_quadrature(centre, directions, distance)
    openness = (np.maximum(wall.interpolate(at), 0) * area).sum(1)
    whole = area.sum(1)
    # Where a vessel forks or a sac opens there is no cross-section; the neighbours speak for such a place.
    usable = closed & (distance.min(1) > 0) & (openness > RESOLVED * whole)
    if not usable.any():
        return None
    speed = amount[usable] * np.pi * radius_mm**2 / openness[usable]
    return Guide(centre[usable], speed[:, None] * along[usable], np.sqrt(whole[usable] / np.pi))


@dataclass(frozen=True, eq=False)
class _Cut:
    """The cross-section of an exit."""

    centre: np.ndarray  # (3,) mm
    inward: np.ndarray  # (3,) unit
    reach: float  # mm, longest way from the centre to the wall
    radius: float  # mm, of a circle of the same area
    openness_mm2: float  # integral of phi


def _cap_cut(wall: Wall, tree: VesselTree, k: int) -> _Cut | None:
    """The first whole cross-section inwards from an exit; None where there is none, or it is all wall."""
    inward, radius = -tree.exit_outward[k], float(tree.exit_radius[k])
    for steps in CAP_STEPS:
        start = tree.exit_position[k] + steps * radius * inward
        centre, directions, distance, closed = cut_across(
            wall, start[None], inward[None], np.array([radius]), CAP_RAYS
        )
        if closed[0] and distance.min() > 0:
            position, area = star_quadrature(centre, directions, distance)
            phi = np.maximum(wall.jet(position[0])[:, 0], 0)
            openness, whole = float(phi @ area[0]), float(area[0].sum())
            if openness > RESOLVED * whole:
                return _Cut(centre[0], inward, float(distance.max()), np.sqrt(whole / np.pi), openness)
    return None


def _centreline(
    tree: VesselTree, flow: np.ndarray, outflow: np.ndarray, cuts: list, step_mm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points along all edges and out to the caps, their direction of flow, and its amount."""
    pieces = [(tree.position[a], tree.position[b], f) for (a, b), f in zip(tree.edges, flow, strict=True)] + [
        (tree.position[node], tree.exit_position[k], outflow[k])
        for k, node in enumerate(tree.exit_node)
        # An exit may lie before the end of its vessel; the way there is part of the last edge.
        if cuts[k] is not None and (tree.exit_position[k] - tree.position[node]) @ tree.exit_outward[k] > 0
    ]
    positions, tangents, fluxes = [], [], []
    for start, end, amount in pieces:
        length = float(np.linalg.norm(end - start))
        if length < 1e-9:
            continue
        share = np.linspace(0, 1, max(2, int(np.ceil(length / step_mm)) + 1))[:, None]
        positions.append(start + share * (end - start))
        tangents.append(np.tile(np.sign(amount or 1.0) * (end - start) / length, (len(share), 1)))
        fluxes.append(np.full(len(share), abs(amount)))
    return np.concatenate(positions), np.concatenate(tangents), np.concatenate(fluxes)


def _beside_candidate(path: Path, inside: np.ndarray) -> Path | None:
    """The stretch of the path inside the domain that passes the candidate; None where a cap cuts it off."""
    middle = int(path.nearest(np.zeros((1, 3)))[0])
    outside = np.flatnonzero(~inside)
    if middle in outside:
        return None
    first = int(outside[outside < middle].max(initial=-1)) + 1
    return path.stretch(first, int(outside[outside > middle].min(initial=len(inside))))


def _between_caps(lumen: Lumen, domain: Domain) -> Lumen | None:
    """The lumen without what lies beyond the caps; None where the caps cut the candidate's vessel off."""
    index = np.argwhere(lumen.inside)
    open_ = np.zeros(lumen.inside.shape, bool)
    kept = domain.inside(lumen.first_mm + index * lumen.spacing_mm)
    open_[tuple(index[kept].T)] = True
    parts = np.empty(open_.shape, np.int32)
    ndimage.label(open_, structure=np.ones((3, 3, 3)), output=parts)
    along = np.rint((domain.path.position - lumen.first_mm) / lumen.spacing_mm).astype(int)
    along = np.clip(along, 0, np.array(open_.shape) - 1)
    votes = np.bincount(parts[tuple(along.T)])[1:]
    return lumen.within(parts == votes.argmax() + 1) if votes.any() else None
