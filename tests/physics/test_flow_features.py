"""What the numbers of a flow say about flows that are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from aneurysm.physics.features import FEATURES, POISEUILLE_ENERGY, flow_features
from aneurysm.physics.flow_field import FlowField, SectionFlux
from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.flow_sampling import Numbers, place_flow
from aneurysm.physics.fluid import WALL_SHEAR
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.reference_vessels import straight_domain, tube

COUNT = 4096
MURRAY = WALL_SHEAR / 4  # Pa per mu U / R


def exact_flux(target: float = torch.pi) -> SectionFlux:
    flux = torch.full((1, 3), torch.pi, dtype=torch.float64)
    return SectionFlux(torch.ones(1).double(), flux, torch.full_like(flux, target), torch.ones_like(flux))


def named(values: Tensor) -> dict[str, float]:
    (row,) = values.tolist()
    return dict(zip(FEATURES, row, strict=True))


def measured(
    velocity: Tensor, tangent: Tensor, shear: Tensor | None = None, mass: Tensor | None = None
) -> dict[str, float]:
    """Features of one candidate from (n, 3) velocities and directions."""
    mass = torch.full((1, len(velocity)), 1e-4).double() if mass is None else mass
    shear = torch.full((1, 8), 1.5).double() if shear is None else shear
    return named(flow_features(velocity[None], tangent[None], mass, 100 * mass, shear, exact_flux()))


@pytest.fixture(scope="module")
def tube_points() -> FlowPoints:
    """Of an analytic tube without caps: there a silent network's flow is Poiseuille's."""
    numbers = Numbers(points=COUNT, sections=4, section_points=12, wall=64)
    flow = place_flow(
        straight_domain(tube(), 3.0, caps=False), numbers, np.full(3, 9.0), np.random.default_rng(0)
    )
    assert flow is not None
    return flow


def silent() -> FlowField:
    field = FlowField(JetMLP(latent_dim=2))
    with torch.no_grad():
        field.network.readout.weight.zero_()
    return field


@torch.no_grad()
def test_poiseuille_flow(tube_points):
    code = torch.zeros(1, 2).double()
    field, points = silent(), tube_points
    state = field(code, points)
    r2 = points.bulk.position[0, :, 1:].square().sum(-1)
    torch.testing.assert_close(state.velocity[0, 0, :, 0], 2 * (1 - r2), rtol=0, atol=1e-12)
    shear = MURRAY * field.wall_shear(code, points, state.through.scale)
    nothing = torch.zeros_like(points.bulk.wall[..., 0])
    found = named(flow_features(state.velocity[0], points.tangent, nothing, nothing, shear, state.through))
    assert found["coherence"] == pytest.approx(1, abs=1e-12)
    assert found["nematic_order"] == pytest.approx(1, abs=1e-12)
    assert found["wall_shear_pa"] == pytest.approx(WALL_SHEAR, rel=0.01)
    assert found["low_shear_fraction"] == found["backflow_fraction"] == 0
    # A mean over random points: |u|^2 spreads by 0.89 of its mean, three standard errors are 4 %.
    assert found["kinetic_energy_ratio"] == pytest.approx(1, abs=3 * 0.89 / COUNT**0.5)
    # 2 (1 - r^2) < 0.1 in the outer twentieth of the cross-section.
    assert found["slow_fraction"] == pytest.approx(0.05, abs=3 * (0.05 / COUNT) ** 0.5)
    assert found["flux_error"] < 1e-12
    assert found["log10_continuity"] == found["log10_momentum"] == pytest.approx(-30)


@torch.no_grad()
def test_flow_against_the_vessel(tube_points):
    code = torch.zeros(1, 2).double()
    state = silent()(code, tube_points)
    forward = measured(state.velocity[0, 0], tube_points.tangent[0])
    backward = measured(-state.velocity[0, 0], tube_points.tangent[0])
    assert backward["backflow_fraction"] == 1 and backward["coherence"] == pytest.approx(-1)
    same = set(FEATURES) - {"backflow_fraction", "coherence"}
    assert all(backward[name] == pytest.approx(forward[name], rel=1e-12) for name in same)


def test_order_of_known_directions():
    rng = torch.Generator().manual_seed(0)
    along = torch.tensor([1.0, 0, 0]).double().expand(COUNT, 3)
    to_and_fro = along * torch.randn(COUNT, 1, generator=rng).double().sign()
    found = measured(to_and_fro, along)
    assert found["nematic_order"] == pytest.approx(1) and abs(found["coherence"]) < 0.05
    everywhere = measured(torch.randn(COUNT, 3, generator=rng).double(), along)
    assert everywhere["nematic_order"] < 0.06 and abs(everywhere["coherence"]) < 0.04  # 1.5 and 0.6 / sqrt(n)
    assert everywhere["backflow_fraction"] == pytest.approx(0.5, abs=0.03)
    swirl = torch.nn.functional.normalize(torch.randn(COUNT, 2, generator=rng).double(), dim=1)
    flat = torch.cat((swirl, torch.zeros(COUNT, 1)), dim=1)
    assert measured(flat, along)["nematic_order"] == pytest.approx(0.25, abs=0.03)  # 1.5 (1/2 - 1/3)
    resting = measured(torch.zeros(COUNT, 3).double(), along)
    assert resting["slow_fraction"] == 1 and resting["kinetic_energy_ratio"] == resting["coherence"] == 0


def random_flow(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    tangent = torch.nn.functional.normalize(torch.randn(60, 3, generator=rng).double(), dim=1)
    velocity = tangent + 0.8 * torch.randn(60, 3, generator=rng).double()
    mass = torch.rand(1, 60, generator=rng).double()
    return velocity, tangent, torch.rand(1, 16, generator=rng).double(), mass


def equal(found: dict[str, float], other: dict[str, float]) -> None:
    assert found == pytest.approx(other, rel=1e-12)  # sums in another order: round-off


@pytest.mark.parametrize("seed", range(3))
def test_neither_the_order_of_the_points_nor_the_axes_matter(seed):
    velocity, tangent, shear, mass = random_flow(seed)
    reference = measured(velocity, tangent, shear, mass)
    rng = torch.Generator().manual_seed(seed)
    p, q = torch.randperm(60, generator=rng), torch.randperm(16, generator=rng)
    equal(measured(velocity[p], tangent[p], shear[:, q], mass[:, p]), reference)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng).double()).Q
    equal(measured(velocity @ turn, tangent @ turn, shear, mass), reference)
    # But points and directions belong together.
    assert measured(velocity[p], tangent, shear, mass)["coherence"] != pytest.approx(reference["coherence"])


def test_directions_do_not_depend_on_speed_and_energy_does():
    velocity, tangent, shear, mass = random_flow(0)
    slow, fast = (measured(scale * velocity, tangent, shear, mass) for scale in (1.0, 3.0))
    for name in ("coherence", "nematic_order", "backflow_fraction"):
        assert fast[name] == pytest.approx(slow[name], rel=1e-12)
    assert fast["kinetic_energy_ratio"] == pytest.approx(9 * slow["kinetic_energy_ratio"])
    assert slow["kinetic_energy_ratio"] == pytest.approx(
        float(velocity.square().sum(1).mean()) / POISEUILLE_ENERGY
    )


def test_residuals_shear_and_flux_are_plain_means():
    velocity, tangent, _, _ = random_flow(0)
    mass = torch.tensor([[1e-4, 3e-4]]).double().repeat(1, 30)
    shear = torch.tensor([[0.1, 0.3, 0.5, 2.7]]).double()
    found = measured(velocity, tangent, shear, mass)
    assert found["log10_continuity"] == pytest.approx(np.log10(2e-4))
    assert found["log10_momentum"] == pytest.approx(np.log10(2e-2))
    assert found["wall_shear_pa"] == pytest.approx(0.9) and found["low_shear_fraction"] == 0.5
    missed = replace(exact_flux(0.5 * torch.pi), present=torch.tensor([[1.0, 1.0, 0.0]]).double())
    values = flow_features(velocity[None], tangent[None], mass, mass, shear, missed)
    assert named(values)["flux_error"] == pytest.approx(0.5)


def test_candidates_are_measured_one_by_one():
    flows = [random_flow(seed) for seed in range(2)]
    velocity, tangent = (torch.stack([flow[i] for flow in flows]) for i in (0, 1))
    shear, mass = (torch.cat([flow[i] for flow in flows]) for i in (2, 3))
    one = exact_flux()
    both = SectionFlux(*(torch.cat((part, part)) for part in vars(one).values()))
    together = flow_features(velocity, tangent, mass, 100 * mass, shear, both)
    for row, flow in enumerate(flows):
        equal(named(together[row : row + 1]), measured(*flow))
