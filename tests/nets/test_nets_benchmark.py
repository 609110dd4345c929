"""The benchmark compares like with like: its restatements give the numbers of the networks."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ptwt", reason="the restatements need ptwt: pip install aneurysm[bench]")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import nets_cases
import nets_measure
import nets_oscillators
import nets_plain

torch.set_num_threads(1)  # the machines that run the tests are shared
TINY = {"width": 8, "depths": (1, 2), "heads": (2, 4), "levels": (2, 1), "mlp_ratio": 2.0}


@pytest.fixture
def tiny(monkeypatch):
    for name, more in (
        ("tiny", {}),
        ("tiny, multi-scale", {"multi_scale": True}),
        ("reach", {"bias_reach": 3}),
    ):
        monkeypatch.setitem(nets_cases.CONFIGS, name, {**TINY, **more})


@pytest.mark.parametrize("config", ["tiny", "tiny, multi-scale", "reach"])
@pytest.mark.parametrize("size", [(32, 32, 32), (16, 32, 48)])
def test_encoder(tiny, config, size):
    product, plain = nets_cases.product_encoder(config), nets_cases.plain_encoder(config)
    apart, slopes = nets_cases.check(product, plain, torch.randn(2, 1, *size))
    assert apart < 1e-4
    assert slopes < 1e-3


def test_another_encoder_is_refused(tiny):
    plain = nets_cases.plain_encoder("tiny")
    with torch.no_grad():
        plain.stages[0][0].table[::2] += 3  # every other offset of the position bias
    with pytest.raises(RuntimeError, match="another network"):
        nets_cases.check(nets_cases.product_encoder("tiny"), plain, torch.randn(1, 1, 32, 32, 32))


@pytest.mark.parametrize("connectivity", ["attention", "conv"])
@pytest.mark.parametrize("n", [2, 8])
def test_oscillators(connectivity, n):
    sides = nets_oscillators.oscillators(connectivity, n, 3)
    x, c = torch.randn(2, 2, 64, 8, 8, 8).unbind(0)
    assert nets_oscillators.check(sides, x, c) < 1e-4
    slopes = []
    for side in (sides.here, sides.plain):
        start = x.clone().requires_grad_()
        side(start, c).pow(3).sum().backward()
        slopes.append(start.grad)
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)


def test_oscillators_that_ignore_omega_are_refused():
    sides = nets_oscillators.oscillators("conv", 4, 3)
    still = nets_oscillators.Oscillators(
        sides.here,
        lambda x, c: nets_plain.plain_kuramoto(lambda x: x, x, c, 4, 3, 0.5, None)[0],
        sides.coupling,
    )
    with pytest.raises(RuntimeError, match="another oscillator"):
        nets_oscillators.check(still, *torch.randn(2, 1, 64, 8, 8, 8))


def test_saved_bytes_are_those_of_the_graph():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    # tanh keeps its answer, which is also what the second layer keeps; weights and input do not count
    own = nets_measure.saved_bytes(net, torch.randn(16, 4)) - nets_measure.saved_bytes(
        net[2], torch.randn(16, 8)
    )
    assert own == 16 * 8 * 4


def test_line():
    slope, start, r2 = nets_oscillators.line([1, 2, 4], [1.5, 2.0, 3.0])
    assert (slope, start, r2) == pytest.approx((0.5, 1.0, 1.0))
    assert nets_oscillators.line([1, 2, 3, 4], [1.0, 4.0, 9.0, 16.0])[2] < 0.99
