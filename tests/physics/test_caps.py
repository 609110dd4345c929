"""What caps prescribe: exact jets, and a flux that no network can change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from aneurysm.physics.caps import BACKGROUND, FULL, GONE, RISE, Cap, Guide, drive
from aneurysm.physics.flow_field import FlowField
from aneurysm.physics.flow_points import FlowPoints, Sites
from aneurysm.physics.flow_sampling import Numbers, place_flow
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.jets import autograd_jet
from aneurysm.physics.reference_vessels import straight_domain, tube
from aneurysm.physics.sections import cut_across, star_quadrature


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def random_caps(seed: int, count: int = 3) -> list[Cap]:
    """Caps whose influences overlap, as in a narrow fork."""
    rng = np.random.default_rng(seed)
    return [
        Cap(rng.normal(size=3), unit(rng.normal(size=3)), rng.uniform(0.5, 1.5), rng.normal())
        for _ in range(count)
    ]


def random_guide(seed: int) -> Guide:
    rng = np.random.default_rng([seed, 2])
    return Guide(rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.uniform(0.4, 1.2, 6))


def around(caps: list[Cap], seed: int, count: int = 200) -> Tensor:
    """Points up to a little beyond the reach of the caps, on both sides of them."""
    rng = np.random.default_rng([seed, 1])
    middle = np.array([cap.centre for cap in caps])[rng.integers(len(caps), size=count)]
    return torch.tensor(middle + rng.uniform(-2, 2, (count, 3)))


def on_disc(cap: Cap, reach: float, count: int = 50) -> Tensor:
    """Points of the cap's plane within `reach` radii of its centre."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(count, 3))
    flat -= (flat @ cap.inward)[:, None] * cap.inward
    flat *= (reach * cap.radius * rng.uniform(0, 1, count) / np.linalg.norm(flat, axis=1))[:, None]
    return torch.tensor(cap.centre + flat)


def written_out(caps: list[Cap], guide: Guide | None, x: Tensor) -> Tensor:
    """chi and the prescribed velocity as plain functions of position, (n, 4)."""
    free, prescribed = torch.ones_like(x[:, 0]), torch.zeros_like(x)
    for cap in caps:
        centre, inward = torch.tensor(cap.centre), torch.tensor(cap.inward)
        low, high = (FULL * cap.radius) ** 2, (GONE * cap.radius) ** 2
        t = (((x - centre).square().sum(-1) - low) / (high - low)).clamp(0, 1)
        near = 1 - 35 * t**4 + 84 * t**5 - 70 * t**6 + 20 * t**7
        depth = (x - centre) @ inward / (RISE * cap.radius)
        free = free * (1 - near * (1 - depth).clamp(min=0) ** 4)
        prescribed = prescribed + cap.strength * near[:, None] * inward
    if guide is not None:
        weight, run = torch.zeros_like(free), torch.zeros_like(prescribed)
        for position, velocity, radius in zip(guide.position, guide.velocity, guide.radius, strict=True):
            near = torch.exp(-0.5 * (x - torch.tensor(position)).square().sum(-1) / radius**2)
            weight, run = weight + near, run + near[:, None] * torch.tensor(velocity)
        run = run / (weight + BACKGROUND)[:, None]
        prescribed = (1 - free)[:, None] * prescribed + free[:, None] * run
    return torch.cat((free[:, None], prescribed), dim=1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_jets_are_those_of_nested_autograd(seed, guided):
    caps, guide = random_caps(seed), random_guide(seed) if guided else None
    points = around(caps, seed)
    free, prescribed = drive(points, caps, guide)
    mine = torch.cat((free[..., None], prescribed), dim=-1)
    theirs = autograd_jet(lambda x: written_out(caps, guide, x), points)
    for row in range(5):  # each derivative against its own size
        largest = float(theirs[row].detach().abs().max())
        torch.testing.assert_close(mine[row], theirs[row], rtol=0, atol=1e-9 * largest)


def test_the_network_is_silent_on_a_cap_and_free_far_from_it():
    (cap,) = random_caps(3, count=1)
    free, prescribed = drive(on_disc(cap, FULL), [cap])
    assert free[0].abs().max() < 1e-12
    expected = torch.tensor(cap.strength * cap.inward).expand(50, 3)
    torch.testing.assert_close(prescribed[0], expected, rtol=1e-12, atol=0)
    assert not prescribed[1:].any()  # flat: nothing but the wall function shapes the profile
    assert (free[1:4].norm(dim=0) > 1 / cap.radius).all()  # the network may act right behind the cap

    away = torch.tensor(
        cap.centre + 1.001 * GONE * cap.radius * unit(np.random.default_rng(0).normal(size=(1, 3)))
    )
    free, prescribed = drive(away, [cap])
    assert free[:, 0].tolist() == [1, 0, 0, 0, 0] and not prescribed.any()
    inside = torch.tensor(cap.centre + RISE * cap.radius * cap.inward)[None]
    assert drive(inside, [cap])[0][0] == 1


def test_a_guide_leads_from_cap_to_cap_and_changes_neither():
    caps, guide = random_caps(5, count=1), random_guide(5)
    (cap,) = caps
    for points in (on_disc(cap, FULL), on_disc(cap, 0.5 * FULL)):
        torch.testing.assert_close(
            drive(points, caps, guide)[1][0], drive(points, caps)[1][0], rtol=0, atol=1e-12
        )
    # Where the network is free only the guide counts: beside the cap both would be too much.
    inside = on_disc(cap, 0.5) + 1.001 * RISE * cap.radius * torch.tensor(cap.inward)
    assert drive(inside, caps)[1][0].abs().max() > 0
    torch.testing.assert_close(drive(inside, caps, guide)[1], guide.jet(inside), rtol=0, atol=1e-12)
    # One point of a guide alone: its own velocity, shared with the standing blood around it.
    one = Guide(np.zeros((1, 3)), np.array([[2.0, -1.0, 0.5]]), np.ones(1))
    steps = torch.tensor([[0.0, 0, 0], [0, 1, 0], [30, 0, 0]]).double()
    weight = torch.tensor([1, np.exp(-0.5), 0])
    expected = (weight / (weight + BACKGROUND))[:, None] * torch.tensor(one.velocity)
    torch.testing.assert_close(one.jet(steps)[0], expected, rtol=0, atol=1e-12)


def test_nothing_is_prescribed_without_caps():
    free, prescribed = drive(torch.zeros(4, 3, dtype=torch.float64), [])
    assert (free[0] == 1).all() and not free[1:].any() and not prescribed.any()


def test_only_what_is_near_is_behind_a_cap():
    cap = Cap(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0]), 0.5, 2.0)
    steps = np.array([[0, 0, -0.1], [0, 0, 0.1], [1.0, 0, -0.5], [1.6, 0, -0.1], [0, 0, -1.6]])
    np.testing.assert_array_equal(cap.behind(cap.centre + steps), [True, False, True, False, False])


def test_other_axes_and_units_change_nothing():
    caps, rng = random_caps(4), np.random.default_rng(4)
    points, origin, scale = around(caps, 4), rng.normal(size=3), 2.5
    frame = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned = torch.tensor(frame)
    guide = random_guide(4)
    free, prescribed = drive(points, caps, guide)
    moved = (points - torch.tensor(origin)) @ turned.T / scale
    placed = [cap.placed(origin, frame, scale) for cap in caps]
    other_free, other_prescribed = drive(moved, placed, guide.placed(origin, frame, scale))
    torch.testing.assert_close(other_free[0], free[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(other_free[1:4], scale * turned @ free[1:4], rtol=0, atol=1e-10)
    torch.testing.assert_close(other_free[4], scale**2 * free[4], rtol=0, atol=1e-9)
    torch.testing.assert_close(other_prescribed[0], prescribed[0] @ turned.T, rtol=0, atol=1e-11)


def cap_sections(flow: FlowPoints) -> FlowPoints:
    """The points of a tube of half-length 3 with sections that are its two caps."""
    wall, ends = tube(), np.array([[-3.0, 0, 0], [3.0, 0, 0]])
    normal = np.array([[1.0, 0, 0], [1.0, 0, 0]])
    centre, rays, distance, closed = cut_across(wall, ends, normal, np.ones(2), 8)
    assert closed.all()
    position, area = star_quadrature(centre, rays, distance)
    points = position.reshape(-1, 3)
    free, prescribed = drive(torch.tensor(points), straight_domain(wall, 3.0).caps)
    section = Sites(
        torch.tensor(points)[None],
        torch.tensor(wall.jet(points))[None],
        free.T[None],
        prescribed.movedim(0, 1)[None],
    )
    return replace(
        flow,
        section=section,
        section_weight=torch.tensor(area)[None],
        section_tangent=torch.tensor(normal)[None],
        section_target=torch.full((1, 2), torch.pi, dtype=torch.float64),
    )


@pytest.mark.parametrize("wall", ["hard", "soft"])
def test_the_flux_through_a_cap_is_what_it_asks_for_whatever_the_network_says(wall):
    numbers = Numbers(points=8, sections=2, section_points=12, wall=8)
    flow = place_flow(straight_domain(tube(), 3.0), numbers, np.full(3, 9.0), np.random.default_rng(0))
    flow = cap_sections(flow)
    for seed in range(5):
        torch.manual_seed(seed)
        field = FlowField(JetMLP(latent_dim=3), wall)
        with torch.no_grad():  # speeds of some hundred U wherever the network is heard
            field.network.readout.weight.mul_(100)
        through = field.section_flux(torch.randn(1, 3).double(), flow)
        # Gauss's points integrate the parabola exactly: what remains is round-off.
        torch.testing.assert_close(through.flux, through.target, rtol=1e-12, atol=0)
        assert through.error() < 1e-20
