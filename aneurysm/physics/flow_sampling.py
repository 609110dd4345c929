"""Places at which a candidate's flow is tested, drawn from its vessel mask and graph.

Collocation points are uniform in the lumen, wall points on its wall, sections cut the parent vessel across.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import KDTree

from aneurysm.physics.caps import drive
from aneurysm.physics.flow_domain import Domain, driven_domain, undriven_domain
from aneurysm.physics.flow_points import FlowPoints, Sites, no_flow
from aneurysm.physics.lumen import wall_function
from aneurysm.physics.network_flow import VesselTree
from aneurysm.physics.sections import cross_sections, resample_path

MIN_PATH_POINTS = 3
MIN_LUMEN_VOXELS = 64
SMOOTHING = 0.4  # of the radius: less leaves voxel steps that floor the residual, more closes small sacs


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
