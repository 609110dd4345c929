import time

import pytest
import torch
from torch import Tensor

from aneurysm.physics.jet_mlp import CONDITIONINGS, SMALL, JetMLP, Sine, Tanh

conditionings = pytest.mark.parametrize("conditioning", CONDITIONINGS)


def trained(**sizes) -> JetMLP:
    """Far from its initial state: biases are not zero and codes move gains and matrices much."""
    network = JetMLP(**sizes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return network


def by_definition(network: JetMLP, x: Tensor, z: Tensor) -> Tensor:
    """One candidate's outputs at points (n, 3), each conditioning as its paper writes it."""
    layers = [network.position, *network.hidden]
    w, depth, code = network.position.out_features, len(layers), network.latent.weight @ z
    gains, shifts, matrix = torch.ones(depth, w).double(), torch.zeros(depth, w).double(), layers[0].weight
    if network.conditioning == "shift":
        joint = torch.cat((layers[0].weight, network.latent.weight), dim=1)
        h = torch.cat((x, z.expand(len(x), -1)), dim=1) @ joint.T + layers[0].bias
    else:
        if network.conditioning == "film":
            gains, shifts = 1 + code[: depth * w].view(depth, w), code[depth * w :].view(depth, w)
        else:
            matrix, shifts = matrix + code[: 3 * w].view(3, w).T, code[3 * w :].view(depth, w)
        h = gains[0] * (x @ matrix.T) + layers[0].bias + shifts[0]
    for layer, gain, shift in zip(layers[1:], gains[1:], shifts[1:], strict=True):
        h = gain * (network.curve.derivatives(h)[0] @ layer.weight.T) + layer.bias + shift
    return network.readout(network.curve.derivatives(h)[0])


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


@conditionings
@pytest.mark.parametrize("curve", [Tanh(), Sine()])
@pytest.mark.parametrize("depth", [1, 4])
def test_jets_and_their_gradients_equal_nested_autograd(conditioning, curve, depth):
    torch.manual_seed(0)
    network = trained(latent_dim=5, width=17, depth=depth, activation=curve, conditioning=conditioning)
    points = torch.randn(2, 11, 3, dtype=torch.float64)
    latent = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    fast, slow = network(points, latent), by_autograd(network, points, latent)
    assert (fast - slow).abs().max() < 1e-12 * slow.abs().max().clamp(min=1)

    probe = torch.randn_like(fast)
    inputs = (latent, *network.parameters())
    grads = [torch.autograd.grad(((jet * probe).sin()).sum(), inputs) for jet in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max().clamp(min=1)


@conditionings
@pytest.mark.parametrize("depth", [1, 3])
def test_values_are_the_first_channel_and_as_defined(conditioning, depth):
    torch.manual_seed(1)
    network = trained(latent_dim=3, width=8, depth=depth, outputs=6, conditioning=conditioning)
    points, latent = torch.randn(3, 7, 3).double(), torch.randn(3, 3).double()
    values = network.values(points, latent)
    torch.testing.assert_close(values, network(points, latent)[0], rtol=0, atol=1e-14)
    expected = torch.stack([by_definition(network, x, z) for x, z in zip(points, latent, strict=True)])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-13)


def test_the_zero_code_is_the_same_network_under_every_conditioning():
    torch.manual_seed(5)
    shared = {k: v for k, v in trained(latent_dim=3).state_dict().items() if k != "latent.weight"}
    networks = [JetMLP(latent_dim=3, conditioning=name) for name in CONDITIONINGS]
    for network in networks:
        network.load_state_dict(shared, strict=False)
    points, zero = torch.randn(2, 7, 3).double(), torch.zeros(2, 3).double()
    shift, *others = [network(points, zero) for network in networks]
    for jets in others:
        assert torch.equal(jets, shift)


@pytest.mark.parametrize("conditioning", ["film", "hypernetwork"])
def test_a_new_network_starts_close_to_one_for_all(conditioning):
    torch.manual_seed(6)
    network = JetMLP(latent_dim=16, width=64, conditioning=conditioning)
    made = network.latent(torch.randn(100, 16).double())
    assert 0.9 * SMALL < made.std() < 1.1 * SMALL


@conditionings
def test_single_precision_follows_double_precision(conditioning):
    torch.manual_seed(2)
    double = JetMLP(latent_dim=3, width=16, depth=3, conditioning=conditioning)
    single = JetMLP(latent_dim=3, width=16, depth=3, dtype="float32", conditioning=conditioning)
    single.load_state_dict(double.state_dict())
    points, latent = torch.randn(2, 9, 3).double(), torch.randn(2, 3).double()
    close = single(points.float(), latent.float()).double()
    assert close.dtype == torch.float64 and (close - double(points, latent)).abs().max() < 1e-4


def test_refuses_half_precision_empty_layers_and_unknown_conditioning():
    with pytest.raises(ValueError, match="Laplacian"):
        JetMLP(latent_dim=3, dtype="float16")
    with pytest.raises(ValueError, match="at least 1"):
        JetMLP(latent_dim=3, depth=0)
    with pytest.raises(ValueError, match=r"'shift', 'film', 'hypernetwork'.*'concat'"):
        JetMLP(latent_dim=3, conditioning="concat")


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
