import json
import re

import numpy as np
import pytest
import torch

from aneurysm.nets.segformer3d import SegFormer3D
from aneurysm.nets.segformer_blocks import (
    FullResolutionHead,
    MixFeedForward,
    OverlapEmbed,
    ReducedAttention,
    SegFormerBlock,
    as_map,
    pointwise,
    upsample,
)

torch.set_num_threads(1)  # the machines that run the tests are shared

SMALL = {"widths": (8, 16, 24, 32), "heads": (1, 2, 3, 4), "decoder_width": 16}


def official_name(name):
    """Parameter name of the published network for one of ours."""
    rules = [
        (r"^embeds\.(\d)\.conv", lambda m: f"segformer_encoder.embed_{int(m[1]) + 1}.patch_embeddings"),
        (r"^embeds\.(\d)\.norm", lambda m: f"segformer_encoder.embed_{int(m[1]) + 1}.norm"),
        (r"^stages\.(\d)", lambda m: f"segformer_encoder.tf_block{int(m[1]) + 1}"),
        (r"^norms\.(\d)", lambda m: f"segformer_encoder.norm{int(m[1]) + 1}"),
        (r"^lift\.(\d)\.0", lambda m: f"segformer_decoder.linear_c{int(m[1]) + 1}.proj"),
        (r"^lift\.(\d)\.1", lambda m: f"segformer_decoder.linear_c{int(m[1]) + 1}.bn"),
        (r"^fuse", lambda m: "segformer_decoder.linear_fuse"),
        (r"^predict", lambda m: "segformer_decoder.linear_pred"),
        (r"attention\.reduce_norm", lambda m: "attention.sr_norm"),
        (r"attention\.reduce", lambda m: "attention.sr"),
        (r"attention\.project", lambda m: "attention.proj"),
        (r"feed_forward\.depthwise", lambda m: "mlp.dwconv.dwconv"),
        (r"feed_forward\.norm", lambda m: "mlp.dwconv.bn"),
        (r"feed_forward", lambda m: "mlp"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize(
    "name", ["segformer3d_tiny32", pytest.param("segformer3d_default64", marks=pytest.mark.slow)]
)
def test_golden(golden, seedfill, name):
    data = np.load(golden / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    config = {
        "in_channels": 4,
        "sr_ratios": [4, 2, 1, 1],
        "embed_dims": [32, 64, 160, 256],
        "num_heads": [1, 2, 5, 8],
        "decoder_head_embedding_dim": 256,
        "num_classes": 3,
    } | meta["cfg"]
    net = SegFormer3D(
        config["in_channels"],
        config["num_classes"],
        config["embed_dims"],
        (2, 2, 2, 2),
        config["num_heads"],
        config["sr_ratios"],
        decoder_width=config["decoder_head_embedding_dim"],
        norm="batch",
        full_resolution_skip=False,
    )
    ours = {official_name(k): list(v.shape) for k, v in net.state_dict().items()}
    assert ours == meta["shapes"]
    if "params" in meta:
        assert sum(p.numel() for p in net.parameters()) == meta["params"]
    seedfill.fill(net.double().eval(), official_name)
    x = seedfill.inp(meta["input_seed"], 1, config["in_channels"], *[meta["size"]] * 3)
    with torch.no_grad():
        maps = net.encode(x)
        low = net.predict(net.decode(maps))
        out = net(x)
    for i, m in enumerate(maps):
        np.testing.assert_allclose(seedfill.stats(m), data[f"stage{i + 1}_stats"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(low.numpy(), data["lowres_logits"], atol=1e-10)
    np.testing.assert_allclose(seedfill.stats(out), data["out_stats"], rtol=1e-9, atol=1e-9)
    if "out" in data:
        np.testing.assert_allclose(out.numpy(), data["out"], atol=1e-10)


PUBLISHED = {
    "widths": (32, 64, 160, 256),
    "depths": (2, 2, 2, 2),
    "heads": (1, 2, 5, 8),
    "decoder_width": 256,
    "norm": "batch",
    "full_resolution_skip": False,
}


@pytest.mark.parametrize(
    ("channels", "classes", "count"),
    [(4, 3, 4_525_251), (1, 1, 4_491_809), (1, 2, 4_492_066), (1, 14, 4_495_150), (2, 1, 4_502_785)],
)
def test_size_of_the_published_network(channels, classes, count):
    net = SegFormer3D(channels, classes, **PUBLISHED)
    assert sum(p.numel() for p in net.parameters()) == count
    decoder = [*net.lift.parameters(), *net.fuse.parameters(), *net.predict.parameters()]
    if (channels, classes) == (4, 3):
        assert sum(p.numel() for p in decoder) == 397_571


def test_decoder_equals_upsampling_first_and_fusing_all_channels():
    """The convolution over the stages side by side at the finest grid, as published."""
    net = SegFormer3D(1, 2, **SMALL, norm="batch", full_resolution_skip=False).double().eval()
    with torch.no_grad():
        net.fuse[1].running_mean.normal_()
        maps = net.encode(torch.randn(2, 1, 33, 30, 47, dtype=torch.float64))
        lifted = []
        for i, (lift, m) in enumerate(zip(net.lift, maps, strict=True)):
            tokens = lift(m.flatten(2).transpose(1, 2))
            lifted.append(upsample(as_map(tokens, m.shape[2:]), 2**i, maps[0].shape[2:]))
        torch.testing.assert_close(net.decode(maps), net.fuse(torch.cat(lifted[::-1], 1)))
        features = net.decode(maps)
        torch.testing.assert_close(pointwise(net.predict, features), net.predict(features))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("size", [(32, 64, 48), (33, 30, 47), (16, 21, 5)])
def test_logits_have_the_size_of_the_image(size, stride, skip):
    net = SegFormer3D(1, 3, **SMALL, patch_stride=stride, full_resolution_skip=skip)
    out = net(torch.randn(2, 1, *size))
    assert out.shape == (2, 3, *size)
    assert torch.isfinite(out).all()


def test_a_wide_volume_is_no_longer_taken_for_a_cube():
    """The logits near a far corner depend on the image there: axes are not mixed up."""
    net = SegFormer3D(1, 1, **SMALL).eval()
    image = torch.randn(1, 1, 32, 64, 128)
    changed = image.clone()
    changed[..., 30, 62, 126] += 10
    with torch.no_grad():
        difference = (net(changed) - net(image)).abs()[0, 0]
    assert np.unravel_index(int(difference.argmax()), difference.shape) >= (28, 60, 124)


def test_reduced_attention_equals_the_slow_formula_with_a_ragged_border():
    attention = ReducedAttention(4, 2, 2).double()
    size = (3, 2, 5)
    x = torch.randn(1, 30, 4, dtype=torch.float64)
    grid = x[0].reshape(*size, 4)
    d, h, w = (torch.tensor([*range(n), n - 1][: n + n % 2]) for n in size)  # last plane twice
    grid = grid[d][:, h][:, :, w]
    cells = grid.reshape(2, 2, 1, 2, 3, 2, 4).permute(0, 2, 4, 6, 1, 3, 5).reshape(6, 4, 2, 2, 2)
    reduced = torch.einsum("ncijk,ocijk->no", cells, attention.reduce.weight) + attention.reduce.bias
    key, value = attention.key_value(attention.reduce_norm(reduced)).chunk(2, -1)
    query = attention.query(x[0])
    parts = []
    for head in range(2):
        s = slice(2 * head, 2 * head + 2)
        parts.append((query[:, s] @ key[:, s].T / 2**0.5).softmax(-1) @ value[:, s])
    torch.testing.assert_close(attention(x, size)[0], attention.project(torch.cat(parts, -1)))


def test_upsampling_keeps_voxels_over_their_cells():
    ramp = torch.arange(5.0).reshape(1, 1, 5, 1, 1).expand(1, 1, 5, 2, 2)
    fine = upsample(ramp, 4, (18, 8, 8))[0, 0, :, 0, 0]
    torch.testing.assert_close(fine[2:18], (torch.arange(2, 18) - 1.5) / 4)


def test_full_resolution_skip_resolves_what_a_quarter_of_the_resolution_cannot():
    """One-voxel checks: the published decoder cannot fit them, the one with the skip can."""
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 16, 16, 16)
    image[..., ::2, ::2, ::2] = 1
    errors = {}
    for skip in (False, True):
        net = SegFormer3D(1, 1, **SMALL, full_resolution_skip=skip)
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(15):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(image), image)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        errors[skip] = loss.item()
    assert errors[True] < 0.15 < 0.3 < errors[False]


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_every_norm_trains_every_weight(norm):
    net = SegFormer3D(2, 2, **SMALL, norm=norm)
    net(torch.randn(1, 2, 36, 33, 40)).pow(2).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_recomputation_changes_memory_and_nothing_else(norm):
    kept, gradients, buffers, outputs = {}, {}, {}, {}
    image = torch.randn(2, 1, 32, 24, 40)
    for recompute in (False, True):
        torch.manual_seed(0)
        net = SegFormer3D(1, 1, **SMALL, norm=norm, full_resolution_skip=False, recompute=recompute)
        weights, sizes = {p.data_ptr() for p in net.parameters()}, {}

        def keep(x, weights=weights, sizes=sizes):
            if (place := x.untyped_storage().data_ptr()) not in weights:
                sizes[place] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = net(image)
        out.square().mean().backward()
        kept[recompute], outputs[recompute] = sum(sizes.values()), out
        gradients[recompute] = {name: p.grad for name, p in net.named_parameters()}
        buffers[recompute] = dict(net.named_buffers())
    assert kept[True] < 0.6 * kept[False]
    assert torch.equal(outputs[True], outputs[False])
    assert list(gradients[True]) == list(gradients[False]) and list(buffers[True]) == list(buffers[False])
    for name, gradient in gradients[False].items():
        assert torch.equal(gradients[True][name], gradient), name
    assert all(torch.equal(buffers[True][name], b) for name, b in buffers[False].items())  # updated once
    assert norm == "group" or any(name.endswith("running_mean") for name in buffers[True])


def test_nothing_is_computed_again_without_training(monkeypatch):
    net = SegFormer3D(1, 1, **SMALL, recompute=True)
    monkeypatch.setattr("aneurysm.nets.recomputation.checkpoint", None)
    with torch.no_grad():
        net(torch.randn(1, 1, 16, 16, 16))
    net.eval()(torch.randn(1, 1, 16, 16, 16)).mean().backward()
    with pytest.raises(TypeError):
        net.train()(torch.randn(1, 1, 16, 16, 16))


def test_errors_teach():
    with pytest.raises(ValueError, match="per stage"):
        SegFormer3D(widths=(8, 16, 32))
    with pytest.raises(ValueError, match="heads"):
        SegFormer3D(widths=(10, 16, 32, 64), heads=(3, 2, 4, 8))
    with pytest.raises(ValueError, match=r"prior=1"):
        SegFormer3D(prior=1)
    with pytest.raises(
        ValueError, match=r"built for 2 channel\(s\): got .*\(1, 1, 16, 16, 16\), expected \(b, 2, d"
    ):
        SegFormer3D()(torch.randn(1, 1, 16, 16, 16))
    with pytest.raises(ValueError, match="at least one voxel"):
        SegFormer3D()(torch.randn(1, 2, 16, 0, 16))
    with pytest.raises(ValueError, match="norm 'group'"):
        SegFormer3D(1, 1, **SMALL, norm="instance")(torch.randn(1, 1, 32, 32, 32))
    with pytest.raises(ValueError, match="more of them per step"):
        SegFormer3D(1, 1, **SMALL, norm="batch")(torch.randn(1, 1, 32, 32, 32))
    assert SegFormer3D(1, 1, **SMALL, norm="batch")(torch.randn(2, 1, 32, 32, 32)).isfinite().all()


def test_every_part_says_what_it_expects():
    tokens = torch.randn(1, 8, 12)
    with pytest.raises(ValueError, match=r"OverlapEmbed: got .* expected \(b, 3, d, h, w\)"):
        OverlapEmbed(3, 8, 2)(torch.randn(1, 2, 8, 8, 8))
    for part in (
        ReducedAttention(8, 2, 2),
        MixFeedForward(8, 4, "group"),
        SegFormerBlock(8, 2, 2, 4, "group"),
    ):
        with pytest.raises(
            ValueError, match=rf"{type(part).__name__}: got .*\(1, 8, 12\), expected \(b, n, 8\)"
        ):
            part(tokens, (2, 2, 2))
        with pytest.raises(ValueError, match=r"do not fill a map of \(2, 3, 2\)"):
            part(torch.randn(1, 8, 8), (2, 3, 2))
    head = FullResolutionHead(1, 16, 8, 2, "group")
    image, features = torch.randn(1, 1, 16, 13, 16), torch.randn(1, 16, 4, 4, 4)
    assert head(image, features, 4).shape == (1, 2, 16, 13, 16)
    with pytest.raises(ValueError, match=r"do not lie under .* expected \(8, 7, 8\)"):
        head(image, features, 2)
    with pytest.raises(ValueError, match=r"features: got .* expected \(b, 16, d, h, w\)"):
        head(image, features[:, :8], 4)
    net = SegFormer3D(1, 1, **SMALL)
    with pytest.raises(ValueError, match="3 maps for 4 stages"):
        net.decode([torch.randn(1, 8, 8, 8, 8)] * 3)
    with pytest.raises(ValueError, match=r"stage 2: got .* expected \(b, 16, d, h, w\)"):
        net.decode([torch.randn(1, 8, 8, 8, 8)] * 4)
