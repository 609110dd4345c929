import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aneurysm.nets.akorn import (
    AkornBlock,
    AttentionCoupling,
    OscillatorState,
    Readout,
    kuramoto,
    lyapunov_energy,
    order_parameter,
    order_per_group,
    position_angles,
    rotate,
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


def _compare(golden: dict[str, Tensor], states: list[Tensor], energies: Tensor, n: int) -> None:
    torch.testing.assert_close(torch.stack(states), golden["xs"], atol=1e-12, rtol=0)
    # es[0] is a sentinel; es[k] is the energy before step k
    torch.testing.assert_close(energies, golden["es"][1:], atol=1e-12, rtol=1e-12)
    orders = torch.stack([order_per_group(x, n) for x in states])
    torch.testing.assert_close(orders, golden["order_group"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["akorn_dense_omega", "akorn_dense_noomega", "akorn_dense_sym_lyapunov"])
def test_dense_layer_matches_the_original(golden: Path, name: str) -> None:
    values, meta = _golden(golden, name)
    frequency = values["omg_param"].norm(dim=1) if "omg_param" in values else None
    states, energies = kuramoto(
        _Dense(values["J"]),
        values["x0"],
        values["c"],
        meta["n"],
        meta["T"],
        meta["gamma"],
        frequency,
        add_state=name == "akorn_dense_noomega",
    )
    _compare(values, states, energies, meta["n"])


def test_energy_of_the_golden_symmetric_run_never_rises(golden: Path) -> None:
    values, _ = _golden(golden, "akorn_dense_sym_lyapunov")
    energy = torch.stack([lyapunov_energy(_Dense(values["J"]), x, values["c"]) for x in values["xs"]])
    assert (energy.diff(dim=0) <= 1e-12).all()


@pytest.mark.parametrize("name", ["akorn_conv3d_8cube_gn_omega", "akorn_conv2d_gn_globalomega"])
def test_convolutional_layer_matches_the_original(golden: Path, name: str) -> None:
    values, meta = _golden(golden, name)
    channels, weight = meta["ch"], values["w.connectivity.weight"]
    conv = (nn.Conv2d if weight.ndim == 4 else nn.Conv3d)(channels, channels, 3, padding=1).double()
    conv.load_state_dict({"weight": weight, "bias": values["w.connectivity.bias"]})
    norm = nn.GroupNorm(channels // meta["n"], channels).double()
    norm.load_state_dict({"weight": values["w.c_norm.weight"], "bias": values["w.c_norm.bias"]})
    omega = values["w.omg.omg_param"]
    frequency = omega.norm(dim=-1).expand(channels // 2)  # global: one for all pairs
    with torch.no_grad():
        states, energies = kuramoto(
            conv, values["x0"], norm(values["c"]), meta["n"], meta["T"], meta["gamma"], frequency
        )
    _compare(values, states, energies, meta["n"])


def test_readout_matches_the_original(golden: Path) -> None:
    values, meta = _golden(golden, "akorn_readout")
    readout = Readout(16, meta["outch"], meta["ro_N"]).double()
    readout.load_state_dict(
        {
            "project.weight": values["w.invconv.weight"][..., None],
            "project.bias": values["w.invconv.bias"],
            "offset": values["w.bias"],
        }
    )
    torch.testing.assert_close(readout(values["x"][..., None])[..., 0], values["y"], atol=1e-12, rtol=0)


def test_adding_the_state_halves_the_step() -> None:
    torch.manual_seed(0)
    x0, c = torch.randn(2, 8, 3, 3, 3, dtype=torch.float64), torch.randn(2, 8, 3, 3, 3, dtype=torch.float64)
    conv = nn.Conv3d(8, 8, 3, padding=1).double()
    with_quirk, _ = kuramoto(conv, x0, c, 4, 3, 1.0, add_state=True)
    clean, _ = kuramoto(conv, x0, c, 4, 3, 0.5)
    torch.testing.assert_close(with_quirk, clean, atol=1e-13, rtol=0)


def test_update_matches_a_loop_over_oscillators() -> None:
    torch.manual_seed(1)
    n, gamma = 4, 0.3
    x0, c = torch.randn(1, 8, 2, 1, 3, dtype=torch.float64), torch.randn(1, 8, 2, 1, 3, dtype=torch.float64)
    frequency = torch.randn(4, dtype=torch.float64)
    matrix = torch.randn(48, 48, dtype=torch.float64)
    states, _ = kuramoto(_Dense(matrix), x0, c, n, 1, gamma, frequency)
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
    states, _ = kuramoto(dense, x0, c, 4, 60, 0.05)
    energy = torch.stack([lyapunov_energy(dense, x, c) for x in states])
    assert (energy.diff(dim=0) <= 1e-12).all()
    assert (energy[-1] < energy[0]).all()


def test_omega_turns_by_the_arctangent_of_the_step() -> None:
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)[:, :, None]
    w = torch.tensor([0.7], dtype=torch.float64)
    assert rotate(x, w).flatten().tolist() == [0.0, -0.7]
    states, _ = kuramoto(torch.zeros_like, x, torch.zeros_like(x), 2, 1, 1.0, w)
    a, b = states[0].flatten().tolist()
    assert math.atan2(b, a) == pytest.approx(-math.atan(0.7))


def test_order_parameter_is_one_in_synchrony_and_near_zero_for_chance() -> None:
    torch.manual_seed(0)
    for positions in (64, 512):
        random = unit_oscillators(torch.randn(4, 64, positions), 4)
        raw = order_per_group(random, 4)
        assert raw.mean().item() == pytest.approx(positions**-0.5, rel=0.15)
        assert order_parameter(raw, positions).max() < 0.03
        same = unit_oscillators(torch.randn(4, 64, 1).expand(4, 64, positions), 4)
        torch.testing.assert_close(order_parameter(order_per_group(same, 4), positions), torch.ones(4))
    assert order_parameter(torch.ones(2, 3), 1).tolist() == [0.0, 0.0]


def test_order_of_two_dimensional_oscillators_is_the_mean_phase() -> None:
    theta = torch.rand(50, dtype=torch.float64) * 2
    x = torch.stack((theta.cos(), theta.sin()))[None]
    expected = torch.polar(torch.ones_like(theta), theta).mean().abs()
    torch.testing.assert_close(order_per_group(x, 2)[0, 0], expected)


def test_attention_mixes_positions_by_their_distance_only() -> None:
    """Rotary phases: the score of two tokens depends on their offset, so shifting both changes nothing."""
    angles = position_angles((3, 4, 5), 6, torch.zeros(1, dtype=torch.float64)).view(3, 4, 5, 6)
    torch.testing.assert_close(angles[1, 2, 3] - angles[0, 1, 1], angles[2, 3, 4] - angles[1, 2, 2])
    assert (angles[1, 1, 1] != 0).all()  # every pair sees an axis


def test_attention_follows_the_formula() -> None:
    torch.manual_seed(0)
    attention = AttentionCoupling(24, heads=2).double()
    x = torch.randn(1, 24, 2, 3, 2, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)[0]
    q, k, v = attention.qkv(tokens).chunk(3, dim=1)
    angles = position_angles((2, 3, 2), 6, x)
    turns = torch.polar(torch.ones_like(angles), angles)
    mixed = []
    for head in range(2):
        part = slice(12 * head, 12 * head + 12)
        a, b = (torch.complex(t[:, part][:, :6], t[:, part][:, 6:]) * turns for t in (q, k))
        score = (a @ b.conj().T).real / math.sqrt(12)
        mixed.append(score.softmax(1) @ v[:, part])
    expected = attention.out(torch.cat(mixed, dim=1))
    torch.testing.assert_close(attention(x).flatten(2).transpose(1, 2)[0], expected)


@pytest.mark.parametrize("oscillator_dim", [2, 4, 8, 16])
@pytest.mark.parametrize("connectivity", ["attention", "conv"])
def test_block_keeps_unit_oscillators_and_trains(oscillator_dim: int, connectivity: str) -> None:
    torch.manual_seed(0)
    block = AkornBlock(12, oscillator_dim, oscillator_channels=30, connectivity=connectivity, grid=4)
    x = torch.randn(2, 12, 6, 4, 5, requires_grad=True)
    out, state = block(x)
    assert isinstance(state, OscillatorState) and out.shape == x.shape
    assert block.oscillator_channels % oscillator_dim == 0 and block.oscillator_channels >= 30
    lengths = state.x.unflatten(1, (-1, oscillator_dim)).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert state.x.shape[2:] == (4, 4, 4) and state.energies.shape == (4, 2)
    assert ((state.order_parameter >= 0) & (state.order_parameter <= 1)).all()
    out.square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_alpha_zero_is_an_identity_and_evaluation_repeats() -> None:
    x = torch.randn(2, 8, 3, 9, 2)
    out, _ = AkornBlock(8, alpha=0.0)(x)
    torch.testing.assert_close(out, x, atol=0, rtol=0)
    block = AkornBlock(8)
    torch.testing.assert_close(block(x)[0], block(x)[0], atol=0, rtol=0)
    assert block(x)[1].x.shape[2:] == (3, 8, 2)  # pools long axes, never enlarges short ones


def test_half_precision_stays_finite_because_the_dynamics_run_in_single() -> None:
    block = AkornBlock(8, grid=4)
    x = torch.zeros(1, 8, 4, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = block(x)
    assert out.dtype == torch.bfloat16 and state.x.dtype == torch.float32
    assert out.isfinite().all() and state.x.isfinite().all()


def test_constructor_explains_impossible_oscillators() -> None:
    with pytest.raises(ValueError, match="must be even"):
        AkornBlock(8, oscillator_dim=3)
    with pytest.raises(ValueError, match="dimension >= 2"):
        AkornBlock(8, oscillator_dim=1)
    with pytest.raises(ValueError, match="at least 6 channels per head"):
        AkornBlock(8, oscillator_channels=16, heads=4)
