"""The flow in a candidate's vessel: no slip at the wall and a fixed flux through it, both by construction.

u = a phi (e_1 + N_u(x; z)), p = N_p(x; z), with the wall function phi, the network N and the scale a that
makes the mean flux over the cross-sections equal to pi, the flux of mean speed 1 through a tube of radius 1.
Without that flux the smallest residual belongs to blood that stands still. e_1, the direction of the vessel,
gives an untrained network a flow to start from and keeps a finite.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.jet_mlp import JetMLP

FLUX = math.pi  # mean speed 1 through radius 1
FLUX_FLOOR = 0.05 * math.pi  # below it the scale is held and the flux penalty takes over


@dataclass(frozen=True, eq=False)
class Flow:
    """A velocity and pressure field at the collocation points, in units of U and rho U^2."""

    velocity: Float[Tensor, "5 b n 3"]  # jets
    pressure: Float[Tensor, "5 b n"]  # jets
    section_flux: Float[Tensor, "b s"]  # in U R^2; pi everywhere when mass is conserved
    section_present: Float[Tensor, "b s"]  # 1 or 0

    def flux_error(self) -> Float[Tensor, "b"]:
        """Mean squared relative deviation of the section fluxes from pi."""
        error = (self.section_flux / FLUX - 1).square() * self.section_present
        return error.sum(1) / self.section_present.sum(1).clamp(min=1)


class FlowField(nn.Module):
    """Turns a coordinate network with four outputs into a flow through the lumen.

    Args:
        network: position and latent code to (u, v, w, p).
    """

    def __init__(self, network: JetMLP):
        super().__init__()
        if network.readout.out_features != 4:
            raise ValueError(
                f"A flow has 4 fields (u, v, w, p) but the network has {network.readout.out_features}."
            )
        self.network = network

    def forward(self, latent: Float[Tensor, "b z"], flow: FlowPoints) -> Flow:
        """Evaluates the flow; every row of `flow` must be valid."""
        jet = self.network(flow.points, latent)  # (5, b, n, 4)
        free = torch.cat((jet[:1, ..., :3] + self._along(jet), jet[1:, ..., :3]))
        velocity = product_jet(flow.wall_jet.movedim(-1, 0)[..., None], free)

        b, s, m, _ = flow.section_points.shape
        value = self.network.values(flow.section_points.reshape(b, s * m, 3), latent).reshape(b, s, m, 4)
        through = torch.einsum("bsmi,bsi->bsm", value[..., :3] + self._along(value), flow.section_tangent)
        flux = (flow.section_weight * flow.section_wall * through).sum(-1)  # (b, s)
        present = (flow.section_weight.sum(-1) > 0).to(flux.dtype)
        mean_flux = flux.sum(1) / present.sum(1).clamp(min=1)
        scale = FLUX / mean_flux.clamp(min=FLUX_FLOOR)
        return Flow(velocity * scale[None, :, None, None], jet[..., 3], flux * scale[:, None], present)

    @staticmethod
    def _along(like: Tensor) -> Tensor:
        return like.new_tensor((1.0, 0.0, 0.0))


def product_jet(
    scalar: Float[Tensor, "5 b n 1"], field: Float[Tensor, "5 b n c"]
) -> Float[Tensor, "5 b n c"]:
    """Jet of a product: grad(ab) = a grad b + b grad a, lap(ab) = a lap b + 2 grad a . grad b + b lap a."""
    value, slope, bend = scalar[:1], scalar[1:4], scalar[4:]
    laplacian = bend * field[:1] + 2 * (slope * field[1:4]).sum(0, keepdim=True) + value * field[4:]
    return torch.cat((value * field[:1], slope * field[:1] + value * field[1:4], laplacian))
