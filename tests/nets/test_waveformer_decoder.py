import json

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aneurysm.nets.waveformer import WaveFormerEncoder
from aneurysm.nets.waveformer_decoder import WaveFormerDecoder
from aneurysm.nets.waveformer_upsampling import (
    ChannelCalibration,
    DetailRefinement,
    ResidualUpsample,
    WaveletUpsample,
)
from aneurysm.nets.wavelet import LOW_GAIN, haar_decompose, haar_reconstruct

torch.set_num_threads(1)  # the machines that run the tests are shared

CALIBRATION = {"squeeze": "fc1", "excite": "fc2"}  # our name -> official name, others are equal
ENCODER = {
    "patch_embed": "patch_embed.proj",
    "attention.qkv": "attn.qkv",
    "attention.project": "attn.proj",
    "attention.position_bias": "attn.relative_position_bias_table",
    "feed_forward.expand": "mlp.pwconv",
    "feed_forward.norm1": "mlp.norm1",
    "feed_forward.depthwise": "mlp.dwconv",
    "feed_forward.norm2": "mlp.norm2",
    "feed_forward.contract": "mlp.fc",
}
DECODER = {
    "calibrate": "encoder10",
    **{f"skips.{s}": f"encoder{s + 2}.layer" for s in range(3)},
    **{f"lifts.{s}.low": f"decoder{s + 2}.conv_lf_block.conv" for s in range(3)},
    **{f"lifts.{s}.mix": f"decoder{s + 2}.conv_block" for s in range(3)},
    "upsamples.0": "learnable_up3",
    "upsamples.1": "learnable_up4",
    "to_full": "decoder1.transp_conv.conv",
    "image_path": "encoder1.layer",
    "mix_full": "decoder1.conv_block",
    "predict": "out.conv.conv",
}


def upsample_names(factor):
    head = {"head.0": "conv2", "head.2": "conv3"}
    if factor >= 4:
        head |= {"head.2": "conv3.0", "head.4": "conv3.2"}
    return {"depthwise": "conv1.1", "residual": "res_conv.1", **head}


def load(path):
    data = np.load(path)
    return data, json.loads(str(data["meta"]))


def rename(key, names):
    """Official name of one of our parameters: the longest prefix that the map knows is replaced."""
    for prefix in sorted(names, key=len, reverse=True):
        if key == prefix or key.startswith(f"{prefix}."):
            return names[prefix] + key.removeprefix(prefix)
    return key


def fill(module, shapes, seedfill, names, prefix=""):
    """Give a module the official weights; every parameter must find one of its size."""
    module.double().eval()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            official = prefix + rename(key, names)
            value = torch.from_numpy(seedfill.value(official, shapes[official]))
            parameter.copy_(value.reshape(parameter.shape))
    return module


def test_golden_calibration(golden, seedfill):
    data, meta = load(golden / "waveformer_calib.npz")
    net = fill(ChannelCalibration(16), meta["shapes"], seedfill, CALIBRATION)
    out = net(torch.from_numpy(data["x"]))
    np.testing.assert_allclose(out.detach().numpy(), data["y"], atol=1e-10)


def test_golden_residual_upsample(golden, seedfill):
    data, meta = load(golden / "waveformer_resup.npz")
    net = fill(ResidualUpsample(16, 8, 4), meta["shapes"], seedfill, upsample_names(4))
    out = net(torch.from_numpy(data["x"]))
    np.testing.assert_allclose(out.detach().numpy(), data["y"], atol=1e-10)


def test_golden_wavelet_upsample(golden, seedfill):
    data, meta = load(golden / "waveformer_idwt_block.npz")
    names = {"low": "conv_lf_block.conv", "mix": "conv_block"}
    net = fill(WaveletUpsample(32, 8, 2), meta["shapes"], seedfill, names)
    z, skip = torch.from_numpy(data["z"]), torch.from_numpy(data["skip"])
    np.testing.assert_allclose(net.low(z).detach().numpy(), data["lf"], atol=1e-10)
    details = [
        torch.stack([seedfill.inp(70 + 10 * i + j, 1, 8, *[4 * 2**i] * 3) for j in range(7)], dim=1)
        for i in range(2)
    ]
    # A map with these details; whatever its low band is, the block must not see it.
    seen = haar_reconstruct(torch.randn(1, 8, 4, 4, 4, dtype=torch.float64), details)
    np.testing.assert_allclose(net(z, seen, skip).detach().numpy(), data["y"], atol=1e-10)


def official_maps(image, shapes, seedfill):
    """Encoder maps of the official tiny net, and what the wavelets of each stage's last block saw.

    Its window bias index and the corners of its patch merging differ from ours, so weights are rearranged.
    """
    net = WaveFormerEncoder(1, 8, (2, 2, 2, 2), (1, 2, 4, 8), normalise_lf=False, min_window=1, bias_reach=2)
    i = torch.arange(3)  # window side 2: depth stride 5 instead of 9
    index = i[:, None, None] * 5 + i[None, :, None] * 3 + i

    def official(name):
        name = f"waveformer_encoder.{name}"
        return torch.from_numpy(seedfill.value(name, shapes[name]))

    net.double().eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.startswith("merges."):
                continue
            names = {f"stages.{s}": f"block{s + 1}" for s in range(4)}
            key = rename(key, names)
            for ours, theirs in ENCODER.items():
                key = key.replace(ours, theirs)
            value = official(key)
            parameter.copy_((value[index] if key.endswith("table") else value).reshape(parameter.shape))
    order = [0b000, 0b100, 0b010, 0b001, 0b101, 0b010, 0b001, 0b111]
    maps, seen, x = [], [], net.patch_embed(image).permute(0, 2, 3, 4, 1)
    for s, stage in enumerate(net.stages):
        if s:
            c = x.shape[-1]
            corners = [x[:, k >> 2 :: 2, (k >> 1) & 1 :: 2, k & 1 :: 2] for k in order]
            weight, bias = (official(f"downsample_{s}.norm.{leaf}") for leaf in ("weight", "bias"))
            x = F.layer_norm(torch.cat(corners, -1), (8 * c,), weight, bias, 1e-6)
            x = x @ official(f"downsample_{s}.reduction.weight").T
        for block in stage[:-1]:
            x = block(x).map
        seen.append(stage[-1].norm1(x).permute(0, 4, 1, 2, 3))
        x = stage[-1](x).map
        maps.append(F.layer_norm(x, x.shape[-1:]).permute(0, 4, 1, 2, 3))
    return maps, seen


def test_golden_whole_net(golden, seedfill):
    data, meta = load(golden / "waveformer_net_tiny32_single.npz")
    image = seedfill.inp(meta["input_seed"], 1, 1, 32, 32, 32)
    with torch.no_grad():
        maps, seen = official_maps(image, meta["shapes"], seedfill)
    for s, x in enumerate(seen[:-1]):
        _, details = haar_decompose(x, 3 - s)
        for i, high in enumerate(details):
            stats = data[f"hf_s{s}_{i}_ddd_stats"]
            np.testing.assert_allclose(seedfill.stats(high[:, 6]), stats, rtol=1e-9, atol=1e-9)
    names = {
        **DECODER,
        **{f"calibrate.{k}": f"encoder10.{v}" for k, v in CALIBRATION.items()},
        **{f"upsamples.0.{k}": f"learnable_up3.{v}" for k, v in upsample_names(2).items()},
        **{f"upsamples.1.{k}": f"learnable_up4.{v}" for k, v in upsample_names(4).items()},
    }
    net = fill(WaveFormerDecoder(1, 2, (8, 16, 32, 64)), meta["shapes"], seedfill, names)
    official = {k for k in meta["shapes"] if not k.startswith("waveformer_encoder.")}
    assert {rename(k, names) for k, _ in net.named_parameters()} == official
    out = net(image, maps, seen).detach()
    np.testing.assert_allclose(seedfill.stats(out), data["out_stats"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(out[:, :, ::4, ::4, ::4].numpy(), data["out_sub"], atol=1e-10)


def count(net):
    return sum(p.numel() for p in net.parameters())


def inputs(size, widths=(4, 8, 16, 32), channels=1, batch=1, **kind):
    """An image, and maps and wavelet inputs as the encoder gives them."""
    image = torch.randn(batch, channels, *size, **kind)
    maps, seen = (
        [torch.randn(batch, w, *[-(-n // 2 ** (s + 1)) for n in size], **kind) for s, w in enumerate(widths)]
        for _ in range(2)
    )
    return image, maps, seen


@pytest.mark.parametrize(("channels", "expected"), [(1, 16_978_255), (4, 16_983_586)])
def test_parameters_of_the_published_net(channels, expected):
    encoder = WaveFormerEncoder(channels, 48, (2, 2, 2, 2), (3, 6, 12, 24), bias_reach=6)
    with torch.device("meta"):
        plain = WaveFormerDecoder(channels, channels, encoder.widths, encoder.strides)
        refined = WaveFormerDecoder(channels, channels, encoder.widths, refine_details=True)
    assert count(encoder) + count(plain) == expected
    assert count(refined) - count(plain) == 78_576


def test_narrow_full_resolution_saves_the_named_compute():
    """Multiply-adds of the paper's 96^3 crop, 4 channels in and out: 332 G of which 12.0 G in the encoder."""

    def giga(full_width):
        with torch.device("meta"):
            net = WaveFormerDecoder(4, 4, full_width=full_width)
            data = inputs((96, 96, 96), net.widths, channels=4)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(*data)
        return counter.get_total_flops() / 2e9

    whole = giga(None)
    assert whole == pytest.approx(332 - 12.0, abs=2)
    assert whole - giga(24) == pytest.approx(235.3 - 61.6, abs=0.2)
    assert whole - giga(16) == pytest.approx(235.3 - 28.6, abs=0.2)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("size", [(32, 32, 32), (33, 17, 50), (5, 40, 9), (17, 1, 1)])
def test_any_size_gives_logits_of_the_image(size, refine):
    net = WaveFormerDecoder(2, 3, (4, 8, 16, 32), refine_details=refine, full_width=2)
    data = inputs(size, channels=2)
    logits = net(*data)
    assert logits.shape == (1, 3, *size)
    assert torch.isfinite(logits).all()
    image, maps, seen = data
    torch.testing.assert_close(net(image, maps, seen[:-1]), logits)  # the deepest entry is not read


@pytest.mark.parametrize(("widths", "strides"), [((4, 8), (2, 4)), ((4, 4, 8), (4, 8, 16))])
def test_other_numbers_of_stages(widths, strides):
    net = WaveFormerDecoder(1, 2, widths, strides)
    size = (37, 20, 33)
    maps = [torch.randn(1, w, *[-(-n // s) for n in size]) for w, s in zip(widths, strides, strict=True)]
    assert net(torch.randn(1, 1, *size), maps, maps).shape == (1, 2, *size)


@pytest.mark.parametrize("refine", [False, True])
def test_every_weight_and_every_input_learns(refine):
    net = WaveFormerDecoder(1, 2, (4, 8, 16, 32), refine_details=refine)
    image, maps, seen = inputs((32, 24, 40), batch=2)
    leaves = [t.requires_grad_() for t in (image, *maps, *seen[:-1])]
    net(image, maps, seen).pow(3).sum().backward()
    silent = {n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    held = {f"calibrate.{n}.bias" for n in ("reduce", "conv", "expand")}
    held |= {f"upsamples.{i}.depthwise.bias" for i in range(2)}
    held |= {n for n, _ in net.named_parameters() if n.endswith("depthwise.bias") and "refine" in n}
    assert silent == held  # a norm subtracts these biases, see no_effect.py
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in leaves)


@pytest.mark.parametrize("refine", [False, True])
def test_constant_deepest_map_without_details_stays_constant(refine):
    block = WaveletUpsample(3, 2, 2, refine).double()
    nn.init.zeros_(block.low.weight)
    with torch.no_grad():
        block.low.weight[:, :, 1, 1, 1] = 1.0
    deepest = torch.ones(1, 3, 2, 3, 4, dtype=torch.float64)
    seen = torch.full((1, 2, 7, 11, 13), 5.0, dtype=torch.float64)
    expected = torch.full_like(seen, 3 * LOW_GAIN**-2)
    torch.testing.assert_close(block.lift(deepest, seen), expected)


def test_lift_is_the_inverse_transform_of_the_details_of_the_map():
    block = WaveletUpsample(6, 4, 3).double()
    seen = torch.randn(2, 4, 13, 9, 24, dtype=torch.float64)
    deepest = torch.randn(2, 6, 2, 2, 3, dtype=torch.float64)
    _, details = haar_decompose(seen, 3)
    slow = haar_reconstruct(block.low(deepest), details, seen.shape[2:])
    torch.testing.assert_close(block.lift(deepest, seen), slow, atol=1e-12, rtol=0)


def test_refinement_gates_each_band_by_itself():
    net = DetailRefinement(3).double()
    bands = torch.randn(2, 7, 3, 4, 5, 6, dtype=torch.float64)
    out = net(bands)
    assert ((out / bands > 0) & (out / bands < 1)).all()
    torch.testing.assert_close(out[:, 3:4], net(bands[:, 3:4]))


def test_residual_and_upsampling_commute_and_corners_can_stay():
    x = torch.randn(1, 4, 3, 5, 2, dtype=torch.float64)
    for corners in (True, False):
        net = ResidualUpsample(4, 2, 2, align_corners=corners).double()
        up = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=corners)[:, :, :5, :9]
        slow = net.head(net.norm(net.depthwise(up))) + net.residual(up)
        torch.testing.assert_close(net(x, (5, 9, 4)), slow)


def test_bf16_autocast_is_finite_and_near():
    torch.manual_seed(0)
    net = WaveFormerDecoder(1, 2, (4, 8, 16, 32), refine_details=True)
    data = inputs((32, 33, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(*data)
    logits.float().pow(2).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    exact = net(*data)
    assert (logits.float() - exact).std() < 0.05 * exact.std()


def test_channels_last_gives_equal_answers_under_equal_keys():
    torch.manual_seed(0)
    net = WaveFormerDecoder(2, 2, (4, 8, 16, 32), refine_details=True).double()
    image, maps, seen = inputs((32, 20, 17), channels=2, dtype=torch.float64)
    before, keys = net(image, maps, seen), list(net.state_dict())
    last = torch.channels_last_3d
    net.to(memory_format=last)
    maps, seen = ([t.contiguous(memory_format=last) for t in ts] for ts in (maps, seen))
    torch.testing.assert_close(net(image.contiguous(memory_format=last), maps, seen), before)
    assert list(net.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize("refine", [False, True])
def test_compiles_in_place_as_one_graph(monkeypatch, refine):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the checks of the tests do not compile
    net = WaveFormerDecoder(1, 2, (4, 8, 16), (2, 4, 8), refine_details=refine)
    image, maps, seen = inputs((20, 33, 17), (4, 8, 16))
    leaves = [*net.parameters(), *seen[:-1]]
    for x in seen:
        x.requires_grad_()
    before, keys = net(image, maps, seen), list(net.state_dict())
    slow = torch.autograd.grad(before.pow(2).sum(), leaves)
    net.compile(fullgraph=True, backend="aot_eager")  # the graphs of both directions, without a C++ compiler
    after = net(image, maps, seen)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    for fast, gradient in zip(torch.autograd.grad(after.pow(2).sum(), leaves), slow, strict=True):
        assert (fast - gradient).norm() <= 1e-3 * gradient.norm() + 1e-2
    assert list(net.state_dict()) == keys


def test_errors_teach():
    net = WaveFormerDecoder(1, 2, (4, 8, 16, 32))
    image, maps, seen = inputs((32, 32, 48))
    with pytest.raises(ValueError, match=r"map of stride 4: .* expected \(1, 8, 8, 8, 12\)"):
        net(image, [maps[0], maps[1][..., 1:], *maps[2:]], seen)
    with pytest.raises(ValueError, match=r"input of the wavelets of stride 8.*expected \(b, 16, d, h, w\)"):
        net(image, maps, [*seen[:2], seen[3], seen[3]])
    with pytest.raises(ValueError, match="expected 4 maps"):
        net(image, maps[:3], seen)
    with pytest.raises(ValueError, match=r"image: got .*expected \(b, 1, d, h, w\)"):
        net(image.expand(-1, 2, -1, -1, -1), maps, seen)
    with pytest.raises(ValueError, match="leaves one voxel at stride 16"):
        net(*inputs((16, 12, 16)))
    with pytest.raises(ValueError, match="two or more stages"):
        WaveFormerDecoder(1, 1, (4,), (2,))
    with pytest.raises(ValueError, match="twice the one before"):
        WaveFormerDecoder(1, 1, (4, 8), (2, 8))
    with pytest.raises(ValueError, match="full_width is 0"):
        WaveFormerDecoder(1, 1, full_width=0)
    with pytest.raises(ValueError, match="multiple of 4"):
        ChannelCalibration(6)
    with pytest.raises(ValueError, match="cannot give"):
        ResidualUpsample(4, 2, 4)(torch.randn(1, 4, 2, 2, 2), (9, 8, 8))
    with pytest.raises(ValueError, match="got a skip"):
        WaveletUpsample(8, 4, 1)(
            torch.randn(1, 8, 2, 2, 2), torch.randn(1, 4, 4, 4, 4), torch.randn(1, 4, 4, 4, 3)
        )
