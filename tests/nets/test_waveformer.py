import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aneurysm.nets.waveformer import PatchMerging, WaveFormerEncoder
from aneurysm.nets.waveformer_block import DropPath, FeedForward, WaveletBlock
from aneurysm.nets.window_attention import WindowAttention, merge_windows, split_windows

torch.set_num_threads(1)  # the machines that run the tests are shared

# our name -> official name, inside a block
BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.qkv": "attn.qkv",
    "attention.project": "attn.proj",
    "feed_forward.expand": "mlp.pwconv",
    "feed_forward.norm1": "mlp.norm1",
    "feed_forward.depthwise": "mlp.dwconv",
    "feed_forward.norm2": "mlp.norm2",
    "feed_forward.contract": "mlp.fc",
}


def load(path):
    data = np.load(path)
    return data, json.loads(str(data["meta"]))


def fill(module, shapes, seedfill, names, prefix=""):
    """Give a module the weights the official one had, by the official parameter names and shapes."""
    module.double().eval()
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            stem, _, leaf = key.rpartition(".")
            if stem not in names:
                continue
            official = f"{prefix}{names[stem]}.{leaf}"
            value = torch.from_numpy(seedfill.value(official, shapes[official.removeprefix(prefix)]))
            tensor.copy_(value.reshape(tensor.shape))
    return module


def official_bias_table(seedfill, window, heads, reach):
    """The official table as ours: the official index uses the depth stride 3w-1, so offsets share rows."""
    rows = torch.from_numpy(
        seedfill.value("attn.relative_position_bias_table", ((2 * window - 1) ** 3, heads))
    )
    i = torch.arange(2 * window - 1)
    index = i[:, None, None] * (3 * window - 1) + i[None, :, None] * (2 * window - 1) + i[None, None, :]
    table = torch.zeros(2 * reach - 1, 2 * reach - 1, 2 * reach - 1, heads, dtype=torch.float64)
    inner = slice(reach - window, reach + window - 1)
    table[inner, inner, inner] = rows[index]
    return table.flatten(0, 2)


def test_golden_feed_forward(golden, seedfill):
    data, meta = load(golden / "waveformer_ffn.npz")
    names = {k.removeprefix("feed_forward."): v[4:] for k, v in BLOCK_NAMES.items() if v.startswith("mlp.")}
    net = fill(FeedForward(8, 4), meta["shapes"], seedfill, names)
    out = net(torch.from_numpy(data["x"]))
    np.testing.assert_allclose(out.detach().numpy(), data["y"], atol=1e-10)


def test_golden_patch_merging(golden, seedfill):
    data, meta = load(golden / "waveformer_patchmerge.npz")
    net = fill(PatchMerging(8), meta["shapes"], seedfill, {"norm": "norm", "reduction": "reduction"})
    net.norm.eps = 1e-5  # this vector was made by a layer with torch's default, the encoder itself uses 1e-6
    out = net(torch.from_numpy(data["x"]))
    np.testing.assert_allclose(out.detach().numpy(), data["y_v2"], atol=1e-10)


@pytest.mark.parametrize("name", ["single_l0", "single_l2_rpb0"])
def test_golden_block(golden, seedfill, name):
    data, meta = load(golden / f"waveformer_block_{name}.npz")
    block = WaveletBlock(8, 2, meta["level"], normalise_lf=False, min_window=1, bias_reach=6)
    fill(block, meta["shapes"], seedfill, BLOCK_NAMES)
    if not meta["rpb0"]:
        table = official_bias_table(seedfill, meta["window"], 2, 6)
        block.attention.position_bias.data.copy_(table)
    x = seedfill.inp(meta["input_seed"], 1, *[meta["size"]] * 3, 8)
    np.testing.assert_allclose(block(x).map.detach().numpy(), data["y"], atol=1e-10)


def test_golden_encoder(golden, seedfill):
    """The whole official encoder: its two remaining bugs are undone by its own weights, rearranged."""
    data, meta = load(golden / "waveformer_net_tiny32_single.npz")
    heads = meta["cfg"]["num_heads"]
    net = WaveFormerEncoder(
        1, 8, (2, 2, 2, 2), heads, normalise_lf=False, min_window=1, bias_reach=2
    ).double()
    shapes = meta["shapes"]

    def official(name):
        name = f"waveformer_encoder.{name}"
        return torch.from_numpy(seedfill.value(name, shapes[name]))

    with torch.no_grad():
        net.patch_embed.weight.copy_(official("patch_embed.proj.weight"))
        net.patch_embed.bias.copy_(official("patch_embed.proj.bias"))
        for s, stage in enumerate(net.stages):
            for k, block in enumerate(stage):
                prefix = f"block{s + 1}.{k}."
                inner = {key.removeprefix(f"waveformer_encoder.{prefix}"): v for key, v in shapes.items()}
                fill(block, inner, seedfill, BLOCK_NAMES, f"waveformer_encoder.{prefix}")
                rows = official(f"{prefix}attn.relative_position_bias_table")
                i = torch.arange(3)  # window side 2: depth stride 5 instead of 9
                index = i[:, None, None] * 5 + i[None, :, None] * 3 + i
                block.attention.position_bias.copy_(rows[index].flatten(0, 2))
    # Official merging takes corners 000 100 010 001 101 010 001 111 (two twice, two never).
    order = [0b000, 0b100, 0b010, 0b001, 0b101, 0b010, 0b001, 0b111]
    maps, x = [], seedfill.inp(meta["input_seed"], 1, 1, 32, 32, 32)
    x = net.patch_embed(x).permute(0, 2, 3, 4, 1)
    for s, stage in enumerate(net.stages):
        if s:
            c = x.shape[-1]
            corners = [x[:, k >> 2 :: 2, (k >> 1) & 1 :: 2, k & 1 :: 2] for k in order]
            weight, bias = (official(f"downsample_{s}.norm.{leaf}") for leaf in ("weight", "bias"))
            x = F.layer_norm(torch.cat(corners, -1), (8 * c,), weight, bias, 1e-6)
            x = x @ official(f"downsample_{s}.reduction.weight").T
        for block in stage:
            x = block(x).map
        maps.append(F.layer_norm(x, x.shape[-1:]).permute(0, 4, 1, 2, 3))
    for s, m in enumerate(maps):
        np.testing.assert_allclose(seedfill.stats(m), data[f"outs{s}_stats"], rtol=1e-9, atol=1e-9)


def test_attention_equals_the_slow_formula():
    attention = WindowAttention(6, 2, reach=2).double()
    torch.nn.init.normal_(attention.position_bias)
    x = torch.randn(1, 2, 3, 4, 6, dtype=torch.float64)
    positions = [(a, b, c) for a in range(2) for b in range(3) for c in range(4)]
    query, key, value = attention.qkv(x.reshape(24, 6)).chunk(3, -1)
    heads = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        scores = query[:, part] @ key[:, part].T / 3**0.5
        for i, p in enumerate(positions):
            for j, q in enumerate(positions):
                offset = [max(-1, min(1, u - v)) + 1 for u, v in zip(p, q, strict=True)]
                row = (offset[0] * 3 + offset[1]) * 3 + offset[2]
                scores[i, j] = scores[i, j] + attention.position_bias[row, head]
        heads.append(scores.softmax(-1) @ value[:, part])
    slow = attention.project(torch.cat(heads, -1)).reshape(1, 2, 3, 4, 6)
    torch.testing.assert_close(attention(x), slow)


@settings(deadline=None, max_examples=15)
@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 3)] * 3))
def test_windows_are_merged_where_they_were(window, count):
    size = tuple(a * b for a, b in zip(window, count, strict=True))
    x = torch.randn(2, *size, 3)
    windows = split_windows(x, window)
    assert windows.shape == (2 * count[0] * count[1] * count[2], *window, 3)
    torch.testing.assert_close(windows[0], x[0, : window[0], : window[1], : window[2]])
    torch.testing.assert_close(merge_windows(windows, size), x)


def test_multi_scale_is_the_sum_over_the_levels_of_the_slow_formula():
    block = WaveletBlock(8, 2, 2, multi_scale=True, min_window=2).double()
    torch.nn.init.normal_(block.attention.position_bias)
    z = torch.randn(1, 8, 16, 8, 8, dtype=torch.float64)
    channel_first = z.permute(0, 4, 1, 2, 3)
    coarse = block.attention(F.avg_pool3d(channel_first, 4).permute(0, 2, 3, 4, 1))  # one window 2 4 2
    middle = F.avg_pool3d(channel_first, 2).permute(0, 2, 3, 4, 1)  # 4 8 4
    answer = torch.zeros_like(middle)
    for i in (0, 2):
        for j in (0, 4):
            for k in (0, 2):
                cell = (slice(None), slice(i, i + 2), slice(j, j + 4), slice(k, k + 2))
                answer[cell] = block.attention(middle[cell])
    expected = sum(
        F.interpolate(a.permute(0, 4, 1, 2, 3), size=(8, 16, 8), mode="trilinear") for a in (coarse, answer)
    )
    torch.testing.assert_close(block.mix(z), expected.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("multi_scale", [False, True])
@pytest.mark.parametrize("size", [(32, 32, 32), (33, 17, 50), (5, 64, 9), (2, 2, 2)])
def test_any_size_gives_the_promised_maps(size, multi_scale):
    net = WaveFormerEncoder(2, 8, heads=(1, 2, 4, 8), multi_scale=multi_scale)
    assert (net.widths, net.strides) == ((8, 16, 32, 64), (2, 4, 8, 16))
    maps = net(torch.randn(1, 2, *size))
    for m, width, stride in zip(maps, net.widths, net.strides, strict=True):
        assert m.shape == (1, width, *[-(-n // stride) for n in size])
        assert torch.isfinite(m).all()
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m.mean(1)), atol=1e-5, rtol=0)


def test_level_drops_on_small_maps_and_short_axes():
    block = WaveletBlock(8, 2, 3, min_window=4)
    assert block.levels_for((64, 64, 64)) == (3, 3, 3)
    assert block.levels_for((16, 16, 16)) == (2, 2, 2)
    assert block.levels_for((8, 33, 2)) == (1, 3, 0)
    assert WaveletBlock(8, 2, 3, min_window=1).levels_for((8, 4, 1)) == (3, 3, 3)


def test_every_weight_learns_and_forward_is_encode_after_embedding():
    net = WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8), multi_scale=True, drop_path=0.2).eval()
    image = torch.randn(2, 1, 32, 24, 40)
    for a, b in zip(net(image), net.encode(net.patch_embed(image)).maps, strict=True):
        torch.testing.assert_close(a, b)
    sum(m.pow(3).sum() for m in net(image)).backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent
    assert set(net.patch_embed.state_dict()) == {"weight", "bias"}


def test_normalised_low_band_keeps_the_scale():
    """Without it the low band of a smooth map grows by 2 sqrt2 per level."""
    smooth = torch.ones(1, 16, 16, 16, 8)
    seen = {}
    for normalise in (True, False):
        block = WaveletBlock(8, 2, 3, normalise_lf=normalise, min_window=1)
        block.attention.register_forward_pre_hook(
            lambda _, args, n=normalise: seen.update({n: float(args[0].abs().max())})
        )
        block.mix(smooth)
    assert seen[True] == pytest.approx(1.0)
    assert seen[False] == pytest.approx((2 * 2**0.5) ** 3, rel=1e-5)


def test_drop_path_keeps_the_expectation_and_is_off_in_eval():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 2))
    assert out.mean() == pytest.approx(1.0, abs=0.05)
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(drop.eval()(torch.ones(3, 2)), torch.ones(3, 2))


def test_errors_teach():
    with pytest.raises(ValueError, match="heads"):
        WaveFormerEncoder(1, 16, heads=(3, 6, 12, 24))
    with pytest.raises(ValueError, match="per stage"):
        WaveFormerEncoder(1, 8, depths=(1, 1), heads=(1, 2, 4))
    net = WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8))
    with pytest.raises(ValueError, match=r"expected \(b, 1, d, h, w\)"):
        net(torch.randn(1, 2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"expected \(b, 8, d, h, w\)"):
        net.encode(torch.randn(1, 4, 8, 8, 8))


@pytest.mark.parametrize("depth", [7, 8, 9, 25])
def test_feed_forward_in_parts_is_that_of_the_whole(depth, monkeypatch):
    """Without gradients large maps go through in slabs of at least eight planes."""
    monkeypatch.setattr("aneurysm.nets.waveformer_block.SLAB", 1)
    net = FeedForward(4, 3).double()
    x = torch.randn(2, depth, 3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        parts = net(x)
    torch.testing.assert_close(parts, net(x))
