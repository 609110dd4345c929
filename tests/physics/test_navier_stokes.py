"""Both forms of the residual, of networks and across units; known flows are in `test_reference_flows`."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from aneurysm.physics.fluid import CarreauYasuda, Fluid, Scales, murray_speed, reynolds_number
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.jets import JetField, autograd_jet
from aneurysm.physics.navier_stokes import (
    Conditioned,
    compute_navier_stokes_residuals,
    flow_residual,
    navier_stokes_residual,
)
from aneurysm.physics.reference_flows import EthierSteinman, Poiseuille, TaylorGreen

FORMS = ["jets", "autograd"]
FLUID = Fluid(2.0, 0.3)


@pytest.fixture
def points() -> Tensor:
    return torch.rand(2, 25, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5


@pytest.fixture
def network() -> Conditioned:
    return Conditioned(JetMLP(latent_dim=3, width=8, depth=2), torch.randn(2, 3, dtype=torch.float64))


def squares(parts: tuple[Tensor, Tensor]) -> Tensor:
    return parts[0].square().mean() + parts[1].square().mean()


def close(mine: Tensor, theirs: Tensor, to: float = 1e-10) -> None:
    assert (mine - theirs).abs().max() <= to * theirs.abs().max()


@pytest.mark.parametrize("reynolds", [5.0, 130.0, torch.tensor([20.0, 300.0]).double()])
def test_both_forms_agree_on_a_network_and_its_gradients(points, network, reynolds):
    fluid = Fluid.dimensionless(reynolds)
    leaves = (points.requires_grad_(), network.latent.requires_grad_(), *network.network.parameters())
    parts = [flow_residual(network, points, fluid, form=form) for form in FORMS]
    for mine, theirs in zip(*parts, strict=True):
        close(mine, theirs)
    for mine, theirs in zip(*(torch.autograd.grad(squares(part), leaves) for part in parts), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_a_loss(points, network, form):
    def loss(x: Tensor, latent: Tensor, viscosity: Tensor) -> Tensor:
        field = Conditioned(network.network, latent)
        return squares(flow_residual(field, x, Fluid(1.3, viscosity), form=form))

    inputs = (points[:, :2].clone(), network.latent, torch.tensor([0.1, 0.4]).double())
    assert torch.autograd.gradcheck(loss, [part.requires_grad_() for part in inputs])


def test_gradcheck_through_a_viscosity_that_follows_the_shear(points, network):
    blood = CarreauYasuda()

    def loss(latent: Tensor) -> Tensor:
        return squares(flow_residual(Conditioned(network.network, latent), points[:, :2], Fluid(1.3, blood)))

    assert torch.autograd.gradcheck(loss, network.latent.requires_grad_())


def test_any_network_will_do(points):
    plain = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 4)).double()

    @dataclass
    class Jets:
        def jet(self, x: Tensor) -> Tensor:
            return autograd_jet(plain, x)

    assert isinstance(Jets(), JetField) and not isinstance(plain, JetField)
    for mine, theirs in zip(
        flow_residual(plain, points, FLUID), flow_residual(Jets(), points, FLUID), strict=True
    ):
        close(mine, theirs)
    squares(flow_residual(plain, points, FLUID)).backward()
    assert all(p.grad is not None for p in plain.parameters()) and not points.requires_grad


def test_auto_takes_jets_where_they_suffice(points, network):
    class Counted(Conditioned):
        asked = 0

        def jet(self, points: Tensor) -> Tensor:
            Counted.asked += 1
            return super().jet(points)

    field = Counted(network.network, network.latent)
    flow_residual(field, points, FLUID)
    flow_residual(field, points, FLUID, form="autograd")
    flow_residual(field, points, Fluid(1060.0, CarreauYasuda()))
    assert Counted.asked == 1


def test_what_it_refuses(points, network):
    @dataclass
    class OnlyJets:
        jet = network.jet

    for form, field, fluid, says in (
        ("jets", network.__call__, FLUID, r"Conditioned\(network, latent\)"),
        ("jets", network, Fluid(1.0, CarreauYasuda()), "form='autograd'"),
        ("auto", OnlyJets(), Fluid(1.0, CarreauYasuda()), "can be called"),
        ("fast", network, FLUID, "'fast'"),
        ("auto", lambda x: x, FLUID, r"flow must be \(2, 25, 4\)"),
        ("auto", lambda x: network(x).bfloat16(), FLUID, "bfloat16"),
    ):
        with pytest.raises(ValueError, match=says):
            flow_residual(field, points, fluid, form=form)
    with pytest.raises(ValueError, match="points must be"):
        flow_residual(network, points.half(), FLUID)
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        flow_residual(network, points, FLUID, form="autograd")


@pytest.mark.parametrize("form", FORMS)
def test_double_precision_whatever_surrounds_it(points, network, form):
    exact = flow_residual(network, points, FLUID, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        quiet = flow_residual(network, points, FLUID, form=form)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(exact, quiet, strict=True))
    single = JetMLP(latent_dim=3, width=8, depth=2, dtype="float32")
    single.load_state_dict(network.network.state_dict())
    rough = flow_residual(Conditioned(single, network.latent), points.float(), FLUID, form=form)
    for mine, theirs in zip(rough, exact, strict=True):
        assert mine.dtype == torch.float64
        close(mine, theirs, 1e-4)


def test_special_cases_are_the_general_one(points, network):
    reynolds = torch.tensor([20.0, 300.0]).double()
    general = flow_residual(network, points, Fluid.dimensionless(reynolds))
    jet = network.jet(points)
    for mine, theirs in zip(
        navier_stokes_residual(jet[..., :3], jet[..., 3], reynolds), general, strict=True
    ):
        close(mine, theirs, 1e-14)

    flow, blood = EthierSteinman(), Fluid.blood()
    assert (blood.density, blood.viscosity) == (1060.0, 0.0035)
    coords = points[0].clone().requires_grad_()
    parts = compute_navier_stokes_residuals(flow(coords), coords)
    assert all(part.shape == (25, 1) for part in parts)
    continuity, momentum = flow_residual(flow, points[:1], blood)
    close(torch.cat(parts[1:], dim=1), momentum[0], 1e-14)
    assert torch.equal(parts[0][:, 0], continuity[0])
    with pytest.raises(ValueError, match="requires_grad_"):
        compute_navier_stokes_residuals(flow(points[0]), points[0])


@pytest.mark.parametrize("form", FORMS)
def test_si_and_dimensionless_residuals_agree_on_a_flow_that_obeys_neither(points, network, form):
    radius = torch.tensor([1.0, 2.0]).double()
    scales = Scales(radius * 1e-3, murray_speed(radius))
    torch.testing.assert_close(scales.reynolds, reynolds_number(radius))

    @dataclass
    class Dimensional:
        def jet(self, x: Tensor) -> Tensor:
            return autograd_jet(self, x)

        def __call__(self, x: Tensor) -> Tensor:
            flow = network(scales.from_si("points", x))
            velocity = scales.to_si("velocity", flow[..., :3])
            return torch.cat((velocity, scales.to_si("pressure", flow[..., 3:])), dim=-1)

    continuity, momentum = flow_residual(network, points, Fluid.dimensionless(scales.reynolds), form=form)
    si = flow_residual(Dimensional(), scales.to_si("points", points), Fluid.blood(), form=form)
    close(scales.from_si("continuity", si[0]), continuity)
    close(scales.from_si("momentum", si[1]), momentum)
    close(si[1], scales.to_si("momentum", momentum))


def test_units_of_a_two_millimetre_artery():
    units = Scales(2e-3, float(murray_speed(torch.tensor([2.0]).double()))).units
    measured = {"pressure": 48.7, "continuity": 107.1, "momentum": 2.43e4, "wall_shear": 0.375}
    for quantity, value in measured.items():
        assert units[quantity] == pytest.approx(value, rel=2e-3)
    assert (units["points"], units["velocity"]) == (2e-3, pytest.approx(0.2143, rel=1e-3))


def test_wrong_reynolds_number_shows(points):
    _, momentum = flow_residual(Poiseuille(viscosity=1 / 32), points, Fluid.dimensionless(64.0))
    wrong = torch.full((2, 25), 8 / 64 - 8 / 32, dtype=torch.float64)
    torch.testing.assert_close(momentum[..., 0], wrong, rtol=0, atol=1e-12)


def test_murray_numbers_of_a_two_millimetre_artery():
    radius = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(murray_speed(radius), torch.tensor([0.1071, 0.2143]), atol=1e-4, rtol=0)
    torch.testing.assert_close(reynolds_number(radius), torch.tensor([32.4, 129.8]), atol=0.1, rtol=0)


def test_thinning_blood_differs_from_newtonian_blood_where_it_should(points):
    blood = CarreauYasuda()
    shear = torch.tensor([0.0, 1.0, 300.0, 1e5], dtype=torch.float64)
    at = blood(shear)
    assert at[0] == pytest.approx(0.056) and at[3] == pytest.approx(0.00345, rel=0.02)
    assert at[1] > 5 * at[2] and bool((at.diff() < 0).all())
    constant = CarreauYasuda(at_rest=0.0035, at_high_shear=0.0035)
    thin = flow_residual(TaylorGreen(), points, Fluid(1060.0, constant))
    for mine, theirs in zip(thin, flow_residual(TaylorGreen(), points, Fluid.blood()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="largest at rest"):
        CarreauYasuda(at_rest=0.001)
