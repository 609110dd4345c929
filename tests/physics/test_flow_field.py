import math

import pytest
import torch

from aneurysm.physics.flow_field import FlowField, product_jet
from aneurysm.physics.flow_points import collate_flow
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.navier_stokes import navier_stokes_residual


def test_product_jet_is_the_jet_of_the_product():
    x = torch.randn(1, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def jet(f):
        (first,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        second = sum(
            torch.autograd.grad(first[..., j].sum(), x, create_graph=True)[0][..., j] for j in range(3)
        )
        return torch.stack((f, *first.unbind(-1), second))[..., None]

    a, b = (x[..., 0] * x[..., 1]).sin(), (x.square().sum(-1)).cos()
    torch.testing.assert_close(product_jet(jet(a), jet(b)), jet(a * b), rtol=0, atol=1e-12)


@pytest.fixture
def batch(tube):
    return collate_flow([tube().sample(0), tube(shape=(40, 47, 29), sac=(1.0, 1.7)).sample(1)])


def residual_of(field: FlowField, batch) -> torch.Tensor:
    flow = field(torch.zeros(2, 4).double(), batch)
    continuity, momentum = navier_stokes_residual(flow.velocity, flow.pressure, batch.reynolds)
    return (continuity.square() + momentum.square().sum(-1)).mean(1)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_blood_cannot_stand_still(batch, scale):
    """Shrinking the network's output shrinks neither the flux nor the residual."""
    torch.manual_seed(0)
    field = FlowField(JetMLP(latent_dim=4))
    with torch.no_grad():
        field.network.readout.weight.mul_(scale)
    flow = field(torch.zeros(2, 4).double(), batch)
    present = flow.section_present
    mean = (flow.section_flux * present).sum(1) / present.sum(1)
    torch.testing.assert_close(mean, torch.full((2,), math.pi, dtype=torch.float64), rtol=1e-12, atol=0)
    assert flow.velocity[0].norm(dim=-1).mean() > 0.4
    reynolds, shape = batch.reynolds, residual_of(field, batch)
    # The pressure drop of the tube, 8 / Re, is the least force that moves this much blood.
    assert (shape > (0.5 * 8 / reynolds).square()).all()


def test_reversed_flow_is_held_by_the_penalty(batch):
    """A network that pushes against the vessel cannot flip or blow up the scale; the flux error says so."""
    field = FlowField(JetMLP(latent_dim=4))
    with torch.no_grad():
        field.network.readout.weight.zero_()
        field.network.readout.bias[0] = -1.5
    flow = field(torch.zeros(2, 4).double(), batch)
    assert torch.isfinite(flow.velocity).all() and (flow.flux_error() > 1).all()
    flow.flux_error().sum().backward()
    assert field.network.readout.bias.grad[0] < 0  # descent turns the flow round


def test_no_slip_at_the_wall(batch):
    """The speed goes to zero with the wall function whatever the network says."""
    torch.manual_seed(1)
    flow = FlowField(JetMLP(latent_dim=4))(torch.randn(2, 4).double(), batch)
    wall, speed = batch.wall_jet[..., 0], flow.velocity[0].norm(dim=-1)
    assert (speed[wall < 0.05].mean() < 0.25 * speed[wall > 0.5].mean()).item()


def test_velocity_jets_equal_differentiation_where_the_wall_is_known(batch):
    """With a wall function that is 1 everywhere the flow is the scaled network itself."""
    from dataclasses import replace

    torch.manual_seed(2)
    field = FlowField(JetMLP(latent_dim=4))
    open_wall = torch.zeros_like(batch.wall_jet)
    open_wall[..., 0] = 1
    open_batch = replace(batch, wall_jet=open_wall)
    latent = torch.randn(2, 4).double()
    flow = field(latent, open_batch)
    jet = field.network(batch.points, latent)
    scale = flow.velocity[1, :, :1, 0] / jet[1, :, :1, 0]
    torch.testing.assert_close(
        flow.velocity[1:], jet[1:, ..., :3] * scale[None, :, :, None], rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(flow.pressure, jet[..., 3])


def test_needs_four_fields():
    with pytest.raises(ValueError, match="4 fields"):
        FlowField(JetMLP(latent_dim=2, outputs=3))
