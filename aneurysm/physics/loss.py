"""How far a batch of flows is from obeying the equations, with the gradients that training needs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from aneurysm.physics.collocation import hard_point_mean
from aneurysm.physics.curriculum import PhysicsWeights
from aneurysm.physics.flow_field import FlowField, Frozen, SectionFlux
from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.fused_loss import CHUNK, fused_sum
from aneurysm.physics.navier_stokes import navier_stokes_residual


@dataclass(frozen=True, eq=False)
class FlowLoss:
    """What a batch of flows gets wrong; all but `total` are detached."""

    total: Float[Tensor, ""]  # sum over candidates, with gradient
    rows: Float[Tensor, "b"]  # of each candidate, before it was squashed
    mass: Float[Tensor, "b n"]  # squared divergence, (U/R)^2
    force: Float[Tensor, "b n"]  # squared momentum residual, (U^2/R)^2
    weighted: Float[Tensor, "b n"]  # both, as the curriculum weighs them
    velocity: Float[Tensor, "b n 3"]  # U
    through: SectionFlux
    slip: Float[Tensor, "b"]  # mean squared speed on the wall, U^2


def flow_loss(
    field: FlowField,
    code: Float[Tensor, "b z"],
    flow: FlowPoints,
    weights: PhysicsWeights,
    reynolds: Float[Tensor, "b"],
    *,
    hard_fraction: float = 0.2,
    hard_share: float = 0.0,
    importance: Float[Tensor, "b n"] | None = None,
    squash: Callable[[Tensor], Tensor] | None = None,
    chunk: int = CHUNK,
) -> FlowLoss:
    """w_c mean (div u)^2 + w_m mean |momentum|^2 + w_Q flux error + w_s slip, summed over candidates.

    The points go through the network in chunks, forwards and backwards in one sweep, so memory does not grow
    with their number. Differentiable once, with respect to the code and the parameters.

    Args:
        code: of every candidate, in the network's type.
        flow: of the same candidates, all valid, in the network's type.
        reynolds: of every candidate, already capped.
        hard_fraction, hard_share: see `hard_point_mean`.
        importance: weights of the points in the mean, for points not drawn uniformly.
        squash: applied to each candidate's loss before the sum, as log1p.
        chunk: points at a time; all points of a candidate stay together.
    """
    frozen = field.frozen(flow.bulk, flow.driven)
    through = field.section_flux(code, flow)
    slip = field.slip(code, flow, through.scale)
    outer = weights.flux * through.error() + weights.slip * slip
    batch, points = flow.bulk.position.shape[:2]
    kept: list[tuple[Tensor, ...]] = []

    def terms(jet: Tensor, rows: slice, columns: slice, scale: Tensor, outer: Tensor) -> Tensor:
        part = Frozen(frozen.gate[:, rows, columns], frozen.prescribed[:, rows, columns])
        velocity = field.velocity(jet, part, scale[rows])
        continuity, momentum = navier_stokes_residual(velocity, jet[..., 3], reynolds[rows])
        mass, force = continuity.square(), momentum.square().sum(-1)
        weighted = weights.continuity * mass + weights.momentum * force
        counted = weighted if importance is None else weighted * importance[rows, columns]
        loss = hard_point_mean(counted, hard_fraction, hard_share) + outer[rows]
        kept.append(tuple(t.detach() for t in (loss, mass, force, weighted, velocity[0])))
        return (loss if squash is None else squash(loss)).sum()

    total = fused_sum(
        field.network, code, flow.bulk.position, terms, (through.scale, outer), chunk, whole_rows=True
    )
    loss, mass, force, weighted, velocity = (torch.cat(parts) for parts in zip(*kept, strict=True))
    assert len(loss) == batch and mass.shape[1] == points
    return FlowLoss(
        total=total,
        rows=loss,
        mass=mass,
        force=force,
        weighted=weighted,
        velocity=velocity,
        through=replace(through, scale=through.scale.detach(), flux=through.flux.detach()),
        slip=slip.detach(),
    )
