"""Every reference flow against both forms of the residual; jets here come from torch.func."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from aneurysm.physics.fluid import Scales
from aneurysm.physics.navier_stokes import flow_residual
from aneurysm.physics.reference_flows import (
    Beltrami,
    Dean,
    EthierSteinman,
    Kovasznay,
    Manufactured,
    Poiseuille,
    PowerLawChannel,
    TaylorGreen,
)

BLOOD = {"density": 1060.0, "viscosity": 0.0035}
FLOWS = [
    Poiseuille(),
    Poiseuille(radius=2e-3, mean_speed=0.2, **BLOOD),
    Kovasznay(viscosity=1 / 8),
    Kovasznay(density=3.0, viscosity=3 / 130),
    TaylorGreen(density=2.0),
    Beltrami(density=2.0, a=0.7),
    EthierSteinman(density=0.5, viscosity=0.2),
    Manufactured(density=3.0, viscosity=0.4),
]


@dataclass(frozen=True)
class WithJets:
    """A formula with jets by forward differentiation, which shares nothing with the plain form."""

    flow: Callable[[Tensor], Tensor]

    def jet(self, points: Tensor) -> Tensor:
        x = points.reshape(-1, 3)
        slope = torch.func.vmap(torch.func.jacfwd(self.flow))(x).movedim(-1, 0)  # (3, n, 4)
        curves = torch.func.vmap(torch.func.jacfwd(torch.func.jacfwd(self.flow)))(x)  # (n, 4, 3, 3)
        bend = curves.diagonal(dim1=-2, dim2=-1).sum(-1)
        return torch.cat((self.flow(x)[None], slope, bend[None])).reshape(5, *points.shape[:2], 4)

    def __call__(self, points: Tensor) -> Tensor:
        return self.flow(points)


def cube(size: float = 1.0) -> Tensor:
    return size * (torch.rand(2, 25, 3, generator=torch.Generator().manual_seed(0)).double() - 0.5)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: f"{type(flow).__name__}-{flow.density:g}")
def test_both_forms_find_the_residual_of_the_formula(flow):
    points = cube(getattr(flow, "radius", 1.0))
    field = WithJets(flow)
    found = [flow_residual(field, points, flow.fluid, form=form) for form in ("jets", "autograd")]
    push = field.jet(points)[1:4, ..., 3].abs().max()  # grad p, one of the terms that must cancel
    rate = flow(points)[..., :3].abs().max() / points.abs().max()
    for got in found:
        for value, exact, term in zip(got, flow.residual(points), (rate, push), strict=True):
            scale = exact.abs().max() if exact.any() else term
            assert (value - exact).abs().max() < 1e-9 * scale
    for mine, theirs, term in zip(*found, (rate, push), strict=True):
        assert (mine - theirs).abs().max() < 1e-10 * term


def test_flows_that_decay_leave_a_residual_and_steady_ones_do_not():
    left = {type(flow).__name__: bool(flow.residual(cube())[1].any()) for flow in FLOWS}
    assert [name for name, some in left.items() if not some] == ["Poiseuille", "Kovasznay"]
    continuity, _ = Manufactured().residual(cube())
    assert continuity.abs().min() > 0


def test_poiseuille_integrates_to_its_flux_and_shears_its_wall():
    flow = Poiseuille(radius=1e-3, mean_speed=1.5 * 1e-3 / (4 * 0.0035), **BLOOD)
    assert flow.wall_shear == pytest.approx(1.5) and flow.pressure_drop == pytest.approx(3000)
    r = (torch.arange(2000).double() + 0.5) / 2000 * flow.radius
    speed = flow(torch.stack((0 * r, r * math.cos(0.3), r * math.sin(0.3)), dim=-1))[:, 0]
    assert float((2 * math.pi * r * speed).sum() * flow.radius / 2000) == pytest.approx(flow.flux, rel=1e-6)
    wall = WithJets(flow).jet(torch.tensor([[[0.0, flow.radius, 0.0]]]).double())[2, 0, 0, 0]
    assert -flow.viscosity * float(wall) == pytest.approx(flow.wall_shear)
    scales = Scales(flow.radius, flow.mean_speed)
    one = Poiseuille(viscosity=1 / scales.reynolds)
    shear = torch.tensor([one.wall_shear * scales.reynolds]).double()  # d u* / d n*, 4
    assert float(scales.to_si("wall_shear", shear)) == pytest.approx(1.5)


@pytest.mark.parametrize("power", [0.5, 0.8, 1.4])
def test_power_law_fluid_between_plates_has_no_residual(power):
    flow = PowerLawChannel(power=power)
    points = cube() + torch.tensor([0.0, 0.8, 0.0]).double()  # off the axis, where the shear is zero
    for part in flow_residual(flow, points, flow.fluid):
        assert part.abs().max() < 1e-9 * flow.pressure_drop
    assert float(flow(torch.tensor([0.0, -1.0, 0.0]).double())[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", ["jets", "autograd"])
def test_residual_of_deans_flow_falls_with_the_square_of_the_curvature(form):
    largest = [dean_residual(curvature, form) for curvature in (0.02, 0.01, 0.005)]
    assert largest[0] == pytest.approx(2.0e-3, rel=0.2)  # Re = 60
    for wide, narrow in pairwise(largest):
        assert 3.8 < wide / narrow < 4.2


def dean_residual(curvature: float, form: str) -> float:
    """Largest residual in the tube, near the angle 0.7 along the bend."""
    flow = Dean(curvature=curvature, viscosity=1 / 60)
    points, *_ = in_the_bend(flow)
    parts = flow_residual(WithJets(flow), points[None], flow.fluid, form=form)
    return max(float(part.detach().abs().max()) for part in parts)


def in_the_bend(flow: Dean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points (n, 3) of the tube and their r, theta from the outer side and angle along the bend."""
    draw = torch.rand(3, 400, generator=torch.Generator().manual_seed(1)).double()
    r, theta, phi = draw[0].sqrt(), 2 * math.pi * draw[1], 0.7 + 0.1 * draw[2]
    radius = 1 / flow.curvature + r * theta.cos()
    return torch.stack((radius * phi.cos(), radius * phi.sin(), r * theta.sin()), dim=-1), r, theta, phi


def test_deans_flow_is_that_of_his_paper():
    flow = Dean(curvature=0.05, viscosity=1 / 40)
    points, r, theta, phi = in_the_bend(flow)
    k, re = 0.05, 40.0
    radial = k * re * theta.cos() * (1 - r**2) ** 2 * (4 - r**2) / 288
    turning = -k * re * theta.sin() * (1 - r**2) * (4 - 23 * r**2 + 7 * r**4) / 288
    skew = -3 / 4 + re**2 * (19 - 21 * r**2 + 9 * r**4 - r**6) / 11520
    along = (1 - r**2) * (1 + k * r * theta.cos() * skew)
    pressure = -4 / re * phi / k + k * r * theta.cos() * (2 * r**4 - 6 * r**2 + 9) / 12
    out = radial * theta.cos() - turning * theta.sin()
    up = radial * theta.sin() + turning * theta.cos()
    x, y = out * phi.cos() - along * phi.sin(), out * phi.sin() + along * phi.cos()
    exact = torch.stack((x, y, up, pressure), dim=-1)
    torch.testing.assert_close(flow(points), exact, rtol=1e-12, atol=1e-12)
    wall = points.new_tensor([[21.0, 0.0, 0.0], [20.0, 0.0, 1.0]])
    assert flow(wall)[:, :3].abs().max() < 1e-15
    assert flow(points.new_tensor([20.0, 0.0, 0.0]))[0] > 0  # outwards in the middle
