"""Flows with a known residual: derivatives of the formulas come from nested autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aneurysm.physics.navier_stokes import (
    CarreauYasuda,
    compute_navier_stokes_residuals,
    murray_speed,
    navier_stokes_residual,
    reynolds_number,
)

Field = Callable[[Tensor], Tensor]  # (n, 3) -> (n, 4) = u, v, w, p


def jets(field: Field, points: Tensor) -> Tensor:
    """(5, 1, n, 4) by nested differentiation."""
    x = points.clone().requires_grad_()
    value = field(x)
    channels = []
    for i in range(4):
        first = _grad(value[:, i], x)
        second = sum(_grad(first[:, j], x)[:, j] for j in range(3))
        channels.append(torch.stack((value[:, i], *first.unbind(1), second)))
    return torch.stack(channels, dim=-1)[:, None].detach()


def _grad(field: Tensor, x: Tensor) -> Tensor:
    if not field.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(field.sum(), x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def residual(field: Field, points: Tensor, reynolds: float) -> tuple[Tensor, Tensor]:
    jet = jets(field, points)
    continuity, momentum = navier_stokes_residual(
        jet[..., :3], jet[..., 3], torch.tensor([reynolds], dtype=torch.float64)
    )
    return continuity[0], momentum[0]


def poiseuille(reynolds: float) -> Field:
    def field(x: Tensor) -> Tensor:
        u = 2 * (1 - x[:, 1] ** 2 - x[:, 2] ** 2)
        return torch.stack((u, 0 * u, 0 * u, -8 / reynolds * x[:, 0]), dim=1)

    return field


def kovasznay(reynolds: float) -> Field:
    rate = reynolds / 2 - math.sqrt(reynolds**2 / 4 + 4 * math.pi**2)

    def field(x: Tensor) -> Tensor:
        decay, wave = torch.exp(rate * x[:, 0]), 2 * math.pi * x[:, 1]
        return torch.stack(
            (
                1 - decay * wave.cos(),
                rate / (2 * math.pi) * decay * wave.sin(),
                0 * decay,
                (1 - decay**2) / 2,
            ),
            dim=1,
        )

    return field


def taylor_green(x: Tensor) -> Tensor:
    a, b = x[:, 0], x[:, 1]
    return torch.stack(
        (a.sin() * b.cos(), -a.cos() * b.sin(), 0 * a, ((2 * a).cos() + (2 * b).cos()) / 4), dim=1
    )


def ethier_steinman(point: Tensor, a: float = math.pi / 4, d: float = math.pi / 2) -> Tensor:
    x, y, z = point.unbind(1)

    def component(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
        return -a * ((a * p).exp() * (a * q + d * r).sin() + (a * r).exp() * (a * p + d * q).cos())

    def cross(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
        return 2 * (a * p + d * q).sin() * (a * r + d * p).cos() * (a * (q + r)).exp()

    energy = (2 * a * x).exp() + (2 * a * y).exp() + (2 * a * z).exp()
    pressure = -(a**2) / 2 * (energy + cross(x, y, z) + cross(y, z, x) + cross(z, x, y))
    return torch.stack((component(x, y, z), component(y, z, x), component(z, x, y), pressure), dim=1)


@pytest.fixture
def points() -> Tensor:
    return torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5


@pytest.mark.parametrize("flow", [poiseuille, kovasznay])
@pytest.mark.parametrize("reynolds", [8.0, 32.0, 130.0])
def test_exact_solutions_have_no_residual(points, flow, reynolds):
    continuity, momentum = residual(flow(reynolds), points, reynolds)
    assert continuity.abs().max() < 1e-13 and momentum.abs().max() < 1e-12


def test_frozen_decaying_flows_leave_their_known_viscous_residual(points):
    reynolds, d = 20.0, math.pi / 2
    for flow, rate in ((taylor_green, 2.0), (ethier_steinman, d**2)):
        continuity, momentum = residual(flow, points, reynolds)
        assert continuity.abs().max() < 1e-13
        torch.testing.assert_close(momentum, rate / reynolds * flow(points)[:, :3], rtol=0, atol=1e-12)


def test_wrong_reynolds_number_shows(points):
    _, momentum = residual(poiseuille(32.0), points, 64.0)
    torch.testing.assert_close(
        momentum[:, 0], torch.full((50,), 8 / 64 - 8 / 32, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_si_oracle_knows_poiseuille(points):
    radius, mu = 1e-3, 0.0035
    speed = 1.5 * radius / (4 * mu)
    coords = (points * radius).requires_grad_()
    r2 = (coords[:, 1] ** 2 + coords[:, 2] ** 2) / radius**2
    u = 2 * speed * (1 - r2)
    p = -8 * mu * speed / radius**2 * coords[:, 0]
    output = torch.stack((u, 0 * u, 0 * u, p), dim=1)
    residuals = compute_navier_stokes_residuals(output, coords)
    assert all(r.shape == (50, 1) for r in residuals)
    assert max(r.abs().max() for r in residuals) < 1e-9  # Pa/m, against a pressure gradient of 3000 Pa/m


def test_si_and_dimensionless_residuals_agree_on_a_flow_that_obeys_neither(points):
    radius, rho, mu = 2e-3, 1060.0, 0.0035
    speed = float(murray_speed(torch.tensor([2.0], dtype=torch.float64)))
    reynolds = float(reynolds_number(torch.tensor([2.0]).double()))
    continuity, momentum = residual(ethier_steinman, points, reynolds)
    coords = (points * radius).requires_grad_()
    scale = torch.tensor([speed, speed, speed, rho * speed**2], dtype=torch.float64)
    mass, *force = compute_navier_stokes_residuals(ethier_steinman(coords / radius) * scale, coords, rho, mu)
    torch.testing.assert_close(mass[:, 0] * radius / speed, continuity, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.cat(force, dim=1) * radius / (rho * speed**2), momentum, rtol=1e-10, atol=1e-12
    )


def test_murray_numbers_of_a_two_millimetre_artery():
    radius = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(murray_speed(radius), torch.tensor([0.1071, 0.2143]), atol=1e-4, rtol=0)
    torch.testing.assert_close(reynolds_number(radius), torch.tensor([32.4, 129.8]), atol=0.1, rtol=0)


@pytest.mark.parametrize("power", [0.5, 0.8, 1.4])
def test_power_law_fluid_between_plates_has_no_residual(points, power: float):
    consistency, drop = 0.01, 3.0  # Pa s^n, Pa/m

    def viscosity(shear: Tensor) -> Tensor:
        return consistency * shear ** (power - 1)

    coords = (points + torch.tensor([0.0, 0.8, 0.0], dtype=torch.float64)).requires_grad_()  # off the axis
    order = (power + 1) / power
    u = (drop / consistency) ** (1 / power) / order * (1 - coords[:, 1].abs() ** order)
    output = torch.stack((u, 0 * u, 0 * u, -drop * coords[:, 0]), dim=1)
    residuals = compute_navier_stokes_residuals(output, coords, mu=viscosity)
    assert max(float(r.detach().abs().max()) for r in residuals) < 1e-9 * drop


def test_thinning_blood_differs_from_newtonian_blood_where_it_should(points):
    blood = CarreauYasuda()
    shear = torch.tensor([0.0, 1.0, 300.0, 1e5], dtype=torch.float64)
    at = blood(shear)
    assert at[0] == pytest.approx(0.056) and at[3] == pytest.approx(0.00345, rel=0.02)
    assert at[1] > 5 * at[2] and bool((at.diff() < 0).all())
    coords = points.clone().requires_grad_()
    output = ethier_steinman(coords)
    constant = CarreauYasuda(at_rest=0.0035, at_high_shear=0.0035)
    thin = compute_navier_stokes_residuals(output, coords, mu=constant)
    plain = compute_navier_stokes_residuals(output, coords, mu=0.0035)
    for mine, theirs in zip(thin, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="largest at rest"):
        CarreauYasuda(at_rest=0.001)


def test_oracle_asks_for_a_gradient(points):
    with pytest.raises(ValueError, match="requires_grad_"):
        compute_navier_stokes_residuals(taylor_green(points), points)
