"""Whole fits: the physics loss alone finds the flow."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from aneurysm.physics.collocation import R3Population
from aneurysm.physics.fit import FitSettings, fit_flow, frozen
from aneurysm.physics.flow_points import FlowPoints, collate_flow
from aneurysm.physics.head import PhysicsHead
from aneurysm.physics.loss import FlowLoss
from aneurysm.physics.navier_stokes import navier_stokes_residual
from aneurysm.physics.network_flow import VesselTree

HIGHEST = 130.0  # of the Reynolds number: the curriculum's last cap, at which the head measures


def through(reach: float, radius: float) -> VesselTree:
    """A vessel along the first axis that comes in at -reach and leaves at reach, mm."""
    ends = np.array([[-1.0, 0, 0], [1.0, 0, 0]])
    return VesselTree(
        position=0.9 * reach * ends,
        edges=np.array([[0, 1]]),
        edge_length=np.array([1.8 * reach]),
        edge_radius=np.array([radius]),
        exit_node=np.array([0, 1]),
        exit_position=reach * ends,
        exit_outward=ends,
        exit_radius=np.array([1.01 * radius, radius]),
    )


def fit(
    head: PhysicsHead,
    latent: torch.Tensor,
    flow: FlowPoints,
    steps: int,
    watch: Callable[[int, FlowLoss], None] | None = None,
    optimiser: str = "soap",
) -> None:
    """At the final stage of the curriculum, on fixed points."""
    head.eval()
    code = head.normalise(latent.double())
    reynolds = flow.reynolds.clamp(max=HIGHEST)
    fit_flow(head.field, code, flow, reynolds, FitSettings(steps, optimiser=optimiser), watch=watch)


def poiseuille_error(head: PhysicsHead, latent: torch.Tensor, flow: FlowPoints) -> float:
    """Relative error against the parabola with flux pi in a tube of the segmented radius."""
    with torch.no_grad():
        state = head.field(head.normalise(latent.double()), flow)
    area = flow.section_weight.sum(-1).mean() / torch.pi
    truth = torch.zeros_like(state.velocity[0])
    r2 = flow.bulk.position[..., 1:].square().sum(-1)
    truth[..., 0] = 2 / area * (1 - r2 / area).clamp(min=0)
    return float((state.velocity[0] - truth).norm() / truth.norm())


@pytest.mark.parametrize("driven", [False, True])
def test_straight_tube_becomes_poiseuille_flow(tube, driven):
    torch.manual_seed(0)
    vessel = tube(shape=(32, 29, 29), axis=(1.0, 0.0, 0.0) if driven else (1.0, 0.2, 0.1))
    tree = through(16.0, 4.0) if driven else None
    head = PhysicsHead(latent_dim=4, points=128)
    latent = torch.randn(1, 4)
    fresh = vessel.sample(seed=9, tree=tree)
    assert fresh.driven.item() is driven
    before = poiseuille_error(head, latent, fresh)
    fit(head, latent, vessel.sample(seed=0, n_points=128, n_sections=4, tree=tree), steps=120)
    after = poiseuille_error(head, latent, fresh)
    assert after < 0.06 and after < 0.1 * before
    out = head(latent, fresh)
    assert out.coherence[0] > 0.99 and out.features[0, -1] < 0.02 and out.residual_log10[0] < -2.5


def test_a_silent_network_starts_along_the_centreline_with_the_right_flux(tube):
    head = PhysicsHead(latent_dim=4, points=128).eval()
    with torch.no_grad():
        head.field.network.readout.weight.zero_()
    flow = tube(shape=(32, 29, 29)).sample(tree=through(16.0, 4.0))
    # In a tube that is Poiseuille's flow at once, but for the wall function, which is no exact parabola.
    assert flow.driven.item() and poiseuille_error(head, torch.zeros(1, 4), flow) < 0.05
    assert head(torch.ones(1, 4), flow).features[0, -1] < 0.02


def test_a_sac_breaks_the_coherence_of_the_flow(tube):
    torch.manual_seed(0)
    shape = (40, 47, 29)
    flow = collate_flow(
        [
            tube(shape=shape).sample(0, n_points=192, n_sections=4),
            tube(shape=shape, sac=(1.3, 2.04)).sample(1, n_points=192, n_sections=4),
        ]
    )
    head = PhysicsHead(latent_dim=2, points=192)
    latent = torch.eye(2)
    fit(head, latent, flow, steps=150)
    with torch.no_grad():
        out = head(latent, flow)
    of = dict(zip(head.FEATURES, out.features.T.tolist(), strict=True))
    assert of["coherence"][0] > 0.98 and of["coherence"][1] < 0.9
    assert of["slow_fraction"][1] > of["slow_fraction"][0] + 0.1
    assert of["backflow_fraction"][0] == 0 and of["backflow_fraction"][1] > 0
    assert of["wall_shear_pa"][1] < of["wall_shear_pa"][0]
    assert of["low_shear_fraction"][0] == 0 and of["low_shear_fraction"][1] > 0.1


def test_soap_ends_far_below_adam_at_equal_steps(tube):
    flow, latent = tube().sample(n_points=64, n_sections=3), torch.arange(4.0)[None]

    def course(optimiser: str) -> list[float]:
        torch.manual_seed(0)
        losses: list[float] = []
        head = PhysicsHead(latent_dim=4, points=64)
        fit(head, latent, flow, 80, lambda step, loss: losses.append(float(loss.rows[0])), optimiser)
        return losses

    soap, adam = course("soap"), course("adam")
    assert len(soap) == len(adam) == 80 and soap[0] == adam[0]
    assert adam[-1] < 0.1 * adam[0] and soap[-1] < 0.3 * adam[-1]


def test_what_a_fit_changes(tube):
    flow = collate_flow([tube().sample(0, n_points=64), tube(radius=3.0).sample(1, n_points=64)])
    head, latent = PhysicsHead(latent_dim=4, points=64), torch.randn(2, 4).double()
    held, free = latent.clone(), latent.clone().requires_grad_()
    population = R3Population(batch=2, pool=64, points=32, every=2, retain=0.5)
    before = [p.clone() for p in head.field.parameters()]
    with frozen(head.field):
        fit_flow(head.field, free, flow, flow.reynolds, FitSettings(4), population)
        assert all(p.grad is None for p in head.field.parameters())
    assert all(
        p.requires_grad and torch.equal(p, q) for p, q in zip(head.field.parameters(), before, strict=True)
    )
    assert population.steps == 4 and (free != latent).all()
    fit_flow(head.field, held, flow, flow.reynolds, FitSettings(4), population)
    assert torch.equal(held, latent) and population.retained == 16
    assert all(not torch.equal(p, q) for p, q in zip(head.field.parameters(), before, strict=True))
    kept = [p.clone() for p in head.field.parameters()]
    fit_flow(head.field, held, flow, flow.reynolds, FitSettings(0))
    assert all(torch.equal(p, q) for p, q in zip(head.field.parameters(), kept, strict=True))


@pytest.mark.parametrize("settings", [{"steps": -1}, {"lr": 0.0}, {"optimiser": "sgd"}])
def test_refuses_impossible_settings(settings):
    with pytest.raises(ValueError, match="soap, adam"):
        FitSettings(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("driven", [False, True])
def test_straight_tube_to_a_few_percent_with_the_right_pressure_drop(tube, driven):
    torch.manual_seed(0)
    vessel = tube(radius=1.0, shape=(48, 29, 29), spacing=(0.25, 0.25, 0.25))
    tree = through(6.0, 1.0) if driven else None
    head = PhysicsHead(latent_dim=4, points=512)
    latent = torch.randn(1, 4)
    fit(head, latent, vessel.sample(seed=0, n_points=512, tree=tree), steps=1000)
    fresh = vessel.sample(seed=9, n_points=512, tree=tree)
    error = poiseuille_error(head, latent, fresh)
    with torch.no_grad():
        state = head.field(head.normalise(latent.double()), fresh)
        continuity, momentum = navier_stokes_residual(state.velocity, state.pressure, fresh.reynolds)
    area = float(fresh.section_weight.sum(-1).mean()) / torch.pi
    drop = float(state.pressure[1].mean())
    assert error < 0.06
    assert drop == pytest.approx(-8 / float(fresh.reynolds[0]) / area**2, rel=0.1)
    assert continuity.square().mean() < 1e-3 and momentum.square().mean() < 1e-3
