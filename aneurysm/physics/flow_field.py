"""The flow in a candidate's vessel: no slip at the wall, and something that drives it.

u = a phi (sum_k A_k b_k t_k + chi N_u(x; z)), p = N_p(x; z), with the wall function phi and a network N.

With caps (see `caps`) the flow through every vessel's exit is prescribed and a = 1. Without them nothing is
prescribed: chi = 1, the network gets e_1, the direction of the vessel, to start from, and a makes the mean
flux over the cross-sections equal to pi, the flux of mean speed 1 through a tube of radius 1. Without either,
the smallest residual belongs to blood that stands still.

With a soft wall the network's part is not multiplied by phi, and slip is a penalty instead.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aneurysm.physics.flow_points import FlowPoints, Sites
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.jets import product_jet

FLUX = math.pi  # mean speed 1 through radius 1
FLUX_FLOOR = 0.05 * math.pi  # below it the scale is held and the flux penalty takes over
WALLS = ("hard", "soft")


@dataclass(frozen=True, eq=False)
class Frozen:
    """All of a flow that the network has no part in, at some sites: u = scale (prescribed + gate N_u)."""

    gate: Float[Tensor, "5 b n 1"]
    prescribed: Float[Tensor, "5 b n 3"]


@dataclass(frozen=True, eq=False)
class SectionFlux:
    """What passes the cross-sections, in U R^2."""

    scale: Float[Tensor, "b"]  # a: of the whole velocity
    flux: Float[Tensor, "b s"]
    target: Float[Tensor, "b s"]  # pi in the parent vessel
    present: Float[Tensor, "b s"]  # 1 or 0

    def error(self) -> Float[Tensor, "b"]:
        """Mean squared deviation from the target, in the flux of the parent vessel."""
        error = ((self.flux - self.target) / FLUX).square() * self.present
        return error.sum(1) / self.present.sum(1).clamp(min=1)


@dataclass(frozen=True, eq=False)
class Flow:
    """A velocity and pressure field at the collocation points, in units of U and rho U^2."""

    velocity: Float[Tensor, "5 b n 3"]  # jets
    pressure: Float[Tensor, "5 b n"]  # jets
    through: SectionFlux


class FlowField(nn.Module):
    """Turns a coordinate network with four outputs into a flow through the lumen.

    Args:
        network: position and latent code to (u, v, w, p).
        wall: "hard", no slip by construction, or "soft", no slip by a penalty.
    """

    def __init__(self, network: JetMLP, wall: str = "hard"):
        super().__init__()
        if network.readout.out_features != 4:
            raise ValueError(
                f"A flow has 4 fields (u, v, w, p) but the network has {network.readout.out_features}."
            )
        if wall not in WALLS:
            raise ValueError(f"The wall is one of {', '.join(WALLS)}, got {wall!r}.")
        self.network, self.wall = network, wall

    def forward(self, latent: Float[Tensor, "b z"], flow: FlowPoints) -> Flow:
        """Evaluates the flow at the collocation points; every row of `flow` must be valid."""
        through = self.section_flux(latent, flow)
        jet = self.network(flow.bulk.position, latent)
        velocity = self.velocity(jet, self.frozen(flow.bulk, flow.driven), through.scale)
        return Flow(velocity, jet[..., 3], through)

    def frozen(self, sites: Sites, driven: Bool[Tensor, "b"]) -> Frozen:
        """What of the flow is known before the network speaks."""
        wall = sites.wall.movedim(-1, 0)[..., None]  # (5, b, n, 1)
        free = sites.free.movedim(-1, 0)[..., None]
        along = wall * wall.new_tensor((1.0, 0.0, 0.0))  # phi e_1, in place of caps
        prescribed = product_jet(wall, sites.prescribed.movedim(2, 0))
        prescribed = torch.where(driven[:, None, None], prescribed, along)
        return Frozen(free if self.wall == "soft" else product_jet(wall, free), prescribed)

    @staticmethod
    def velocity(
        jet: Float[Tensor, "5 b n 4"], frozen: Frozen, scale: Float[Tensor, "b"]
    ) -> Float[Tensor, "5 b n 3"]:
        """Velocity jets from the network's."""
        return scale[:, None, None] * (frozen.prescribed + product_jet(frozen.gate, jet[..., :3]))

    def section_flux(self, latent: Float[Tensor, "b z"], flow: FlowPoints) -> SectionFlux:
        """The flux through all cross-sections, and the scale it asks for where no cap drives the flow."""
        b, s, m = flow.section_weight.shape
        frozen = self.frozen(flow.section, flow.driven)
        out = self.network.values(flow.section.position, latent)[..., :3]
        velocity = (frozen.prescribed[0] + frozen.gate[0] * out).reshape(b, s, m, 3)
        passing = torch.einsum("bsmi,bsi->bsm", velocity, flow.section_tangent)
        flux = (flow.section_weight * passing).sum(-1)  # (b, s)
        present = (flow.section_weight.sum(-1) > 0).to(flux.dtype)
        mean_flux = flux.sum(1) / present.sum(1).clamp(min=1)
        scale = FLUX / mean_flux.clamp(min=FLUX_FLOOR)
        scale = torch.where(flow.driven, torch.ones_like(scale), scale)
        return SectionFlux(scale, flux * scale[:, None], flow.section_target, present)

    def slip(
        self, latent: Float[Tensor, "b z"], flow: FlowPoints, scale: Float[Tensor, "b"]
    ) -> Float[Tensor, "b"]:
        """Mean squared speed on the wall, U^2; 0 by construction where the wall is hard."""
        if self.wall == "hard":
            return torch.zeros_like(scale)
        frozen = self.frozen(flow.shell, flow.driven)
        out = self.network.values(flow.shell.position, latent)[..., :3]
        velocity = scale[:, None, None] * (frozen.prescribed[0] + frozen.gate[0] * out)
        return velocity.square().sum(-1).mean(1)

    def wall_shear(
        self, latent: Float[Tensor, "b z"], flow: FlowPoints, scale: Float[Tensor, "b"]
    ) -> Float[Tensor, "b w"]:
        """Wall shear stress |n x (grad u) n|, in mu U / R, at the places on the wall."""
        jet = self.network(flow.shell.position, latent)
        velocity = self.velocity(jet, self.frozen(flow.shell, flow.driven), scale)
        rate = torch.einsum("jbni,bnj->bni", velocity[1:4], flow.normal)  # du/dn
        across = (rate * flow.normal).sum(-1, keepdim=True) * flow.normal
        return (rate - across).norm(dim=-1)
