import time

import pytest
import torch
from torch import Tensor

from aneurysm.physics.jet_mlp import JetMLP, Sine, Tanh


def by_autograd(network: JetMLP, points: Tensor, latent: Tensor) -> Tensor:
    """Slow and obvious: nested differentiation of the plain network, output by output."""
    x = points.clone().requires_grad_()
    value = network.values(x, latent)
    channels = []
    for i in range(value.shape[-1]):
        (first,) = torch.autograd.grad(value[..., i].sum(), x, create_graph=True)
        second = [torch.autograd.grad(first[..., j].sum(), x, create_graph=True)[0][..., j] for j in range(3)]
        channels.append(torch.stack((value[..., i], *first.unbind(-1), sum(second))))
    return torch.stack(channels, dim=-1)


@pytest.mark.parametrize("curve", [Tanh(), Sine()])
@pytest.mark.parametrize("depth", [1, 4])
def test_jets_and_their_gradients_equal_nested_autograd(curve, depth):
    torch.manual_seed(0)
    network = JetMLP(latent_dim=5, width=17, depth=depth, outputs=4, activation=curve)
    points = torch.randn(2, 11, 3, dtype=torch.float64)
    latent = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    fast, slow = network(points, latent), by_autograd(network, points, latent)
    assert (fast - slow).abs().max() < 1e-12 * slow.abs().max().clamp(min=1)

    probe = torch.randn_like(fast)
    inputs = (latent, *network.parameters())
    grads = [torch.autograd.grad(((jet * probe).sin()).sum(), inputs) for jet in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max().clamp(min=1)


def test_values_are_the_first_channel():
    torch.manual_seed(1)
    network = JetMLP(latent_dim=3, width=8, depth=2, outputs=6)
    points, latent = torch.randn(3, 7, 3).double(), torch.randn(3, 3).double()
    torch.testing.assert_close(network.values(points, latent), network(points, latent)[0], rtol=0, atol=1e-14)


def test_single_precision_follows_double_precision():
    torch.manual_seed(2)
    double = JetMLP(latent_dim=3, width=16, depth=3)
    single = JetMLP(latent_dim=3, width=16, depth=3, dtype="float32")
    single.load_state_dict(double.state_dict())
    points, latent = torch.randn(2, 9, 3).double(), torch.randn(2, 3).double()
    close = single(points.float(), latent.float()).double()
    assert close.dtype == torch.float64 and (close - double(points, latent)).abs().max() < 1e-4


def test_refuses_half_precision_and_empty_layers():
    with pytest.raises(ValueError, match="Laplacian"):
        JetMLP(latent_dim=3, dtype="float16")
    with pytest.raises(ValueError, match="at least 1"):
        JetMLP(latent_dim=3, depth=0)


@pytest.mark.slow
def test_jets_cost_a_fraction_of_nested_autograd():
    torch.manual_seed(3)
    network = JetMLP(latent_dim=16, width=64, depth=4)
    points, latent = torch.randn(16, 128, 3).double(), torch.randn(16, 16).double()

    def seconds(jets) -> float:
        best = float("inf")
        for _ in range(8):
            start = time.process_time()
            jets().square().mean().backward()
            best = min(best, time.process_time() - start)
        return best

    slow = seconds(lambda: by_autograd(network, points, latent))
    fast = seconds(lambda: network(points, latent))
    assert slow / fast > 3  # 5 on a quiet machine
