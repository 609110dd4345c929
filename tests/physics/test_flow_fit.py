"""Whole fits: the physics loss alone finds the flow."""

import pytest
import torch

from aneurysm.physics.flow_points import FlowPoints, collate_flow
from aneurysm.physics.head import PhysicsHead
from aneurysm.physics.navier_stokes import navier_stokes_residual


def fit(head: PhysicsHead, latent: torch.Tensor, flow: FlowPoints, iterations: int) -> None:
    """Full-batch L-BFGS on fixed points, at the final stage of the curriculum."""
    head.eval()
    optimiser = torch.optim.LBFGS(
        head.parameters(), max_iter=iterations, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = head(latent, flow).loss.double().sum()
        loss.backward()
        return loss

    optimiser.step(closure)


def poiseuille_error(head: PhysicsHead, latent: torch.Tensor, flow: FlowPoints) -> float:
    """Relative error against the parabola with flux pi in a tube of the segmented radius."""
    with torch.no_grad():
        state = head.field(head.normalise(latent.double()), flow)
    area = flow.section_weight.sum(-1).mean() / torch.pi
    truth = torch.zeros_like(state.velocity[0])
    r2 = flow.points[..., 1:].square().sum(-1)
    truth[..., 0] = 2 / area * (1 - r2 / area).clamp(min=0)
    return float((state.velocity[0] - truth).norm() / truth.norm())


def test_straight_tube_becomes_poiseuille_flow(tube):
    torch.manual_seed(0)
    vessel = tube(axis=(1.0, 0.2, 0.1))
    head = PhysicsHead(latent_dim=4, points=128)
    latent = torch.randn(1, 4)
    fresh = vessel.sample(seed=9)
    before = poiseuille_error(head, latent, fresh)
    fit(head, latent, vessel.sample(seed=0, n_sections=4), iterations=60)
    after = poiseuille_error(head, latent, fresh)
    assert after < 0.12 and after < 0.5 * before
    out = head(latent, fresh)
    assert out.coherence[0] > 0.99 and out.features[0, -1] < 0.02 and out.residual_log10[0] < -2.5


def test_a_sac_breaks_the_coherence_of_the_flow(tube):
    torch.manual_seed(0)
    shape = (40, 47, 29)
    flow = collate_flow(
        [
            tube(shape=shape).sample(0, n_sections=4),
            tube(shape=shape, sac=(1.3, 2.04)).sample(1, n_sections=4),
        ]
    )
    head = PhysicsHead(latent_dim=2, points=128)
    latent = torch.eye(2)
    fit(head, latent, flow, iterations=60)
    with torch.no_grad():
        out = head(latent, flow)
    straight, sac = dict(zip(head.FEATURES, out.features.T.tolist(), strict=True)), out.coherence
    assert sac[0] > 0.98 and sac[1] < 0.9
    assert straight["slow_fraction"][1] > straight["slow_fraction"][0] + 0.1
    assert straight["backflow_fraction"][0] == 0 and straight["backflow_fraction"][1] > 0


@pytest.mark.slow
def test_straight_tube_to_a_few_percent_with_the_right_pressure_drop(tube):
    torch.manual_seed(0)
    vessel = tube(radius=1.0, shape=(48, 29, 29), spacing=(0.25, 0.25, 0.25))
    head = PhysicsHead(latent_dim=4, points=512)
    latent = torch.randn(1, 4)
    fit(head, latent, vessel.sample(seed=0, n_points=512), iterations=400)
    fresh = vessel.sample(seed=9, n_points=512)
    error = poiseuille_error(head, latent, fresh)
    with torch.no_grad():
        state = head.field(head.normalise(latent.double()), fresh)
        continuity, momentum = navier_stokes_residual(state.velocity, state.pressure, fresh.reynolds)
    area = float(fresh.section_weight.sum(-1).mean()) / torch.pi
    drop = float(state.pressure[1].mean())
    assert error < 0.06
    assert drop == pytest.approx(-8 / float(fresh.reynolds[0]) / area**2, rel=0.1)
    assert continuity.square().mean() < 1e-3 and momentum.square().mean() < 1e-3
