"""Flows that cannot slip and cannot stand still, and their loss against plain differentiation."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from aneurysm.physics.caps import drive
from aneurysm.physics.collocation import hard_point_mean
from aneurysm.physics.curriculum import PhysicsWeights
from aneurysm.physics.flow_field import FlowField, SectionFlux
from aneurysm.physics.flow_points import FlowPoints, collate_flow
from aneurysm.physics.flow_sampling import Numbers, place_flow
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.jets import autograd_jet
from aneurysm.physics.loss import FlowLoss, flow_loss
from aneurysm.physics.navier_stokes import navier_stokes_residual
from aneurysm.physics.reference_vessels import straight_domain
from aneurysm.physics.reference_vessels import tube as formula_tube

WEIGHTS = PhysicsWeights(continuity=1.0, flux=1.0, momentum=0.7, slip=2.0, reynolds_cap=1e3)
HALF = 6.0  # length of the analytic tube to either side, in radii: its caps do not reach the middle
CAPS = straight_domain(formula_tube(HALF), HALF).caps
ALONG = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
CODE = torch.zeros(2, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def batch(tube) -> FlowPoints:
    """A tube and a tube with a sac, of voxels, without caps."""
    return collate_flow([tube().sample(0), tube(shape=(40, 47, 29), sac=(1.0, 1.7)).sample(1)])


@cache
def straight(points: int = 24) -> FlowPoints:
    """The analytic tube twice: driven by its caps, and by its normalisation."""
    numbers, box = Numbers(points, sections=3, section_points=12, wall=10), np.full(3, 9.0)
    domains = [straight_domain(formula_tube(HALF), HALF, caps) for caps in (True, False)]
    placed = [place_flow(domain, numbers, box, np.random.default_rng(1)) for domain in domains]
    assert placed[0] is not None and placed[1] is not None
    return collate_flow([placed[0], placed[1]])


def field_of(seed: int = 0, wall: str = "hard", scale: float = 1.0, width: int = 32) -> FlowField:
    torch.manual_seed(seed)
    field = FlowField(JetMLP(latent_dim=4, width=width), wall)
    with torch.no_grad():
        field.network.readout.weight.mul_(scale)
    return field


def loss_of(field: FlowField, flow: FlowPoints, code: Tensor = CODE) -> FlowLoss:
    return flow_loss(field, code, flow, WEIGHTS, flow.reynolds)


def residual_of(field: FlowField, batch: FlowPoints) -> Tensor:
    flow = field(CODE, batch)
    continuity, momentum = navier_stokes_residual(flow.velocity, flow.pressure, batch.reynolds)
    return (continuity.square() + momentum.square().sum(-1)).mean(1)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_blood_cannot_stand_still(batch, scale):
    """Shrinking the network's output shrinks neither the flux nor the residual."""
    field = field_of(scale=scale)
    flow = field(CODE, batch)
    present = flow.through.present
    mean = (flow.through.flux * present).sum(1) / present.sum(1)
    torch.testing.assert_close(mean, torch.full((2,), math.pi, dtype=torch.float64), rtol=1e-12, atol=0)
    assert flow.velocity[0].norm(dim=-1).mean() > 0.4
    # The pressure drop of the tube, 8 / Re, is the least force that moves this much blood.
    assert (residual_of(field, batch) > (0.5 * 8 / batch.reynolds).square()).all()


def test_standing_blood_has_a_large_loss_with_caps():
    """The flux error alone is 1 where nothing passes any section."""
    flow, silent = straight(200).rows(torch.tensor([0])), field_of(scale=0.0)
    # What the caps ask for dies out within three radii: with a silent network the middle stands still.
    resting = loss_of(silent, flow, CODE[:1])
    assert (resting.through.flux / math.pi)[0].tolist() == pytest.approx([1, 0, 1], abs=1e-6)
    assert resting.rows > 0.6  # 1/3 for the middle section, the rest for profiles that end in nothing
    # With no velocity anywhere the equations hold exactly, and what is left is the flux.
    still = replace(
        flow,
        bulk=replace(flow.bulk, prescribed=torch.zeros_like(flow.bulk.prescribed)),
        section=replace(flow.section, prescribed=torch.zeros_like(flow.section.prescribed)),
    )
    loss = loss_of(silent, still, CODE[:1])
    assert not loss.velocity.any() and not loss.mass.any() and not loss.force.any()
    assert loss.rows.item() == pytest.approx(1, abs=1e-12)


def test_a_network_that_cancels_the_caps_cannot_stop_the_blood():
    """Even one that knows them: on a cap it is silent, and close to it it has to become infinitely loud."""
    flow = straight().rows(torch.tensor([0]))

    def against(points: Tensor) -> Tensor:
        free, prescribed = drive(points, CAPS)
        return -prescribed[0] / free[0].clamp(min=1e-3)[:, None]

    depth = torch.linspace(0, 4, 41).double()
    axis = torch.stack((depth - HALF, 0 * depth, 0 * depth), dim=1)
    free, prescribed = drive(axis, CAPS)
    speed = (prescribed[0] + free[0][:, None] * against(axis))[:, 0]
    assert speed[0] == 2 and against(axis).abs().max() > 1e3  # Poiseuille's on the axis of the cap
    # Where it succeeds nothing passes: the flux error is that of standing blood, plus what the stop costs.
    gate = field_of(scale=0.0).frozen(flow.section, flow.driven)
    velocity = gate.prescribed[0] + gate.gate[0] * against(flow.section.position[0])
    passing = (velocity[0, :, 0].reshape(3, -1) * flow.section_weight[0]).sum(1)[None]
    stopped = SectionFlux(torch.ones(1).double(), passing, flow.section_target, torch.ones_like(passing))
    assert stopped.error() == pytest.approx(1, abs=1e-9)


def test_standing_blood_has_a_large_loss_without_caps():
    """Cancelling e_1 exactly leaves no flux to be scaled up: the flux error is 1."""
    flow = straight().rows(torch.tensor([1]))
    field = field_of(scale=0.0)
    with torch.no_grad():
        field.network.readout.bias[0] = -1
    loss = loss_of(field, flow, CODE[:1])
    assert not loss.velocity.any() and loss.rows.item() == pytest.approx(1, abs=1e-12)
    # Just short of it the scale pays back what is missing.
    with torch.no_grad():
        field.network.readout.bias[0] = -0.9
    assert loss_of(field, flow, CODE[:1]).velocity.norm(dim=-1).mean() == pytest.approx(1, abs=0.25)


def test_reversed_flow_is_held_by_the_penalty(batch):
    """A network that pushes against the vessel cannot flip or blow up the scale; the flux error says so."""
    field = field_of(scale=0.0)
    with torch.no_grad():
        field.network.readout.bias[0] = -1.5
    flow = field(CODE, batch)
    error = flow.through.error()
    assert torch.isfinite(flow.velocity).all() and (error > 1).all()
    error.sum().backward()
    assert field.network.readout.bias.grad[0] < 0  # descent turns the flow round


def test_no_slip_at_the_wall(batch):
    """The speed goes to zero with the wall function whatever the network says."""
    flow = field_of(1)(torch.randn(2, 4).double(), batch)
    wall, speed = batch.bulk.wall[..., 0], flow.velocity[0].norm(dim=-1)
    assert (speed[wall < 0.05].mean() < 0.25 * speed[wall > 0.5].mean()).item()


def test_slip_is_impossible_at_a_hard_wall_and_costs_at_a_soft_one():
    flow = straight()
    code = torch.randn(2, 4).double()
    hard, soft = field_of(2, scale=10.0), field_of(2, "soft", scale=10.0)
    scale = torch.tensor([1.0, 1.7]).double()
    assert hard.slip(code, flow, scale).tolist() == [0, 0]
    # Not only by decree: at the wall the hard flow is still.
    frozen = hard.frozen(flow.shell, flow.driven)
    speed = frozen.prescribed[0] + frozen.gate[0] * hard.network.values(flow.shell.position, code)[..., :3]
    assert speed.abs().max() < 1e-9
    out = scale[:, None, None] * soft.network.values(flow.shell.position, code)[..., :3]
    out = flow.shell.free[..., :1] * out  # silent on the caps, the wall function does not come in
    torch.testing.assert_close(soft.slip(code, flow, scale), out.square().sum(-1).mean(1))
    assert (loss_of(soft, flow, code).slip > 1e-3).all() and not loss_of(hard, flow, code).slip.any()
    without = flow_loss(soft, code, flow, replace(WEIGHTS, slip=0.0), flow.reynolds)
    with_slip = loss_of(soft, flow, code)
    torch.testing.assert_close(with_slip.rows - without.rows, WEIGHTS.slip * with_slip.slip)


def test_wall_shear_of_poiseuille_flow():
    """A silent network without caps: u = 2 (1 - r^2), and 4 mu U / R all around."""
    field, flow = field_of(scale=0.0), straight().rows(torch.tensor([1]))
    state = field(CODE[:1], flow)
    r2 = flow.bulk.position[..., 1:].square().sum(-1)
    torch.testing.assert_close(state.velocity[0, ..., 0], 2 * (1 - r2), rtol=0, atol=1e-12)
    shear = field.wall_shear(CODE[:1], flow, state.through.scale)
    torch.testing.assert_close(shear, torch.full((1, 10), 4.0).double(), rtol=0, atol=1e-9)


def test_velocity_jets_equal_differentiation_where_the_wall_is_known(batch):
    """With a wall function that is 1 everywhere the flow is e_1 and the network, scaled."""
    field = field_of(2)
    open_wall = torch.zeros_like(batch.bulk.wall)
    open_wall[..., 0] = 1
    open_batch = replace(batch, bulk=replace(batch.bulk, wall=open_wall))
    latent = torch.randn(2, 4).double()
    flow = field(latent, open_batch)
    jet = field.network(batch.bulk.position, latent)
    scale = flow.through.scale
    torch.testing.assert_close(flow.velocity[0], scale[:, None, None] * (jet[0, ..., :3] + ALONG))
    torch.testing.assert_close(
        flow.velocity[1:], jet[1:, ..., :3] * scale[None, :, None, None], rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(flow.pressure, jet[..., 3])


def plainly(
    field: FlowField,
    code: Tensor,
    flow: FlowPoints,
    hard_share: float,
    importance: Tensor | None,
    squash: Callable[[Tensor], Tensor],
) -> Tensor:
    """The loss of `straight` from formulas alone, by nested automatic differentiation."""

    def motion(x: Tensor) -> Tensor:
        """(u, v, w, p) before scaling: row 0 with caps, row 1 without."""
        phi = 1 - x[..., 1:2] ** 2 - x[..., 2:] ** 2
        out = field.network.values(x, code)
        free, prescribed = drive(x[0], [cap.placed(np.zeros(3), flow.frame[0].numpy(), 1.0) for cap in CAPS])
        asked = torch.stack((prescribed[0], ALONG.expand_as(x[1])))
        heard = torch.stack((free[0], torch.ones_like(free[0])))[..., None]
        gate = heard * phi if field.wall == "hard" else heard
        return torch.cat((phi * asked + gate * out[..., :3], out[..., 3:]), dim=-1)

    through = motion(flow.section.position)[..., :3].unflatten(1, flow.section_weight.shape[1:])
    flux = (through * flow.section_tangent[:, :, None] * flow.section_weight[..., None]).sum((2, 3))
    scale = torch.stack((torch.ones(()).double(), math.pi / flux[1].mean().clamp(min=0.05 * math.pi)))
    error = ((scale[:, None] * flux / math.pi - 1) ** 2).mean(1)
    slip = (scale[:, None, None] * motion(flow.shell.position)[..., :3]).square().sum(-1).mean(1)

    jet = autograd_jet(motion, flow.bulk.position)
    velocity, push = scale[:, None, None] * jet[..., :3], jet[1:4, ..., 3].movedim(0, -1)
    mass = sum(velocity[1 + i, ..., i] for i in range(3)) ** 2
    carried = sum(velocity[0, ..., j, None] * velocity[1 + j] for j in range(3))
    force = (carried + push - velocity[4] / flow.reynolds[:, None, None]).square().sum(-1)
    counted = WEIGHTS.continuity * mass + WEIGHTS.momentum * force
    counted = counted if importance is None else importance * counted
    rows = hard_point_mean(counted, 0.25, hard_share) + WEIGHTS.flux * error + WEIGHTS.slip * slip
    return squash(rows).sum()


@pytest.mark.parametrize("wall", ["hard", "soft"])
@pytest.mark.parametrize(
    ("hard_share", "weighted", "squash"),
    [(0.0, False, None), (0.4, False, torch.log1p), (0.0, True, torch.log1p), (0.4, True, None)],
)
def test_the_loss_is_that_of_plain_autograd(wall, hard_share, weighted, squash):
    flow, field = straight(), field_of(3, wall, width=8)
    code = torch.randn(2, 4).double().requires_grad_()
    importance = 0.5 + torch.rand(2, 24).double() if weighted else None
    inputs = [code, *field.parameters()]
    plain = plainly(field, code, flow, hard_share, importance, squash or (lambda rows: rows))
    fused = flow_loss(
        field,
        code,
        flow,
        WEIGHTS,
        flow.reynolds,
        hard_fraction=0.25,
        hard_share=hard_share,
        importance=importance,
        squash=squash,
    )
    # Round-off of double precision, which the gradients of a dozen nested derivatives collect.
    torch.testing.assert_close(fused.total, plain, rtol=1e-12, atol=0)
    theirs = torch.autograd.grad(plain, inputs)
    for mine, other in zip(torch.autograd.grad(fused.total, inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("chunk", [1, 30, 48, 10**6])
def test_the_size_of_the_chunks_changes_nothing(chunk):
    flow, field = straight(), field_of(4, width=8)
    code = torch.randn(2, 4).double().requires_grad_()
    inputs = [code, *field.parameters()]
    losses = [
        flow_loss(field, code, flow, WEIGHTS, flow.reynolds, hard_share=0.3, chunk=size)
        for size in (512, chunk)
    ]
    for name, mine in vars(losses[1]).items():
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, getattr(losses[0], name), rtol=1e-12, atol=1e-14)
    mine, theirs = (torch.autograd.grad(loss.total, inputs) for loss in losses)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_what_waits_for_the_backward_pass_does_not_grow_with_the_points():
    def held(points: int) -> int:
        """Numbers that the graph of the loss keeps."""
        waiting, seen, total = [loss_of(field_of(width=8), straight(points)).total.grad_fn], set(), 0
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            parts = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            parts += getattr(node, "grads", [])
            total += sum(part.numel() for part in parts if isinstance(part, Tensor))
            waiting += [parent for parent, _ in node.next_functions]
        return total

    assert held(16) == held(160) > 0


def test_what_is_reported_carries_no_gradient():
    loss = loss_of(field_of(), straight())
    assert loss.total.requires_grad and not loss.through.flux.requires_grad
    assert not any(
        part.requires_grad for name, part in vars(loss).items() if name not in ("total", "through")
    )
    with torch.no_grad():
        assert torch.equal(loss_of(field_of(), straight()).total, loss.total)


def test_needs_four_fields_and_a_known_wall():
    with pytest.raises(ValueError, match="4 fields"):
        FlowField(JetMLP(latent_dim=2, outputs=3))
    with pytest.raises(ValueError, match="hard, soft"):
        FlowField(JetMLP(latent_dim=2), "elastic")
