"""The points at which a candidate's blood flow is tested, in units of the parent vessel's radius.

Notation: b candidates, n collocation points, s cross-sections with m points each. Lengths are in radii R,
with the origin on the centreline beside the candidate, axis 1 along the flow and axis 2 from the centreline
towards the candidate. Every straight vessel then looks the same to the network, whichever way it runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from aneurysm.physics.lumen import Lumen, wall_function
from aneurysm.physics.navier_stokes import reynolds_number
from aneurysm.physics.sections import Path, cross_sections, resample_path

MIN_PATH_POINTS = 3
MIN_LUMEN_VOXELS = 64
SMOOTHING = 0.4  # of the radius: less leaves voxel steps that floor the residual, more closes small sacs


@dataclass(frozen=True, eq=False)
class FlowPoints:
    """Collocation points and cross-sections of candidates; rows without flow are zero and invalid."""

    points: Float[Tensor, "b n 3"]  # uniform in the lumen, in R
    wall_jet: Float[Tensor, "b n 5"]  # wall function, its gradient per R, its Laplacian per R^2
    tangent: Float[Tensor, "b n 3"]  # unit vector along the parent vessel beside each point
    section_points: Float[Tensor, "b s m 3"]  # in R
    section_wall: Float[Tensor, "b s m"]  # wall function
    section_weight: Float[Tensor, "b s m"]  # area per point in R^2; 0 where there is no section
    section_tangent: Float[Tensor, "b s 3"]  # unit normal of the section, downstream
    radius_mm: Float[Tensor, "b"]  # R
    origin_mm: Float[Tensor, "b 3"]  # (d, h, w) from the middle of the crop
    frame: Float[Tensor, "b 3 3"]  # rows are the axes above in (d, h, w): x_mm = origin + R x @ frame
    valid: Bool[Tensor, "b"]

    @property
    def reynolds(self) -> Float[Tensor, "b"]:
        """Reynolds number on R for blood with Murray's speed, 0 where there is no flow."""
        return reynolds_number(self.radius_mm)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "FlowPoints":
        """The same points on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def cast(self, dtype: torch.dtype) -> "FlowPoints":
        """The same points in another floating-point type."""
        return self._each(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def rows(self, index: Int[Tensor, "k"]) -> "FlowPoints":
        """A sub-batch of candidates."""
        return self._each(lambda tensor: tensor[index])

    def at(self, index: Int[Tensor, "b k"]) -> "FlowPoints":
        """The same candidates with k of their n collocation points each."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("points", "wall_jet", "tangent"):
            tensor = own[name]
            own[name] = tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))
        return FlowPoints(**own)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "FlowPoints":
        return FlowPoints(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


def no_flow(n_points: int = 256, n_sections: int = 6, n_section_points: int = 24) -> FlowPoints:
    """A candidate without a usable vessel: masked out of the loss, never mistaken for standing blood."""
    n, s, m = n_points, n_sections, n_section_points
    shapes = [
        (1, n, 3),
        (1, n, 5),
        (1, n, 3),
        (1, s, m, 3),
        (1, s, m),
        (1, s, m),
        (1, s, 3),
        (1,),
        (1, 3),
        (1, 3, 3),
    ]
    return FlowPoints(
        *(torch.zeros(shape, dtype=torch.float64) for shape in shapes), valid=torch.zeros(1, dtype=torch.bool)
    )


def collate_flow(candidates: Sequence[FlowPoints]) -> FlowPoints:
    """Concatenates candidates with the same numbers of points into a batch."""
    sizes = {(flow.points.shape[1], *flow.section_wall.shape[1:]) for flow in candidates}
    if len(sizes) != 1:
        raise ValueError(
            f"A batch needs equal (points, sections, section points) per candidate, got {sorted(sizes)}. "
            "Sample them all with the same n_points, n_sections and n_section_points."
        )
    return FlowPoints(
        **{f.name: torch.cat([getattr(flow, f.name) for flow in candidates]) for f in fields(FlowPoints)}
    )


def sample_flow_points(
    vessel_prob: Float[np.ndarray, "d h w"],
    spacing_mm: Float[np.ndarray, "3"],
    path_mm: Float[np.ndarray, "m 3"],
    path_tangent: Float[np.ndarray, "m 3"],
    path_radius_mm: Float[np.ndarray, "m"],
    n_points: int = 256,
    n_sections: int = 6,
    n_section_points: int = 24,
    *,
    rng: np.random.Generator,
) -> FlowPoints:
    """Draws the flow points of one candidate from its vessel probability crop; a batch of one.

    The candidate is the middle of the crop. Points are uniform in the lumen between the two ends of the
    path. Sections cut the vessel across, on one path without a fork: between forks every section carries
    the same flow.

    Args:
        vessel_prob: 0..1, the vessel is above one half.
        spacing_mm: voxel size along (d, h, w).
        path_mm: centreline of the parent vessel in order, as (d, h, w) in mm from the middle of the crop,
            i.e. from index (n - 1) / 2. Points outside the crop are dropped.
        path_tangent: direction of the centreline at each path point; sign and length are ignored.
        path_radius_mm: lumen radius at each path point.
        n_section_points: a multiple of 3, three on each ray from the centre.
        rng: source of the random points.

    Returns:
        An invalid row when fewer than 3 path points lie in the crop, the vessel has fewer than 64 voxels, or
        fewer than 2 sections can be cut.
    """
    nothing = no_flow(n_points, n_sections, n_section_points)
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
    if lumen is None or lumen.indicator.sum() * np.prod(lumen.spacing_mm / spacing) < MIN_LUMEN_VOXELS:
        return nothing
    sections = cross_sections(lumen, path, n_sections, n_section_points)
    if sections is None:
        return nothing
    points = _uniform_points(lumen, path, half, n_points, rng)
    if points is None:
        return nothing

    nearest = path.nearest(np.zeros((1, 3)))[0]
    origin = path.position[nearest]
    frame = _frame(sections.tangent, path.tangent[nearest], towards=-origin)

    def place(position: np.ndarray) -> np.ndarray:
        return (position - origin) @ frame.T / radius

    wall = lumen.jet(points)
    wall = np.concatenate([wall[:, :1], wall[:, 1:4] @ frame.T * radius, wall[:, 4:] * radius**2], axis=1)
    beside = path.tangent[path.nearest(points)]
    arrays = (
        place(points),
        wall,
        beside @ frame.T,
        place(sections.points),
        sections.wall,
        sections.weight_mm2 / radius**2,
        sections.tangent @ frame.T,
        np.array(radius),
        origin,
        frame,
    )
    return FlowPoints(
        *(torch.tensor(array, dtype=torch.float64)[None] for array in arrays),
        valid=torch.ones(1, dtype=torch.bool),
    )


def _uniform_points(
    lumen: Lumen, path: Path, half_mm: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Uniform points of the lumen between the path's ends, (count, 3) mm, by rejection within voxels."""
    cut = ndimage.binary_dilation(
        lumen.inside, structure=np.ones((3, 3, 3))
    )  # the wall passes through voxels
    voxels = np.argwhere(cut) * lumen.spacing_mm + lumen.first_mm
    voxels = voxels[path.between_ends(voxels)]
    if len(voxels) == 0:
        return None
    tries = voxels[rng.integers(len(voxels), size=8 * count)]
    tries = tries + rng.uniform(-0.5, 0.5, tries.shape) * lumen.spacing_mm
    kept = tries[(lumen.interpolate(tries) > 0) & (np.abs(tries) <= half_mm).all(1)]
    if len(kept) < count // 4:
        return None
    return kept[np.arange(count) % len(kept)]  # repeats only in a lumen that is nearly all surface


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
