"""Every network in every mode that a training can choose: bf16, float64, layout, recomputation, compiled.

A new network is one more row of NETS. As a script (`test_net_modes.py <backend> <recompute | keep> <name>
...`) this compares compiled networks with uncompiled ones, without the type checks of the tests, which
torch.compile cannot read.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aneurysm.nets.expert import ExpertBatch, ExpertNet
from aneurysm.nets.fusion import CrossAttentionFusion
from aneurysm.nets.metadata import MetadataGate
from aneurysm.nets.oscillators import AkornBlock, ItrsaBlock, akorn
from aneurysm.nets.segformer3d import SegFormer3D
from aneurysm.nets.unet import DynUNet3D, UNet3D
from aneurysm.nets.waveformer import WaveFormer, WaveFormerEncoder

torch.set_num_threads(1)  # the machines that run the tests are shared

ROOT = Path(__file__).parents[2]
SEGFORMER = {
    "widths": (8, 16),
    "depths": (1, 1),
    "heads": (1, 2),
    "reductions": (2, 1),
    "decoder_width": 16,
}


OSCILLATORS = akorn(oscillator_channels=32, grid=4, steps=2, alpha=0.1)


@dataclass(frozen=True)
class Case:
    """A network and what it is called with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def expert() -> ExpertNet:
    return ExpertNet(
        WaveFormerEncoder(width=12, heads=(1, 2, 4, 8), oscillators=OSCILLATORS),
        partial(CrossAttentionFusion, heads=2),
        metadata=partial(MetadataGate, dropout=0.0),
        graph_features=5,
        head_width=16,
        decoder_width=8,
        dropout=0.0,
    )


def candidates() -> ExpertBatch:
    """Six of them: the spread over a batch of two is a difference, of which bfloat16 leaves little."""
    present = torch.tensor([[True, False, True, False], [False, True, True, False]]).repeat(3, 1)
    image = torch.randn(6, 4, 16, 16, 16).masked_fill(~present[:, :, None, None, None], torch.nan)
    return ExpertBatch(
        image=image,
        present=present,
        vessel=torch.rand(6, 1, 16, 16, 16),
        age=torch.tensor([50.0, torch.nan]).repeat(3),
        sex=torch.tensor([0.0, torch.nan]).repeat(3),
        position=torch.randn(6, 3),
        graph=torch.randn(6, 5),
        score=torch.tensor([0.1, 0.9]).repeat(3),
    )


def image(channels: int, *size: int) -> Tensor:
    return torch.randn(2, channels, *size)


NETS = {
    "unet": Case(lambda: UNet3D(2, 2, (4, 8, 8)), lambda: image(2, 13, 16, 8)),
    "dynunet": Case(lambda: DynUNet3D(2, 2, (4, 8, 8)), lambda: image(2, 13, 16, 8)),
    "segformer": Case(
        lambda: SegFormer3D(1, 2, **SEGFORMER, norm="batch", full_resolution_skip=False),
        lambda: image(1, 32, 21, 16),
    ),
    "segformer_skip": Case(lambda: SegFormer3D(1, 2, **SEGFORMER), lambda: image(1, 32, 21, 16)),
    "waveformer": Case(lambda: WaveFormerEncoder(1, 12, heads=(1, 2, 4, 8)), lambda: image(1, 32, 21, 16)),
    "waveformer_net": Case(
        lambda: WaveFormer(1, 2, 12, heads=(1, 2, 4, 8), multi_scale=True, full_width=4),
        lambda: image(1, 32, 21, 16),
    ),
    "unet_deep": Case(lambda: UNet3D(2, 2, (4, 8, 8), deep_supervision=2), lambda: image(2, 13, 16, 8)),
    "dynunet_deep": Case(lambda: DynUNet3D(2, 2, (4, 8, 8), deep_supervision=1), lambda: image(2, 13, 16, 8)),
    "segformer_deep": Case(
        lambda: SegFormer3D(1, 2, **SEGFORMER, deep_supervision=2), lambda: image(1, 32, 21, 16)
    ),
    "waveformer_deep": Case(
        lambda: WaveFormer(1, 2, 12, heads=(1, 2, 4, 8), full_width=4, deep_supervision=2),
        lambda: image(1, 32, 21, 16),
    ),
    "akorn": Case(lambda: AkornBlock(8, 4, 32, steps=3, grid=4, alpha=0.1), lambda: image(8, 6, 5, 4)),
    "akorn_odd": Case(
        lambda: AkornBlock(8, 3, 32, steps=3, grid=4, alpha=0.1, connectivity="conv"),
        lambda: image(8, 6, 5, 4),
    ),
    "itrsa": Case(lambda: ItrsaBlock(8, 32, steps=3, grid=4, alpha=0.1), lambda: image(8, 6, 5, 4)),
    "expert": Case(expert, candidates),
}


def made(name: str) -> tuple[nn.Module, Any]:
    """A network and its input, the same at every call."""
    torch.manual_seed(0)
    return NETS[name].make(), NETS[name].inputs()


def tensors(out: Any) -> list[Tensor]:
    """The floating-point tensors in whatever a network returns."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if is_dataclass(out):
        out = [getattr(out, f.name) for f in fields(out)]
    return [t for part in out for t in tensors(part)] if isinstance(out, list | tuple) else []


def doubled(x: Any) -> Any:
    if isinstance(x, ExpertBatch):
        values = {f.name: getattr(x, f.name) for f in fields(x)}
        return replace(x, **{k: doubled(v) for k, v in values.items() if v is not None})
    return x.double() if x.is_floating_point() else x


def answers(net: nn.Module, x: Any, **autocast: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a network returns, and the gradient that a fixed random sum of it gives every weight."""
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        out = tensors(net(x))
    signs = torch.Generator().manual_seed(1)  # the sum of squares of a normalised map has no gradient
    sums = [(t.double().nan_to_num() * torch.randn(t.shape, generator=signs)).sum() for t in out]
    torch.stack(sums).sum().backward()
    gradients = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    return [t.detach() for t in out], gradients


def apart(one: Tensor, other: Tensor) -> float:
    """Distance of two tensors in lengths of the second."""
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return float((one - other).norm() / other.norm().clamp_min(1e-6))


def compare(one: tuple, other: tuple, tolerance: float) -> None:
    assert len(one[0]) == len(other[0]) and list(one[1]) == list(other[1]) and one[1]
    for a, b in zip(one[0], other[0], strict=True):
        assert a.shape == b.shape and apart(a, b) <= tolerance, (apart(a, b), tuple(a.shape))
    longest = max(float(g.norm()) for g in other[1].values())
    for name, b in other[1].items():  # weights that hardly matter have gradients of rounding
        difference = float((one[1][name].double() - b.double()).norm())
        assert difference <= tolerance * max(float(b.norm()), 0.01 * longest), (name, difference)


@pytest.mark.parametrize("name", NETS)
def test_bf16(name):
    exact, gradients = answers(*made(name))
    rough, found = answers(*made(name), dtype=torch.bfloat16)
    for a, b in zip(rough, exact, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()) and apart(a, b) < 0.1, (apart(a, b), tuple(a.shape))
    assert list(found) == list(gradients) and all(g.isfinite().all() for g in found.values())
    together = [torch.cat([g[k].flatten() for k in gradients]) for g in (found, gradients)]
    assert torch.cosine_similarity(*together, dim=0) > 0.95


@pytest.mark.parametrize("name", NETS)
def test_float64(name):
    net, x = made(name)
    exact = answers(net.double(), doubled(x))
    assert all(t.dtype == torch.float64 for t in exact[0])
    compare(answers(*made(name)), exact, 1e-2)


@pytest.mark.parametrize("name", NETS)
def test_channels_last(name):
    results = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        net, x = made(name)
        names = list(net.state_dict())
        net = net.to(memory_format=layout)
        assert list(net.state_dict()) == names
        results.append(answers(net, x))
    compare(results[1], results[0], 1e-3)


@pytest.mark.parametrize("name", [n for n in NETS if hasattr(made(n)[0], "recompute")])
def test_recomputation(name):
    results, names = [], []
    for recompute in (False, True):
        net, x = made(name)
        net.recompute = recompute
        results.append(answers(net, x))
        names.append(list(net.state_dict()))
    assert names[0] == names[1]
    compare(results[1], results[0], 1e-6)


def run_compiled(backend: str, recompute: str, *names: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, backend, recompute, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [word for name in names for word in (name, "ok")]


def test_compiled():
    run_compiled("aot_eager", "keep", "segformer")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_each_compiled(name, backend):
    run_compiled(backend, "recompute", name)


def main(backend: str, recompute: str, *names: str) -> None:
    for name in names:
        plain = answers(*made(name))
        net, x = made(name)
        keys = list(net.state_dict())
        net.compile(backend=backend, dynamic=False)
        compiled = answers(net, x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
        assert list(net.state_dict()) == keys
        compare(compiled, plain, 5e-3)
        if recompute == "recompute" and hasattr(net, "recompute"):
            net, x = made(name)
            net.recompute = True
            net.compile(backend=backend, dynamic=False)
            compare(answers(net, x), plain, 5e-3)
        torch.compiler.reset()
        print(name, "ok", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
