"""From a vessel mask and its graph to the places at which a candidate's flow is tested.

The lumen is cut off where its vessels leave the crop, and each cut becomes a cap with its share of the flow.
Where the graph gives no two usable caps, the domain ends with the parent vessel's path and nothing is
prescribed: the flow is then driven by its normalisation alone, see `flow_field`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from scipy.spatial import KDTree

from aneurysm.physics.caps import Cap, Guide, drive
from aneurysm.physics.flow_points import FlowPoints, Sites, no_flow
from aneurysm.physics.lumen import Lumen, Wall, wall_function
from aneurysm.physics.network_flow import VesselTree, edge_flow, murray_outflow
from aneurysm.physics.sections import (
    Path,
    cross_sections,
    cut_across,
    resample_path,
    star_quadrature,
)

MIN_PATH_POINTS = 3
MIN_LUMEN_VOXELS = 64
SMOOTHING = 0.4  # of the radius: less leaves voxel steps that floor the residual, more closes small sacs
CAP_RAYS = 16
CAP_STEPS = (0.25, 0.75, 1.5, 2.5)  # radii inwards from an exit at which a whole cross-section is sought
GUIDE_POINTS = 40
RESOLVED = 0.2  # mean of the wall function over a cap: below, smoothing has all but closed the vessel
NARROW = 0.4  # of the widest exit's radius: below, an exit carries a few percent and is walled off
STILL = 0.3  # of the inflow: less through the parent vessel, and the crop is about another vessel's flow


@dataclass(frozen=True)
class Numbers:
    """How many places of each kind a candidate has.

    points: collocation points. sections: cross-sections of the parent vessel. section_points: of each, a
    multiple of 3, three on each ray from the centre. wall: places on the wall.
    """

    points: int = 256
    sections: int = 6
    section_points: int = 24
    wall: int = 64


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


def sample_flow_points(
    vessel_prob: Float[np.ndarray, "d h w"],
    spacing_mm: Float[np.ndarray, "3"],
    path_mm: Float[np.ndarray, "m 3"],
    path_tangent: Float[np.ndarray, "m 3"],
    path_radius_mm: Float[np.ndarray, "m"],
    n_points: int = 256,
    n_sections: int = 6,
    n_section_points: int = 24,
    n_wall: int = 64,
    tree: VesselTree | None = None,
    *,
    rng: np.random.Generator,
) -> FlowPoints:
    """Draws the flow points of one candidate from its vessel probability crop; a batch of one.

    The candidate is the middle of the crop. Points are uniform in the lumen between its caps, or, without
    caps, between the two ends of the path. Sections cut the parent vessel across.

    Args:
        vessel_prob: 0..1, the vessel is above one half.
        spacing_mm: voxel size along (d, h, w).
        path_mm: centreline of the parent vessel in order, as (d, h, w) in mm from the middle of the crop,
            i.e. from index (n - 1) / 2. Points outside the crop are dropped.
        path_tangent: direction of the centreline at each path point; sign and length are ignored.
        path_radius_mm: lumen radius at each path point.
        tree: the vessels of the crop and its exits; None for a flow without caps.
        rng: source of the random points.

    Returns:
        An invalid row when fewer than 3 path points lie in the crop, the vessel has fewer than 64 voxels, or
        fewer than 2 sections can be cut.
    """
    numbers = Numbers(n_points, n_sections, n_section_points, n_wall)
    nothing = no_flow(n_points, n_sections, n_section_points, n_wall)
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    half = np.array(vessel_prob.shape) * spacing / 2
    usable = (np.abs(path_mm) <= half).all(1) & np.isfinite(path_tangent).all(1) & (path_radius_mm > 0)
    if usable.sum() < MIN_PATH_POINTS:
        return nothing
    path = resample_path(
        path_mm[usable], path_tangent[usable], path_radius_mm[usable], step_mm=spacing.min() / 2
    )
    if path is None:
        return nothing
    radius = float(np.median(path_radius_mm[usable]))
    lumen = wall_function(vessel_prob, spacing, max(spacing.max(), SMOOTHING * radius), path.position)
    if lumen is None or lumen.inside.sum() * np.prod(lumen.spacing_mm / spacing) < MIN_LUMEN_VOXELS:
        return nothing
    domain = driven_domain(lumen, path, tree, radius) if tree is not None else None
    placed = place_flow(domain, numbers, half, rng) if domain is not None else None
    if placed is None:
        placed = place_flow(undriven_domain(lumen, path, radius), numbers, half, rng)
    return placed if placed is not None else nothing


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


def place_flow(
    domain: Domain, numbers: Numbers, half_mm: np.ndarray, rng: np.random.Generator
) -> FlowPoints | None:
    """Draw all places of a domain; None where no two cross-sections or too few points are found.

    Args:
        half_mm: (3,) half the size of the crop, of which the candidate is the middle.
    """
    sections = cross_sections(domain.wall, domain.path, numbers.sections, numbers.section_points)
    if sections is None:
        return None
    points = _uniform_points(domain, half_mm, numbers.points, rng)
    on_wall = _wall_points(domain, half_mm, numbers.wall, rng) if points is not None else None
    if points is None or on_wall is None:
        return None
    path, radius = domain.path, domain.radius_mm
    nearest = path.nearest(np.zeros((1, 3)))[0]
    origin = path.position[nearest]
    frame = _frame(sections.tangent, path.tangent[nearest], towards=-origin)
    caps = [cap.placed(origin, frame, radius) for cap in domain.caps]
    guide = None if domain.guide is None else domain.guide.placed(origin, frame, radius)

    def sites(position: np.ndarray) -> Sites:
        jet = domain.wall.jet(position)
        wall = np.concatenate([jet[:, :1], jet[:, 1:4] @ frame.T * radius, jet[:, 4:] * radius**2], axis=1)
        placed = _tensor((position - origin) @ frame.T / radius)
        free, prescribed = drive(placed, caps, guide)
        return Sites(placed[None], _tensor(wall)[None], free.T[None], prescribed.movedim(0, 1)[None])

    on_line = KDTree(domain.centreline)
    shell = sites(on_wall)
    slope = shell.wall[..., 1:4]
    present = sections.weight_mm2.sum(1) > 0
    middles = sections.points.mean(1)
    line = on_line.query(middles)[1]
    forward = np.sign((domain.downstream[line] * sections.tangent).sum(1))
    target = np.pi * domain.centreline_flux[line] * forward
    return FlowPoints(
        bulk=sites(points),
        tangent=_tensor(domain.downstream[on_line.query(points)[1]] @ frame.T)[None],
        shell=shell,
        normal=slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-12),
        section=sites(sections.points.reshape(-1, 3)),
        section_weight=_tensor(sections.weight_mm2 / radius**2)[None],
        section_tangent=_tensor(sections.tangent @ frame.T)[None],
        section_target=_tensor(np.where(present, target, 0.0))[None],
        radius_mm=torch.tensor([radius], dtype=torch.float64),
        origin_mm=_tensor(origin)[None],
        frame=_tensor(frame)[None],
        driven=torch.tensor([bool(caps)]),
        key=torch.zeros(1, dtype=torch.int64),
        valid=torch.ones(1, dtype=torch.bool),
    )


def _guide(wall: Wall, tree: VesselTree, flow: np.ndarray, radius_mm: float) -> Guide | None:
    """Points along the edges, at most `GUIDE_POINTS` about, with the speed that their flow asks for there.

    Args:
        flow: through the edges, in that of the parent vessel.
    """
    if len(flow) == 0:
        return None
    many = max(1, GUIDE_POINTS // len(flow))
    share = ((np.arange(many) + 0.5) / many)[None, :, None]
    start, end = tree.position[tree.edges[:, 0]][:, None], tree.position[tree.edges[:, 1]][:, None]
    position = (start + share * (end - start)).reshape(-1, 3)  # (e * many, 3)
    length = np.maximum(np.linalg.norm(end - start, axis=2, keepdims=True), 1e-9)
    along = np.repeat((end - start) / length, many, axis=1).reshape(-1, 3)
    amount, radius = np.repeat(flow, many), np.repeat(tree.edge_radius, many)
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


def _uniform_points(
    domain: Domain, half_mm: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Uniform points of the fluid, (count, 3) mm, by rejection."""
    tries = domain.wall.scatter(12 * count, rng)
    kept = tries[
        (domain.wall.interpolate(tries) > 0) & (np.abs(tries) <= half_mm).all(1) & domain.inside(tries)
    ]
    if len(kept) < count // 4:
        return None
    return kept[np.arange(count) % len(kept)]  # repeats only in a lumen that is nearly all surface


def _wall_points(
    domain: Domain, half_mm: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Points uniform on the wall, (count, 3) mm: those of a thin shell of even thickness, moved onto it."""
    tries = domain.wall.scatter(40 * count, rng)
    tries = tries[(np.abs(tries) <= half_mm).all(1) & domain.inside(tries)]
    tries = tries[np.abs(domain.wall.interpolate(tries)) < 0.5][: 10 * count]  # jets cost more
    jet = domain.wall.jet(tries) if len(tries) else np.zeros((0, 5))
    slope = np.linalg.norm(jet[:, 1:4], axis=1)
    near = (slope > 1e-6) & (np.abs(jet[:, 0]) < 0.25 * domain.wall.step_mm * slope)
    points = tries[near][:count]
    if len(points) < max(4, count // 8):
        return None
    for _ in range(3):  # Newton along the gradient
        jet = domain.wall.jet(points)
        square = np.maximum((jet[:, 1:4] ** 2).sum(1, keepdims=True), 1e-12)
        points = points - jet[:, :1] * jet[:, 1:4] / square
    return points[np.arange(count) % len(points)]


def _frame(section_tangents: np.ndarray, local: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Right-handed axes (3, 3) as rows: mean flow direction, towards the candidate, and across."""
    present = section_tangents[np.linalg.norm(section_tangents, axis=1) > 0]
    along = present.mean(0)
    # On a hairpin the mean direction vanishes; the direction beside the candidate is what is left.
    along = local if np.linalg.norm(along) < 0.2 else along / np.linalg.norm(along)
    across = towards - (towards @ along) * along
    if np.linalg.norm(across) < 1e-6:
        across = np.eye(3)[np.abs(along).argmin()]
        across = across - (across @ along) * along
    across = across / np.linalg.norm(across)
    return np.stack([along, across, np.cross(along, across)])


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64)
