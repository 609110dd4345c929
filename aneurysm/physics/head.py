"""The physics head: can blood flow through the vessel that a latent code describes, and how."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aneurysm.global_batch import rand_rows, world
from aneurysm.physics.collocation import R3Population, hard_point_mean
from aneurysm.physics.curriculum import Curriculum
from aneurysm.physics.flow_field import Flow, FlowField
from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.jet_mlp import Curve, JetMLP
from aneurysm.physics.navier_stokes import (
    BLOOD_DENSITY,
    BLOOD_VISCOSITY,
    WALL_SHEAR,
    navier_stokes_residual,
    reynolds_number,
)

SLOW = 0.1  # of the parent vessel's mean speed
POISEUILLE_ENERGY = 4 / 3  # mean |u|^2 of the parabolic profile with mean speed 1


@dataclass(frozen=True, eq=False)
class PhysicsOutput:
    """What the head says about a batch; rows that are not valid hold zeros and must be masked by `valid`."""

    loss: Float[Tensor, "b"]  # dimensionless, with gradient
    residual_log10: Float[Tensor, "b"]  # of the mean squared residual over uniform points, detached
    coherence: Float[Tensor, "b"]  # mean cosine between flow and vessel, -1..1, detached
    features: Float[Tensor, "b f"]  # PhysicsHead.FEATURES, detached
    valid: Bool[Tensor, "b"]


class PhysicsHead(nn.Module):
    """Scores how well a flow network, steered by the candidate's latent code, obeys Navier-Stokes.

    Dimensionless per candidate: w_c mean (div u)^2 + w_m mean |momentum|^2 + w_Q mean (Q_s / pi - 1)^2.
    A sac slows and turns the flow: the coherence with the parent vessel falls from 1 in tubes to 0.7 in sacs,
    while the residual itself follows curvature more than disease. The network runs in double precision; the
    latent is normalised per row on entry.

    The gradient that reaches a row of the latent is clipped to `max_latent_gradient` in norm: a stiff flow
    problem must not drown the classifier. 0 turns the physics into an observer.

    Args:
        latent_dim: length of the latent code, at least 2.
        width, depth: hidden units and layers of the flow network.
        points: collocation points used per candidate and step, out of those sampled: a random choice in
            training, the first ones in evaluation.
        activation: of the flow network; tanh when None.
        curriculum: weights over training; the default schedule when None.
        dtype: "float64" or "float32".
        rho: density in kg/m^3.
        mu: viscosity in Pa s.
        wall_shear_pa: wall shear stress in Pa that sets the speed in the parent vessel (Murray).
        retain_fraction: hardest points that R3 emphasises in training.
        retain_share: share of the loss they carry, 0..1; 0 is uniform sampling.
        max_latent_gradient: bound of the gradient norm per latent row.
    """

    FEATURES: ClassVar[tuple[str, ...]] = (
        "log10_continuity",  # mean squared divergence, (U/R)^2
        "log10_momentum",  # mean squared momentum residual, (U^2/R)^2
        "coherence",  # mean cosine between flow and vessel direction
        "nematic_order",  # 1.5 (largest eigenvalue of <uu> - 1/3): 1 when all flow is on one axis
        "backflow_fraction",  # of points with flow against the vessel direction
        "slow_fraction",  # of points slower than a tenth of the mean speed
        "kinetic_energy_ratio",  # to a parabolic profile of the same flux
        "flux_error",  # root mean square relative flux deviation over sections
    )

    def __init__(
        self,
        latent_dim: int = 16,
        width: int = 32,
        depth: int = 3,
        points: int = 128,
        activation: Curve | None = None,
        curriculum: Curriculum | None = None,
        dtype: str = "float64",
        rho: float = BLOOD_DENSITY,
        mu: float = BLOOD_VISCOSITY,
        wall_shear_pa: float = WALL_SHEAR,
        retain_fraction: float = 0.2,
        retain_share: float = 0.3,
        max_latent_gradient: float = 0.1,
    ):
        super().__init__()
        if latent_dim < 2:
            raise ValueError(
                f"latent_dim must be at least 2: a single number normalises to zero; got {latent_dim}."
            )
        if points < 1:
            raise ValueError(
                f"The head needs at least one collocation point per candidate, got points={points}."
            )
        if min(rho, mu, wall_shear_pa) <= 0:
            raise ValueError(f"rho, mu and wall_shear_pa must be positive, got {(rho, mu, wall_shear_pa)}.")
        if not 0 < retain_fraction <= 1 or not 0 <= retain_share <= 1:
            raise ValueError(
                "retain_fraction lies in (0, 1] and retain_share in [0, 1], "
                f"got {retain_fraction} and {retain_share}."
            )
        self.latent_dim = latent_dim
        self.points = points
        self.curriculum = curriculum or Curriculum()
        self.rho, self.mu, self.wall_shear_pa = rho, mu, wall_shear_pa
        self.retain_fraction, self.retain_share = retain_fraction, retain_share
        self.max_latent_gradient = max_latent_gradient
        self.normalise = nn.LayerNorm(latent_dim, elementwise_affine=False)
        self.field = FlowField(JetMLP(latent_dim, width, depth, activation=activation, dtype=dtype))

    @property
    def feature_count(self) -> int:
        """Length of a feature row."""
        return len(self.FEATURES)

    def forward(
        self,
        latent: Float[Tensor, "b z"],
        flow: FlowPoints,
        progress: float = 1.0,
        population: R3Population | None = None,
    ) -> PhysicsOutput:
        """Physics of every candidate; invalid ones cost nothing and get zeros.

        Args:
            latent: latent codes, any floating-point type.
            flow: from `collate_flow`, on the latent's device.
            progress: fraction of training done, 0 to 1, for the curriculum.
            population: collocation points that persist between calls, for repeated fits of one batch whose
                rows are all valid; updated in place.

        Raises:
            ValueError: the latent's shape does not fit the head or the flow.
        """
        batch = latent.shape[0]
        if latent.shape[1] != self.latent_dim or flow.valid.shape[0] != batch:
            raise ValueError(
                f"The head expects latents (b, {self.latent_dim}) with one flow row each but got "
                f"{tuple(latent.shape)} and {flow.valid.shape[0]} flow rows."
            )
        rows = flow.valid.nonzero()[:, 0]
        network = self.field.network
        # Touching every parameter keeps a batch without flow differentiable and distributed training in step.
        nothing = sum((0.0 * p.sum() for p in network.parameters()), latent.new_zeros(batch))
        if len(rows) == 0:
            empty = latent.new_zeros(batch, dtype=torch.float32)
            features = empty[:, None].expand(-1, self.feature_count).clone()
            return PhysicsOutput(nothing.float(), empty, empty, features, flow.valid)

        with torch.autocast(latent.device.type, enabled=False):  # half precision has no second derivatives
            # What comes back here is the gradient times the number of processes, see `global_batch`.
            code = _BoundedGradient.apply(latent[rows], self.max_latent_gradient * world())
            code = self.normalise(code.to(network.dtype))
            chosen = self._choose(flow.points.shape[1], rows, batch, population)
            points = flow.rows(rows).cast(network.dtype).at(chosen)
            weights = self.curriculum.at(progress)
            reynolds = reynolds_number(points.radius_mm, self.rho, self.mu, self.wall_shear_pa)
            state = self.field(code, points)
            continuity, momentum = navier_stokes_residual(
                state.velocity, state.pressure, reynolds.clamp(max=weights.reynolds_cap)
            )
            mass, force = continuity.square(), momentum.square().sum(-1)  # (b, n)
            weighted = weights.continuity * mass + weights.momentum * force
            share = self.retain_share if self.training and population is None else 0.0
            loss = hard_point_mean(weighted, self.retain_fraction, share) + weights.flux * state.flux_error()
            uniform = population.retained if population is not None else 0
            features = _features(state, points.tangent, mass, force, uniform)
            residual = (mass + force)[:, uniform:].mean(1).detach().clamp(min=1e-30).log10()
        if population is not None:
            population.update(weighted)

        def scatter(values: Tensor) -> Tensor:
            full = values.new_zeros(batch, *values.shape[1:], dtype=torch.float32)
            return full.index_copy(0, rows, values.float())

        features = scatter(features)
        return PhysicsOutput(
            loss=scatter(loss) + nothing.float(),
            residual_log10=scatter(residual),
            coherence=features[:, self.FEATURES.index("coherence")],
            features=features,
            valid=flow.valid,
        )

    def _choose(
        self, pool: int, rows: Int[Tensor, "k"], batch: int, population: R3Population | None
    ) -> Tensor:
        """Which of the sampled points to use, (k, points)."""
        if population is not None:
            held = population.indices.shape[0]
            if held != len(rows) or population.pool != pool:
                raise ValueError(
                    f"The population holds {held} candidates with {population.pool} points but "
                    f"the batch has {len(rows)} valid candidates with {pool}."
                )
            return population.indices.to(rows.device)
        count = min(self.points, pool)
        if self.training and count < pool:
            return rand_rows(batch, pool, device=rows.device)[rows].topk(count, dim=1).indices
        return torch.arange(count, device=rows.device).expand(len(rows), -1)


class _BoundedGradient(torch.autograd.Function):
    """The identity, with the gradient of each row clipped in norm on the way back."""

    @staticmethod
    def forward(ctx, latent: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        return latent.view_as(latent)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        norm = grad.norm(dim=1, keepdim=True)
        return grad * (ctx.bound / norm.clamp(min=1e-12)).clamp(max=1.0), None


@torch.no_grad()
def _features(state: Flow, tangent: Tensor, mass: Tensor, force: Tensor, uniform: int) -> Tensor:
    """PhysicsHead.FEATURES per candidate, (b, f), over the uniformly drawn points only."""
    velocity, tangent = state.velocity[0, :, uniform:], tangent[:, uniform:]  # (b, n, 3)
    speed = velocity.norm(dim=-1)
    direction = velocity / speed.clamp(min=1e-12)[..., None]
    along = (direction * tangent).sum(-1)
    spread = direction.mT @ direction / direction.shape[1]  # <uu>, (b, 3, 3)
    return torch.stack(
        (
            mass[:, uniform:].mean(1).clamp(min=1e-30).log10(),
            force[:, uniform:].mean(1).clamp(min=1e-30).log10(),
            along.mean(1),
            1.5 * (torch.linalg.eigvalsh(spread)[:, -1] - 1 / 3),
            (along < 0).to(speed.dtype).mean(1),
            (speed < SLOW).to(speed.dtype).mean(1),
            speed.square().mean(1) / POISEUILLE_ENERGY,
            state.flux_error().sqrt(),
        ),
        dim=1,
    )
