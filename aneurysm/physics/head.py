"""The physics head: can blood flow through the vessel that a latent code describes, and how."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aneurysm.global_batch import rand_rows, world
from aneurysm.physics.curriculum import Curriculum
from aneurysm.physics.features import FEATURES, flow_features
from aneurysm.physics.fit import FitSettings, fit_flow
from aneurysm.physics.flow_field import FlowField
from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.fluid import BLOOD_DENSITY, BLOOD_VISCOSITY, WALL_SHEAR, reynolds_number
from aneurysm.physics.jet_mlp import Curve, JetMLP
from aneurysm.physics.loss import FlowLoss, flow_loss
from aneurysm.physics.memory import HardPoints

COLLOCATION = ("uniform", "hard", "r3")
REFINE_LR = 3e-3


@dataclass(frozen=True, eq=False)
class PhysicsOutput:
    """What the head says about a batch; rows that are not valid hold zeros and must be masked by `valid`."""

    total: Float[Tensor, ""]  # sum over valid rows of log(1 + loss), with gradient
    loss: Float[Tensor, "b"]  # dimensionless, detached
    residual_log10: Float[Tensor, "b"]  # of the mean squared residual over uniform points, detached
    features: Float[Tensor, "b f"]  # PhysicsHead.FEATURES, detached
    valid: Bool[Tensor, "b"]
    driven: Bool[Tensor, "b"]  # by caps; else by a normalised flux, which says less of side branches

    @property
    def coherence(self) -> Float[Tensor, "b"]:
        """Mean cosine between flow and vessel, -1..1."""
        return self.features[:, FEATURES.index("coherence")]


class PhysicsHead(nn.Module):
    """Scores how well a flow network, steered by the candidate's latent code, obeys Navier-Stokes.

    Dimensionless per candidate: w_c mean (div u)^2 + w_m mean |momentum|^2 + w_Q flux error + w_s slip.
    Residuals range over decades; the logarithm of 1 + loss is what is summed, so that one badly conditioned
    vessel does not drown the others. A sac slows and turns the flow: the coherence with the parent vessel
    falls from 1 in tubes to 0.7 in sacs, while the residual itself follows curvature more than disease. The
    network runs in double precision; the latent is normalised per row on entry.

    The gradient that reaches a row of the latent is clipped to `max_latent_gradient` in norm: a stiff flow
    problem must not drown the classifier. 0 turns the physics into an observer.

    Args:
        latent_dim: length of the latent code, at least 2.
        width, depth: hidden units and layers of the flow network.
        points: collocation points used per candidate and step, out of those sampled: a random choice in
            training, the first ones in evaluation.
        activation: of the flow network; tanh when None.
        conditioning: how the latent steers the flow network, see `JetMLP`: shift, film or hypernetwork.
        wall: "hard", no slip by construction, or "soft", no slip by a penalty.
        curriculum: weights over training; the default schedule when None.
        dtype: "float64" or "float32".
        rho: density in kg/m^3.
        mu: viscosity in Pa s.
        wall_shear_pa: wall shear stress in Pa that sets the speed in the parent vessel (Murray).
        collocation: how training chooses its points: "uniform"; "hard", uniform with more weight on the
            hardest of them; "r3", the hardest ones of a candidate are kept until they are `every` steps old.
        retain_fraction: of the points, those that count as the hardest.
        retain_share: share of the loss that they carry with "hard", 0..1.
        every: steps between two choices of kept points with "r3".
        near_wall_share, near_candidate_share: of the points, drawn near the wall, and near the candidate.
        max_latent_gradient: bound of the gradient norm per latent row.
        refine_steps: at inference, steps of a fit of its own to every candidate, so that what is reported is
            what this vessel allows; 0 reports what the trained network says. See `refine`.
    """

    FEATURES: ClassVar[tuple[str, ...]] = FEATURES
    foreign_flow: ClassVar[bool] = False  # whether every candidate is to be shown another one's vessel

    def __init__(
        self,
        latent_dim: int = 16,
        width: int = 32,
        depth: int = 3,
        points: int = 128,
        activation: Curve | None = None,
        conditioning: str = "shift",
        wall: str = "hard",
        curriculum: Curriculum | None = None,
        dtype: str = "float64",
        rho: float = BLOOD_DENSITY,
        mu: float = BLOOD_VISCOSITY,
        wall_shear_pa: float = WALL_SHEAR,
        collocation: str = "hard",
        retain_fraction: float = 0.2,
        retain_share: float = 0.3,
        every: int = 100,
        near_wall_share: float = 0.0,
        near_candidate_share: float = 0.0,
        max_latent_gradient: float = 0.1,
        refine_steps: int = 0,
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
        if collocation not in COLLOCATION:
            raise ValueError(f"collocation is one of {', '.join(COLLOCATION)}, got {collocation!r}.")
        shares = (near_wall_share, near_candidate_share)
        if min(shares) < 0 or sum(shares) + (retain_fraction if collocation == "r3" else 0) >= 1:
            raise ValueError(
                "The shares of points near the wall, near the candidate and kept must leave some to the "
                f"whole lumen, got {shares} and retain_fraction={retain_fraction}."
            )
        if refine_steps < 0:
            raise ValueError(f"refine_steps counts steps, at least 0, got {refine_steps}.")
        self.latent_dim = latent_dim
        self.points, self.collocation, self.quota_shares = points, collocation, shares
        self.refine_steps = refine_steps
        self.hard_points = HardPoints(min(retain_fraction, 0.99), every) if collocation == "r3" else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor
        self.curriculum = curriculum or Curriculum()
        self.rho, self.mu, self.wall_shear_pa = rho, mu, wall_shear_pa
        self.retain_fraction, self.retain_share = retain_fraction, retain_share
        self.max_latent_gradient = max_latent_gradient
        self.normalise = nn.LayerNorm(latent_dim, elementwise_affine=False)
        network = JetMLP(
            latent_dim, width, depth, activation=activation, dtype=dtype, conditioning=conditioning
        )
        self.field = FlowField(network, wall)

    @property
    def feature_count(self) -> int:
        """Length of a feature row."""
        return len(self.FEATURES)

    def forward(
        self,
        latent: Float[Tensor, "b z"],
        flow: FlowPoints,
        progress: float = 1.0,
    ) -> PhysicsOutput:
        """Physics of every candidate; invalid ones cost nothing and get zeros.

        Args:
            latent: latent codes, any floating-point type.
            flow: from `collate_flow`, on the latent's device.
            progress: fraction of training done, 0 to 1, for the curriculum.

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
        nothing = sum((0.0 * p.sum() for p in network.parameters()), latent.new_zeros(()))
        if len(rows) == 0:
            empty = latent.new_zeros(batch, dtype=torch.float32)
            features = empty[:, None].expand(-1, self.feature_count).clone()
            return PhysicsOutput(nothing.float(), empty, empty, features, flow.valid, flow.driven)

        with torch.autocast(latent.device.type, enabled=False):  # half precision has no second derivatives
            # What comes back here is the gradient times the number of processes, see `global_batch`.
            code = _BoundedGradient.apply(latent[rows], self.max_latent_gradient * world())
            code = self.normalise(code.to(network.dtype))
            chosen, uniform = self._choose(flow.rows(rows), rows, batch)
            points = flow.rows(rows).cast(network.dtype).at(chosen)
            weights = self.curriculum.at(progress)
            reynolds = self.reynolds(points.radius_mm).clamp(max=weights.reynolds_cap)
            result = flow_loss(
                self.field,
                code,
                points,
                weights,
                reynolds,
                hard_fraction=self.retain_fraction,
                hard_share=self.retain_share if self.training and self.collocation == "hard" else 0.0,
                squash=torch.log1p,
            )
            features = self.measure(code, points, result, uniform)
            residual = (result.mass + result.force)[:, uniform:].mean(1).clamp(min=1e-30).log10()
        if self.training:
            self.steps += 1
            if self.hard_points is not None:
                self.hard_points.update(points.key, chosen, result.weighted, int(self.steps))

        def scatter(values: Tensor) -> Tensor:
            full = values.new_zeros(batch, *values.shape[1:], dtype=torch.float32)
            return full.index_copy(0, rows, values.float())

        return PhysicsOutput(
            total=(result.total + nothing).float(),
            loss=scatter(result.rows),
            residual_log10=scatter(residual),
            features=scatter(features),
            valid=flow.valid,
            driven=flow.driven,
        )

    def reynolds(self, radius_mm: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Of vessels of these radii, with Murray's speed in the head's blood."""
        return reynolds_number(radius_mm, self.rho, self.mu, self.wall_shear_pa)

    @torch.no_grad()
    def measure(
        self,
        code: Float[Tensor, "b z"],
        flow: FlowPoints,
        result: FlowLoss,
        uniform: int = 0,
        field: FlowField | None = None,
    ) -> Float[Tensor, "b f"]:
        """FEATURES of flows whose loss has just been taken, over the points from column `uniform` on."""
        # In units of mu U / R, which with Murray's speed is a quarter of the wall shear of a straight vessel.
        shear = (field or self.field).wall_shear(code, flow, result.through.scale) * self.wall_shear_pa / 4
        mass, force, velocity = (t[:, uniform:] for t in (result.mass, result.force, result.velocity))
        return flow_features(velocity, flow.tangent[:, uniform:], mass, force, shear, result.through)

    def refine(self, latent: Float[Tensor, "b z"], flow: FlowPoints) -> PhysicsOutput:
        """Every candidate's own flow: a copy of the network, fitted to its vessel alone for `refine_steps`.

        What is measured afterwards is measured on all of its points, which are uniform.
        """
        batch, dtype = latent.shape[0], self.field.network.dtype
        with torch.inference_mode(False), torch.autocast(latent.device.type, enabled=False):
            residual = torch.zeros(batch, device=latent.device)
            loss, features = residual.clone(), residual[:, None].repeat(1, self.feature_count)
            rows = flow.valid.nonzero()[:, 0]
            for row in rows.tolist():
                field = copy.deepcopy(self.field)
                field.requires_grad_(True)
                code = self.normalise(latent[row : row + 1].detach().clone().to(dtype))
                own = flow.rows(torch.tensor([row], device=latent.device)).cast(dtype)
                own = own.map(lambda tensor: tensor.clone())  # no tensors of inference mode in a fit
                reynolds = self.reynolds(own.radius_mm)
                reynolds = reynolds.clamp(max=self.curriculum.reynolds_end)
                with torch.enable_grad():
                    fit_flow(field, code, own, reynolds, FitSettings(self.refine_steps, REFINE_LR))
                with torch.no_grad():
                    result = flow_loss(field, code, own, self.curriculum.at(1.0), reynolds)
                features[row] = self.measure(code, own, result, field=field)[0].float()
                residual[row] = (result.mass + result.force).mean().clamp(min=1e-30).log10().float()
                loss[row] = result.rows[0].float()
        nothing = torch.zeros((), device=latent.device)
        return PhysicsOutput(nothing, loss, residual, features, flow.valid, flow.driven)

    def get_extra_state(self) -> dict[str, Any]:
        """The kept points, for checkpoints."""
        return {} if self.hard_points is None else self.hard_points.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Go on with the kept points of a checkpoint."""
        if self.hard_points is not None and state:
            self.hard_points.load_state_dict(state)

    def _choose(self, flow: FlowPoints, rows: Int[Tensor, "k"], batch: int) -> tuple[Tensor, int]:
        """Which of the sampled points to use, (k, points), and from which column on they are uniform.

        Every process draws for the whole batch and takes its rows, so that their number changes nothing.
        """
        pool, device = flow.tangent.shape[1], rows.device
        count = min(self.points, pool)
        if not self.training:
            return torch.arange(count, device=device).expand(len(rows), -1), 0

        def draw(many: int, first: Tensor | None = None) -> Tensor:
            """So many points without repetition, those of a mask before all others."""
            order = rand_rows(batch, pool, device=device)[rows]
            return (order if first is None else order + first).topk(many, dim=1).indices

        parts = []
        if self.hard_points is not None:
            kept = draw(self.hard_points.count(count))
            parts.append(self.hard_points.recall(flow.key, kept, pool))
        for share, mask in zip(self.quota_shares, (flow.near_wall, flow.near_candidate), strict=True):
            if many := round(share * count):
                parts.append(draw(many, mask))
        uniform = sum(part.shape[1] for part in parts)
        if count < pool:
            parts.append(draw(count - uniform))
        else:
            parts.append(torch.arange(count - uniform, device=device).expand(len(rows), -1))
        return torch.cat(parts, dim=1), uniform


class PlaceboHead(PhysicsHead):
    """The same head, to be shown the vessels of other candidates: does its physics help, or its size?"""

    foreign_flow = True


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
