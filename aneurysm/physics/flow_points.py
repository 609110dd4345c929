"""The points at which a candidate's blood flow is tested, in units of the parent vessel's radius.

Notation: b candidates, n collocation points, w wall points, s cross-sections with m points each. Lengths
are in radii R, with the origin on the centreline beside the candidate, axis 1 along the flow and axis 2 from
the centreline towards the candidate. Every straight vessel then looks the same to the network, whichever way
it runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from aneurysm.physics.fluid import reynolds_number

NEAR_WALL = 0.4  # of the wall function
NEAR_CANDIDATE = 1.5  # R


@dataclass(frozen=True, eq=False)
class Sites:
    """Places with what is known of the flow there before any network has spoken, as jets (see `jets`)."""

    position: Float[Tensor, "b n 3"]  # R
    wall: Float[Tensor, "b n 5"]  # phi: 0 on the wall, positive inside
    free: Float[Tensor, "b n 5"]  # chi: 0 on the caps, 1 where the network is free
    prescribed: Float[Tensor, "b n 5 3"]  # velocity over phi that the caps ask for, U

    def at(self, index: Int[Tensor, "b k"]) -> "Sites":
        """k of the n places of every candidate."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self.each(lambda tensor: tensor[rows, index])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Sites":
        """The same with every tensor changed."""
        return Sites(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class FlowPoints:
    """Places in and around the blood of candidates; rows without flow are zero and invalid."""

    bulk: Sites  # uniform in the lumen
    tangent: Float[Tensor, "b n 3"]  # unit vector along the vessel beside each point, downstream
    shell: Sites  # w places uniform on the wall
    normal: Float[Tensor, "b w 3"]  # unit, into the lumen
    section: Sites  # s * m places, section by section
    section_weight: Float[Tensor, "b s m"]  # area per place in R^2; 0 where there is no section
    section_tangent: Float[Tensor, "b s 3"]  # unit normal of the section, downstream
    section_target: Float[Tensor, "b s"]  # flux in U R^2 that should pass; pi in the parent vessel
    radius_mm: Float[Tensor, "b"]  # R
    origin_mm: Float[Tensor, "b 3"]  # (d, h, w) from the middle of the crop
    frame: Float[Tensor, "b 3 3"]  # rows are the axes above in (d, h, w): x_mm = origin + R x @ frame
    driven: Bool[Tensor, "b"]  # by caps; otherwise the flux is normalised, see `flow_field`
    key: Int[Tensor, "b"]  # tells candidates apart wherever they are seen again; 0 unknown
    valid: Bool[Tensor, "b"]

    @property
    def reynolds(self) -> Float[Tensor, "b"]:
        """Reynolds number on R for blood with Murray's speed, 0 where there is no flow."""
        return reynolds_number(self.radius_mm)

    @property
    def near_wall(self) -> Bool[Tensor, "b n"]:
        """Collocation points in the outer part of the lumen."""
        return self.bulk.wall[..., 0] < NEAR_WALL

    @property
    def near_candidate(self) -> Bool[Tensor, "b n"]:
        """Collocation points around the candidate's own place, a sac's dome as a rule."""
        radius = self.radius_mm.clamp(min=1e-6)[:, None]
        place = -torch.einsum("bj,bij->bi", self.origin_mm, self.frame) / radius
        return (self.bulk.position - place[:, None]).norm(dim=-1) < NEAR_CANDIDATE

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "FlowPoints":
        """The same points on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def cast(self, dtype: torch.dtype) -> "FlowPoints":
        """The same points in another floating-point type."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def rows(self, index: Int[Tensor, "k"]) -> "FlowPoints":
        """A sub-batch of candidates."""
        return self.map(lambda tensor: tensor[index])

    def at(self, index: Int[Tensor, "b k"]) -> "FlowPoints":
        """The same candidates with k of their n collocation points each."""
        tangent = self.tangent.gather(1, index[..., None].expand(-1, -1, 3))
        return replace(self, bulk=self.bulk.at(index), tangent=tangent)

    def map(self, change: Callable[[Tensor], Tensor]) -> "FlowPoints":
        """The same with every tensor changed."""
        changed: dict[str, Any] = {
            name: part.each(change) if isinstance(part, Sites) else change(part)
            for name, part in vars(self).items()
        }
        return FlowPoints(**changed)


def no_flow(
    n_points: int = 256, n_sections: int = 6, n_section_points: int = 24, n_wall: int = 64
) -> FlowPoints:
    """A candidate without a usable vessel: masked out of the loss, never mistaken for standing blood."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1, *shape, dtype=torch.float64)

    def sites(n: int) -> Sites:
        return Sites(zeros(n, 3), zeros(n, 5), zeros(n, 5), zeros(n, 5, 3))

    no = torch.zeros(1, dtype=torch.bool)
    return FlowPoints(
        bulk=sites(n_points),
        tangent=zeros(n_points, 3),
        shell=sites(n_wall),
        normal=zeros(n_wall, 3),
        section=sites(n_sections * n_section_points),
        section_weight=zeros(n_sections, n_section_points),
        section_tangent=zeros(n_sections, 3),
        section_target=zeros(n_sections),
        radius_mm=zeros(),
        origin_mm=zeros(3),
        frame=zeros(3, 3),
        driven=no,
        key=torch.zeros(1, dtype=torch.int64),
        valid=no,
    )


def collate_flow(candidates: Sequence[FlowPoints]) -> FlowPoints:
    """Concatenates candidates with the same numbers of points into a batch."""
    sizes = {
        (flow.tangent.shape[1], flow.normal.shape[1], *flow.section_weight.shape[1:]) for flow in candidates
    }
    if len(sizes) != 1:
        raise ValueError(
            "A batch needs equal (points, wall points, sections, section points) per candidate, got "
            f"{sorted(sizes)}. Sample them all with the same numbers."
        )
    joined = {}
    for field in fields(FlowPoints):
        parts = [getattr(flow, field.name) for flow in candidates]
        if isinstance(parts[0], Sites):
            names = [f.name for f in fields(Sites)]
            joined[field.name] = Sites(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
        else:
            joined[field.name] = torch.cat(parts)
    return FlowPoints(**joined)
