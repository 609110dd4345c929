"""Flows to be found by training alone, and what is known of them; for `trained_flows` and `collocation`.

Lengths are in the parent vessel's radius R, speeds in its mean speed U, pressures in rho U^2; Re = U R / nu.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aneurysm.physics import reference_vessels as vessels
from aneurysm.physics.collocation import population
from aneurysm.physics.collocation_population import Quotas
from aneurysm.physics.curriculum import Curriculum
from aneurysm.physics.fit import FULL_FORCE, FitSettings, fit_flow
from aneurysm.physics.flow_domain import Domain
from aneurysm.physics.flow_field import FlowField
from aneurysm.physics.flow_points import FlowPoints, Sites
from aneurysm.physics.flow_sampling import Numbers, place_flow
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.loss import FlowLoss, flow_loss
from aneurysm.physics.reference_flows import Dean, Poiseuille

Formula = Callable[[Tensor], Tensor]
GOLDEN = Path(__file__).parents[1] / "tests" / "physics" / "golden_sac_flow.npz"
TUBE_RE, SAC_RE, FORK_RE = 32.0, 32.0, 32.0
DEAN_RE, DEAN_CURVATURE = 40.0, 0.05  # Dean's own Re, on the greatest speed, twice ours
LONG = FitSettings(1000, 5e-3)
SAC_RADIUS, SAC_DISTANCE, SAC_HALF_LENGTH = 1.3, 2.04, 4.0


@dataclass(frozen=True, eq=False)
class Case:
    """One flow and how it is fitted."""

    domain: Domain
    reynolds: float
    truth: Formula | None = None  # position to (u, v, w, p), in the domain's axes
    profile: Formula | None = None  # what the caps ask for, over phi; None for a multiple of phi
    candidate: Callable[[Tensor], Tensor] | None = None  # where the dome's quota of points comes from
    half: tuple[float, float, float] = (9.0, 9.0, 9.0)  # of the box that holds all places
    width: int = 64
    depth: int = 4
    fit: FitSettings = LONG
    points: int = 1024  # per step
    pool: int = 16384
    sampler: str = "r3"
    options: dict[str, Any] | None = None  # of the sampler
    wall_share: float = 0.0
    dome_share: float = 0.0
    curriculum: Curriculum = FULL_FORCE
    shy: float = 0.0  # of the wall: the residual's weight falls as (phi / shy)^2 below this height of phi
    wall: str = "hard"
    still: bool = False  # without caps: nothing makes up for them either

    def draw(self, points: int, seed: int) -> FlowPoints:
        """Places in the fluid; their axes and origin do not depend on the seed."""
        numbers = Numbers(points, 6, 24, 64)
        flow = place_flow(self.domain, numbers, np.array(self.half), np.random.default_rng(seed))
        assert flow is not None
        parts = {name: self.driven(getattr(flow, name), flow) for name in ("bulk", "shell", "section")}
        return replace(flow, **parts, driven=flow.driven | self.still)

    def driven(self, sites: Sites, flow: FlowPoints) -> Sites:
        """The same places with the case's own profile at the caps."""
        if self.profile is None or not self.domain.caps:
            return sites
        return vessels.prescribe(sites, self.domain, flow, self.profile)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A flow that training has found."""

    case: Case
    field: FlowField
    code: Tensor
    seconds: float  # CPU

    def loss(self, flow: FlowPoints) -> FlowLoss:
        """What it gets wrong at places, by the formulation it is judged by: full force and hard flux."""
        with torch.no_grad():
            reynolds = torch.tensor([self.case.reynolds], dtype=torch.float64)
            return flow_loss(self.field, self.code, flow, FULL_FORCE.at(1.0), reynolds)

    def at(self, points: np.ndarray, flow: FlowPoints) -> np.ndarray:
        """Velocity at any places of the domain, in its axes."""
        sites = self.case.driven(vessels.sites_at(self.case.domain, flow, points), flow)
        with torch.no_grad():
            scale = self.field.section_flux(self.code, flow).scale
            jet = self.field.network(sites.position, self.code)
            placed = self.field.velocity(jet, self.field.frozen(sites, flow.driven), scale)[0, 0]
        return (placed @ flow.frame[0]).numpy()

    def over(self, flow: FlowPoints) -> tuple[Tensor, Tensor, Tensor]:
        """Places, velocity and pressure in the bulk of a flow, in the domain's axes."""
        frame, radius = flow.frame[0], flow.radius_mm[0]
        with torch.no_grad():
            state = self.field(self.code, flow)
        position = flow.origin_mm[0] + radius * flow.bulk.position[0] @ frame
        return position, state.velocity[0, 0] @ frame, state.pressure[0, 0]


def untrained(case: Case, seed: int = 0) -> Fitted:
    """A case's network before its first step."""
    torch.manual_seed(seed)
    field = FlowField(JetMLP(2, case.width, case.depth), case.wall)
    return Fitted(case, field, torch.tensor([[1.0, 0.0]], dtype=torch.float64), 0.0)


def fit_case(
    case: Case,
    seed: int = 0,
    watch: Callable[[int, FlowLoss, FlowField, Tensor], None] | None = None,
) -> Fitted:
    """Fit a network of its own to one case; the same seed draws the same network and points."""
    fitted = untrained(case, seed)
    field, code = fitted.field, fitted.code
    flow = case.draw(case.pool, seed=seed + 1000)
    dome = None
    if case.candidate is not None:
        placed = flow.origin_mm[0] + flow.radius_mm[0] * flow.bulk.position[0] @ flow.frame[0]
        dome = case.candidate(placed)[None]
    quotas = Quotas(flow.near_wall, dome, case.wall_share, case.dome_share)
    drawn = population(
        case.sampler, 1, case.pool, case.points, seed=seed, quotas=quotas, **(case.options or {})
    )
    reynolds = torch.tensor([case.reynolds], dtype=torch.float64)
    looked = None if watch is None else lambda step, loss: watch(step, loss, field, code)
    started = time.process_time()
    emphasis = (flow.bulk.wall[..., 0] / case.shy).clamp(max=1) ** 2 if case.shy else None
    fit_flow(field, code, flow, reynolds, case.fit, drawn, case.curriculum, looked, emphasis)
    return replace(fitted, seconds=time.process_time() - started)


def straight(caps: bool = True) -> Case:
    """Poiseuille's flow, between caps or with the flux normalised alone."""
    poiseuille = Poiseuille(viscosity=1 / TUBE_RE)
    domain = vessels.straight_domain(vessels.tube(3.0), 3.0, caps)
    return Case(domain, TUBE_RE, poiseuille, fit=FitSettings(400, 1e-2), points=512, pool=8192)


def guide() -> Case:
    """The straight tube with nothing but the equations and a penalty on slip: standing blood obeys both."""
    alone = replace(FULL_FORCE, flux_weight=0.0)
    return replace(straight(caps=False), wall="soft", still=True, curriculum=alone)


def bend() -> Case:
    """Dean's flow, which Dean's own formula drives at the caps; its greatest speed is 2 U."""
    dean = Dean(viscosity=1 / DEAN_RE, curvature=DEAN_CURVATURE)

    def truth(x: Tensor) -> Tensor:
        flow = dean(_to_dean(x))
        return torch.cat((2 * _from_dean(flow[..., :3]), 4 * flow[..., 3:]), dim=-1)

    return Case(
        vessels.bend_domain(DEAN_CURVATURE),
        DEAN_RE / 2,
        truth,
        profile=lambda x: 2 * _from_dean(dean.over_wall(_to_dean(x))),
    )


def sac(caps: bool = True, ramp: bool = False) -> Case:
    """A tube with a spherical sac, entered by Poiseuille's flow; the lattice-Boltzmann flow is the truth."""
    wall = vessels.tube_with_sac(SAC_HALF_LENGTH, SAC_RADIUS, SAC_DISTANCE)

    def profile(x: Tensor) -> Tensor:
        # 2 a over a + b + sqrt(a^2 + b^2), which is smooth where b < 0: all around the caps.
        a = 1 - x[..., 1] ** 2 - x[..., 2] ** 2
        square = x[..., 0] ** 2 + x[..., 1] ** 2 + (x[..., 2] - SAC_DISTANCE) ** 2
        b = ((SAC_RADIUS**2 - square) / (2 * SAC_RADIUS)).clamp(max=-0.1)
        along = 2 / (1 + a / ((a**2 + b**2).sqrt() - b))
        return along[..., None] * along.new_tensor((1.0, 0.0, 0.0))

    slowly = replace(FULL_FORCE, reynolds_start=4.0, reynolds_end=SAC_RE, reynolds_ramp=0.5)
    return Case(
        vessels.straight_domain(wall, SAC_HALF_LENGTH, caps),
        SAC_RE,
        profile=profile,
        depth=5,
        fit=FitSettings(2000, 5e-3),
        sampler="uniform",
        shy=0.4,
        curriculum=slowly if ramp else FULL_FORCE,
    )


def fork() -> Case:
    """A parent vessel that divides into two equal daughters, with Murray's split at the caps."""
    return Case(
        vessels.fork_domain(),
        FORK_RE,
        candidate=lambda x: (x - x.new_tensor((1.0, 0.0, 0.0))).norm(dim=-1) < 1,  # around the flow divider
        dome_share=0.2,
        fit=FitSettings(1500, 1e-2),
        sampler="uniform",
        curriculum=replace(FULL_FORCE, continuity_weight=100.0, flux_weight=30.0),
    )


def in_sac(x: Tensor) -> Tensor:
    """Which places lie outside the tube that carries the sac."""
    return x[..., 1:].square().sum(-1) > 1


def _to_dean(x: Tensor) -> Tensor:
    """From the bend's axes, whose origin is on the vessel's axis, to Dean's about the centre of the arc."""
    return torch.stack((1 / DEAN_CURVATURE - x[..., 1], x[..., 0], x[..., 2]), dim=-1)


def _from_dean(velocity: Tensor) -> Tensor:
    u, v, w = velocity.unbind(-1)
    return torch.stack((v, -u, w), dim=-1)


def secondary(velocity: Tensor, x: Tensor) -> Tensor:
    """The part of a velocity across the bend's axis."""
    centre = _to_dean(x)
    along = torch.stack((-centre[..., 1], centre[..., 0], torch.zeros_like(centre[..., 0])), dim=-1)
    along = _from_dean(along / along.norm(dim=-1, keepdim=True))
    return velocity - (velocity * along).sum(-1, keepdim=True) * along
