"""The fused sum against autograd through the same network."""

import pytest
import torch

from aneurysm.physics.fused_loss import fused_sum
from aneurysm.physics.jet_mlp import CONDITIONINGS, JetMLP, Sine

REYNOLDS = torch.tensor([12.0, 40.0, 90.0], dtype=torch.float64)
conditionings = pytest.mark.parametrize("conditioning", CONDITIONINGS)


def case(depth: int = 3, curve=None, conditioning: str = "shift", width: int = 12):
    torch.manual_seed(depth)
    net = JetMLP(latent_dim=4, width=width, depth=depth, activation=curve, conditioning=conditioning)
    for parameter in net.parameters():  # far from the start: no bias is zero, codes move gains much
        torch.nn.init.normal_(parameter, std=0.4)
    latent = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    points = torch.rand(3, 50, 3, dtype=torch.float64) * 2 - 1
    scale = torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_()
    return net, latent, points, scale


def physics(jet, rows, columns, scale):
    """Mass and momentum: every channel of every output, multiplied with one another."""
    velocity, pressure = jet[..., :3] * scale[rows][None, :, None, None], jet[1:4, ..., 3].movedim(0, -1)
    slope = velocity[1:4]  # [j, ..., i] = d u_i / d x_j
    mass = slope.diagonal(dim1=0, dim2=-1).sum(-1)
    force = torch.einsum("bnj,jbni->bni", velocity[0], slope) + pressure
    force = force - velocity[4] / REYNOLDS[rows][:, None, None]
    return mass.square().sum() + 0.3 * force.square().sum()


def gradients(total, inputs):
    return torch.autograd.grad(total, inputs)


@conditionings
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("curve", [None, Sine()])
@pytest.mark.parametrize(("chunk", "whole_rows"), [(7, False), (64, True), (10**6, False)])
def test_value_and_gradients_are_those_of_autograd(conditioning, depth, curve, chunk, whole_rows):
    net, latent, points, scale = case(depth, curve, conditioning)
    inputs = [latent, scale, *net.parameters()]
    plain = physics(net(points, latent), slice(None), slice(None), scale)
    fused = fused_sum(net, latent, points, physics, (scale,), chunk, whole_rows)
    # Both add the same numbers in another order: round-off of double precision, nothing else.
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(3 * fused, inputs), gradients(3 * plain, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12 * float(theirs.abs().max()))


@conditionings
def test_gradcheck(conditioning):
    net, latent, points, scale = case(2, None, conditioning, width=5)

    def loss(latent, scale, *parameters):  # gradcheck moves the parameters in place, so the net moves along
        return fused_sum(net, latent, points[:, :5], physics, (scale,), 4)

    assert torch.autograd.gradcheck(loss, (latent, scale, *net.parameters()), fast_mode=True)


def test_whole_rows_keep_the_points_of_a_candidate_together():
    net, latent, points, _ = case()

    def hardest(jet, rows, columns):
        assert jet.shape[2] == 50
        return jet[0, ..., 0].square().topk(10, dim=1).values.mean(1).sum()

    plain = hardest(net(points, latent), slice(None), slice(None))
    fused = fused_sum(net, latent, points, hardest, chunk=60, whole_rows=True)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(gradients(fused, [latent]), gradients(plain, [latent]))


def test_values_of_points_can_be_collected_and_nothing_is_kept_without_a_gradient():
    net, latent, points, _ = case()
    seen = torch.zeros(3, 50, dtype=torch.float64)

    def collecting(jet, rows, columns):
        assert not jet.requires_grad
        seen[rows, columns] = jet.detach()[0, ..., 3]
        return jet[0].sum()

    with torch.no_grad():
        total = fused_sum(net, latent, points, collecting, chunk=16)
    expected = net.values(points, latent)
    torch.testing.assert_close(seen, expected[..., 3].detach())
    torch.testing.assert_close(total, expected.sum().detach())
    assert not total.requires_grad


def test_terms_that_ignore_the_network_or_an_extra():
    net, latent, points, scale = case()
    total = fused_sum(net, latent, points, lambda jet, rows, columns, s: (s[rows] ** 2).sum(), (scale,), 50)
    grads = torch.autograd.grad(total, [scale, latent], allow_unused=True)
    torch.testing.assert_close(grads[0], 2 * scale)
    assert not grads[1].any()
    with pytest.raises(ValueError, match="at least one point"):
        fused_sum(net, latent, points, physics, (scale,), 0)
