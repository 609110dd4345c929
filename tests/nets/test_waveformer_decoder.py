import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


@pytest.fixture(scope="module")
def seedfill(golden):
    spec = importlib.util.spec_from_file_location("seedfill", golden / "seedfill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    net = WaveFormerEncoder(
        1, 8, (2, 2, 2, 2), (1, 2, 4, 8), normalise_lf=False, min_window=1, bias_reach=2
    )
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
            parameter.copy_(value[index] if key.endswith("table") else value.reshape(parameter.shape))
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
            x = block(x)
        seen.append(stage[-1].norm1(x).permute(0, 4, 1, 2, 3))
        x = stage[-1](x)
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
