import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aneurysm.nets.akorn import (
    KuramotoLayer,
    MatrixRotation,
    PairRotation,
    Readout,
    Trajectory,
    advance,
    convolution,
    kuramoto,
    lyapunov_energy,
    order_parameter,
    order_per_group,
    rotate,
    synchrony,
    unit_oscillators,
)


def _golden(folder: Path, name: str) -> tuple[dict[str, Tensor], dict]:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        values = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return values, json.loads(str(file["meta"]))


class _Dense(nn.Module):
    """J as one matrix over all channels and positions."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).view_as(x)


def _compare(golden: dict[str, Tensor], path: Trajectory, n: int) -> None:
    torch.testing.assert_close(torch.stack(path.states), golden["xs"], atol=1e-12, rtol=0)
    # es[0] is a sentinel; es[k] is the energy before step k
    torch.testing.assert_close(path.energies, golden["es"][1:], atol=1e-12, rtol=1e-12)
    orders = torch.stack([order_per_group(x, n) for x in path.states])
    torch.testing.assert_close(orders, golden["order_group"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["akorn_dense_omega", "akorn_dense_noomega", "akorn_dense_sym_lyapunov"])
def test_dense_layer_matches_the_original(golden: Path, name: str) -> None:
    values, meta = _golden(golden, name)
    frequency = values["omg_param"].norm(dim=1) if "omg_param" in values else None
    path = kuramoto(
        _Dense(values["J"]),
        values["x0"],
        values["c"],
        meta["n"],
        meta["T"],
        meta["gamma"],
        None if frequency is None else lambda x, y: y + rotate(x, frequency),
        add_state=name == "akorn_dense_noomega",
    )
    _compare(values, path, meta["n"])


def test_energy_of_the_golden_symmetric_run_never_rises(golden: Path) -> None:
    values, _ = _golden(golden, "akorn_dense_sym_lyapunov")
    energy = torch.stack([lyapunov_energy(_Dense(values["J"]), x, values["c"]) for x in values["xs"]])
    assert (energy.diff(dim=0) <= 1e-12).all()


@pytest.mark.parametrize("name", ["akorn_conv3d_8cube_gn_omega", "akorn_conv2d_gn_globalomega"])
def test_convolutional_layer_matches_the_original(golden: Path, name: str) -> None:
    values, meta = _golden(golden, name)
    channels, weight = meta["ch"], values["w.connectivity.weight"]
    omega = values["w.omg.omg_param"]
    layer = KuramotoLayer(
        channels, meta["n"], convolution(weight.ndim - 2, channels, channels, 3), shared_omega=omega.ndim == 1
    ).double()
    layer.load_state_dict(
        {
            "coupling.weight": weight,
            "coupling.bias": values["w.connectivity.bias"],
            "stimulus_norm.weight": values["w.c_norm.weight"],
            "stimulus_norm.bias": values["w.c_norm.bias"],
            "omega.frequency": omega.norm(dim=-1).reshape(-1),
        }
    )
    with torch.no_grad():
        _compare(values, layer(values["x0"], values["c"], meta["T"], meta["gamma"]), meta["n"])


def test_readout_matches_the_original(golden: Path) -> None:
    values, meta = _golden(golden, "akorn_readout")
    kernel = values["w.invconv.weight"]
    readout = Readout(kernel.shape[1], meta["outch"], meta["ro_N"], kernel.shape[2], kernel.ndim - 2).double()
    readout.load_state_dict(
        {
            "project.weight": kernel,
            "project.bias": values["w.invconv.bias"],
            "offset": values["w.bias"],
        }
    )
    torch.testing.assert_close(readout(values["x"]), values["y"], atol=1e-12, rtol=0)


def test_adding_the_state_halves_the_step() -> None:
    torch.manual_seed(0)
    x0, c = torch.randn(2, 8, 3, 3, 3, dtype=torch.float64), torch.randn(2, 8, 3, 3, 3, dtype=torch.float64)
    conv = nn.Conv3d(8, 8, 3, padding=1).double()
    with_quirk = kuramoto(conv, x0, c, 4, 3, 1.0, add_state=True).states
    clean = kuramoto(conv, x0, c, 4, 3, 0.5).states
    torch.testing.assert_close(with_quirk, clean, atol=1e-13, rtol=0)


def test_update_matches_a_loop_over_oscillators() -> None:
    torch.manual_seed(1)
    n, gamma = 4, 0.3
    x0, c = torch.randn(1, 8, 2, 1, 3, dtype=torch.float64), torch.randn(1, 8, 2, 1, 3, dtype=torch.float64)
    frequency = torch.randn(4, dtype=torch.float64)
    matrix = torch.randn(48, 48, dtype=torch.float64)
    states = kuramoto(_Dense(matrix), x0, c, n, 1, gamma, lambda x, y: y + rotate(x, frequency)).states
    x = unit_oscillators(x0, n)
    drive = _Dense(matrix)(x) + c
    for group in range(2):
        omega = torch.zeros(n, n, dtype=torch.float64)
        for pair in range(n // 2):
            w = frequency[group * 2 + pair]
            omega[2 * pair, 2 * pair + 1], omega[2 * pair + 1, 2 * pair] = w, -w
        for d in range(2):
            for w in range(3):
                here = (0, slice(group * n, group * n + n), d, 0, w)
                v, y = x[here], drive[here]
                moved = v + gamma * (omega @ v + y - (v @ y) * v)
                torch.testing.assert_close(states[0][here], moved / moved.norm())


@pytest.mark.parametrize("seed", range(5))
def test_energy_never_rises_with_symmetric_coupling_and_small_steps(seed: int) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(48, 48, dtype=torch.float64) / math.sqrt(48)
    dense = _Dense((matrix + matrix.T) / 2)
    x0, c = torch.randn(3, 8, 6, dtype=torch.float64), torch.randn(3, 8, 6, dtype=torch.float64)
    path = kuramoto(dense, x0, c, 4, 60, 0.05)
    assert (path.lyapunov.diff(dim=0) <= 1e-12).all()
    assert (path.lyapunov[-1] < path.lyapunov[0]).all()
    after_each = torch.stack([lyapunov_energy(dense, x, c) for x in path.states])
    torch.testing.assert_close(path.lyapunov[1:], after_each[:-1])


def test_omega_turns_by_the_arctangent_of_the_step() -> None:
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)[:, :, None]
    w = torch.tensor([0.7], dtype=torch.float64)
    assert rotate(x, w).flatten().tolist() == [0.0, -0.7]
    states = kuramoto(
        torch.zeros_like, x, torch.zeros_like(x), 2, 1, 1.0, lambda x, y: y + rotate(x, w)
    ).states
    a, b = states[0].flatten().tolist()
    assert math.atan2(b, a) == pytest.approx(-math.atan(0.7))


def test_order_parameter_is_one_in_synchrony_and_near_zero_for_chance() -> None:
    torch.manual_seed(0)
    for positions in (64, 512):
        random = unit_oscillators(torch.randn(4, 64, positions), 4)
        order = order_parameter(random, 4)
        torch.testing.assert_close(order, order_per_group(random, 4).mean(1))
        assert order.mean().item() == pytest.approx(positions**-0.5, rel=0.15)
        assert synchrony(order, positions).max() < 0.03
        same = unit_oscillators(torch.randn(4, 64, 1).expand(4, 64, positions), 4)
        torch.testing.assert_close(order_parameter(same, 4), torch.ones(4))
        torch.testing.assert_close(synchrony(order_parameter(same, 4), positions), torch.ones(4))
    assert synchrony(torch.ones(2), 1).tolist() == [0.0, 0.0]


def test_order_of_two_dimensional_oscillators_is_the_mean_phase() -> None:
    theta = torch.rand(50, dtype=torch.float64) * 2
    x = torch.stack((theta.cos(), theta.sin()))[None]
    expected = torch.polar(torch.ones_like(theta), theta).mean().abs()
    torch.testing.assert_close(order_per_group(x, 2)[0, 0], expected)


def test_matrix_rotation_begins_as_the_paired_one_and_is_antisymmetric() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, 2)
    pairs, matrix = PairRotation(12, 0.3), MatrixRotation(12, 4, 0.3)
    nothing = torch.zeros_like(x)
    torch.testing.assert_close(pairs.rotation()(x, nothing), rotate(x, pairs.frequency))
    torch.testing.assert_close(matrix.rotation()(x, nothing), pairs.rotation()(x, nothing))
    torch.testing.assert_close(matrix.rotation()(x, x), x + pairs.rotation()(x, nothing))
    torch.nn.init.normal_(matrix.upper)
    square = matrix.matrix()
    torch.testing.assert_close(square, -square.mT)
    turned = matrix.rotation()(x, nothing)
    torch.testing.assert_close(turned[1, 4:8, 2, 0], square[1] @ x[1, 4:8, 2, 0])
    # a rotation is at right angles to what it rotates
    torch.testing.assert_close(
        (x * turned).unflatten(1, (3, 4)).sum(2), torch.zeros(2, 3, 3, 2), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("oscillator_dim", [2, 3, 5, 8])
@pytest.mark.parametrize("space", [(), (7,), (3, 4), (2, 3, 2)])
def test_any_dimension_on_any_map_stays_on_the_sphere(oscillator_dim: int, space: tuple[int, ...]) -> None:
    """Vectors, tokens, images and volumes; the state of the last step depends on every parameter."""
    torch.manual_seed(0)
    channels = 2 * oscillator_dim
    size = channels * math.prod(space)
    layer = KuramotoLayer(channels, oscillator_dim, _Dense(torch.randn(size, size) / size**0.5))
    layer.coupling.matrix.requires_grad_()
    assert isinstance(layer.omega, MatrixRotation if oscillator_dim % 2 else PairRotation)
    path = layer(torch.randn(2, channels, *space), torch.randn(2, channels, *space), 3, 0.7)
    lengths = torch.stack(path.states).unflatten(2, (2, oscillator_dim)).norm(dim=3)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0)
    assert path.energies.shape == path.lyapunov.shape == (3, 2)
    assert order_parameter(path.states[-1], oscillator_dim).shape == (2,)
    path.states[-1][:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("omega", [None, 0.4])
def test_turning_every_oscillator_turns_the_whole_way(omega: float | None) -> None:
    """Couplings that do not mix components commute with those rotations of R^n that commute with Omega."""
    torch.manual_seed(0)
    weights = torch.randn(2, 2, 5, 5, dtype=torch.float64)

    def coupling(x: Tensor) -> Tensor:
        return torch.einsum("ghpq,bhnq->bgnp", weights, x.unflatten(1, (2, 4))).flatten(1, 2)

    def turned(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("mn,bgnp->bgmp", matrix, x.unflatten(1, (2, 4))).flatten(1, 2)

    if omega is None:
        turn, rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0], None
    else:
        generator = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        turn = torch.block_diag(torch.matrix_exp(0.8 * generator), torch.matrix_exp(-1.1 * generator))
        rotation = lambda x, y: y + rotate(x, torch.full((4,), omega, dtype=torch.float64))  # noqa: E731
    x0, c = (torch.randn(1, 8, 5, dtype=torch.float64) for _ in range(2))
    plain = kuramoto(coupling, x0, c, 4, 6, 0.5, rotation)
    other = kuramoto(coupling, turned(x0, turn), turned(c, turn), 4, 6, 0.5, rotation)
    torch.testing.assert_close(other.states[-1], turned(plain.states[-1], turn))
    torch.testing.assert_close(other.energies, plain.energies)


@pytest.mark.parametrize("norm", ["group", "scale_bias", "none"])
def test_stimulus_norms_and_two_layers_in_a_row(norm: str) -> None:
    """Layer l starts from the oscillators of layer l - 1 under the stimulus that those read out to."""
    torch.manual_seed(0)
    layers = [KuramotoLayer(8, 4, convolution(2, 8, 8, 3), stimulus_norm=norm) for _ in range(2)]
    read = Readout(8, 8, 4, axes=2)
    x, c = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    for layer in layers:
        x = layer(x, c, 2, 0.5).states[-1]
        c = read(x)
    x[:, :3].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for layer in layers for p in layer.parameters())
    assert read.project.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("steps", [1, 8, 32])
def test_gradients_stay_finite_and_alive_through_many_steps(steps: int) -> None:
    torch.manual_seed(0)
    layer = KuramotoLayer(16, 4, convolution(3, 16, 16, 3))
    x0 = torch.randn(1, 16, 4, 4, 4, requires_grad=True)
    c = torch.randn(1, 16, 4, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        last = layer(x0, c, steps, 0.5).states[-1]
    assert last.dtype == torch.float32  # the state never is a bfloat16
    lengths = last.unflatten(1, (4, 4)).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0)
    (last * torch.randn_like(last)).sum().backward()
    for gradient in (x0.grad, c.grad, *(p.grad for p in layer.parameters())):
        assert gradient is not None and gradient.isfinite().all() and 0 < gradient.norm() < 1e4


@pytest.mark.parametrize("add_state", [False, True])
def test_the_gradient_of_a_step_by_hand_is_that_of_autograd(add_state: bool) -> None:
    torch.manual_seed(0)
    x = F.normalize(torch.randn(2, 3, 4, 5, dtype=torch.float64), dim=2).requires_grad_()
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: advance(x, y, 0.7, add_state), (x, y))
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)  # a learned step goes the plain way
    for a, b in zip(advance(x, y, 0.7, add_state), advance(x, y, gamma, add_state), strict=True):
        torch.testing.assert_close(a, b)
    advance(x, y, gamma, add_state)[0][0, 0, 0].sum().backward()
    assert gamma.grad is not None and gamma.grad.abs() > 0


def test_recomputing_the_coupling_changes_no_gradient() -> None:
    torch.manual_seed(0)
    layer = KuramotoLayer(8, 4, convolution(3, 8, 8, 3))
    x0, c = torch.randn(1, 8, 3, 3, 3), torch.randn(1, 8, 3, 3, 3)
    gradients = []
    for layer.recompute in (False, True):
        layer.zero_grad()
        layer(x0, c, 4, 0.5).states[-1].pow(3).sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_teach() -> None:
    conv = convolution(3, 8, 8, 3)
    with pytest.raises(ValueError, match="must be even"):
        KuramotoLayer(9, 3, conv, omega="pairs")
    with pytest.raises(ValueError, match="dimension >= 2"):
        KuramotoLayer(8, 1, conv)
    with pytest.raises(ValueError, match="divides the channels"):
        KuramotoLayer(8, 3, conv)
    layer = KuramotoLayer(8, 4, conv)
    with pytest.raises(
        ValueError, match=r"got a tensor of shape \(1, 12, 2, 2, 2\), expected \(b, 8, \*space\)"
    ):
        layer(torch.randn(1, 12, 2, 2, 2), torch.randn(1, 12, 2, 2, 2), 1, 0.5)
    with pytest.raises(ValueError, match="expected the same"):
        kuramoto(conv, torch.randn(1, 8, 2, 2, 2), torch.randn(1, 8, 2, 2, 2), 3, 1, 0.5)
    with pytest.raises(ValueError, match="odd kernel"):
        convolution(3, 8, 8, 4)
    with pytest.raises(ValueError, match=r"expected \(b, 8, d, h, w\)"):
        Readout(8, 8, 4)(torch.randn(1, 8, 4, 4))
