"""Stitching windows: MONAI's result from a slab, whatever the shapes; how much is held; types of result."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers.utils import sliding_window_inference
from torch import nn

from aneurysm.stages.sliding import _Slab, slide
from aneurysm.stages.windows import Box, View, lattice, place, window_starts

sides = st.integers(3, 16)


class Local(nn.Module):
    """Two channels that depend on a voxel's neighbours and on its place in the window."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.conv.weight.data = torch.randn(self.conv.weight.shape, generator=generator)
        self.conv.bias.data.zero_()  # pyright: ignore[reportOptionalMemberAccess]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1])
        return self.conv(x) + ramp + 2 * ramp[:, None] - ramp[:, None, None]


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)


def of_monai(net: nn.Module, volume: np.ndarray, view: View) -> np.ndarray:
    with torch.no_grad():
        logits = sliding_window_inference(
            torch.from_numpy(volume)[None], view.window, 2, net, overlap=view.overlap, mode="gaussian",
            padding_mode="replicate",
        )  # fmt: skip
    assert isinstance(logits, torch.Tensor)
    return torch.sigmoid(logits[0]).numpy()


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(sides, sides, sides),
    window=st.integers(3, 12),
    overlap=st.sampled_from([0, 0.25, 0.5, 0.7]),
)
def test_it_gives_what_monai_gives(shape, window, overlap):
    net, view, volume = Local(), View(window, overlap), noise(shape)
    np.testing.assert_allclose(slide(net, volume, view), of_monai(net, volume, view), atol=1e-6)


def test_flips_are_the_mean_of_flipped_passes():
    net, volume = Local(), noise((16, 12, 20))  # windows of 8 at half overlap lie alike from either end
    views = [volume, volume[..., ::-1], volume[:, ::-1]]
    apart = [of_monai(net, np.ascontiguousarray(v), View(8, 0.5)) for v in views]
    expected = (apart[0] + apart[1][..., ::-1] + apart[2][:, ::-1]) / 3
    np.testing.assert_allclose(slide(net, volume, View(8, 0.5, ("w", "d"))), expected, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_box_gets_bit_for_bit_what_the_whole_gets(data):
    shape = data.draw(st.tuples(*[st.integers(6, 24)] * 3), label="shape")
    ends = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for n in shape]
    box = Box(tuple(a for a, _ in ends), tuple(b + 1 for _, b in ends))
    flips = data.draw(st.sampled_from([(), ("w",), ("d", "h")]), label="flips")
    view = View(data.draw(st.integers(3, 9)), data.draw(st.sampled_from([0.0, 0.25, 0.5])), flips)
    exact = data.draw(st.booleans(), label="exact")
    placed = place(box, shape, view, exact)
    net, volume = Local(), noise(shape)
    whole = slide(net, volume, view, starts=lattice(shape, view, placed.anchor))
    part = slide(net, volume, view, placed.box, placed.starts)
    # All that was asked for is given, and nothing outside what is said to be given.
    assert all(a <= b for a, b in zip(placed.box.start, box.start, strict=True))
    assert all(a >= b for a, b in zip(placed.box.stop, box.stop, strict=True))
    outside = np.ones(shape, bool)
    outside[placed.box.slices] = False
    assert not part[:, outside].any() and part[(slice(None), *placed.box.slices)].all()
    if exact:
        assert placed.exact == placed.box
    if placed.exact is not None:
        inside = (slice(None), *placed.exact.slices)
        assert np.array_equal(part[inside], whole[inside])


def test_a_real_net_too_is_the_same_to_the_last_bit():
    from aneurysm.nets.unet import UNet3D

    torch.manual_seed(0)
    net, view, volume = UNet3D(), View(16, 0.25), noise((40, 37, 50))
    placed = place(Box((14, 10, 20), (24, 20, 31)), (40, 37, 50), view, exact=True)
    # An odd number of windows: the last batch is not full.
    assert placed.count % 2 == 1 or placed.count < int(np.prod([len(s) for s in lattice((40, 37, 50), view)]))
    whole = slide(net, volume, view, starts=lattice((40, 37, 50), view, placed.anchor))
    part = slide(net, volume, view, placed.box, placed.starts)
    inside = (slice(None), *placed.box.slices)
    assert np.array_equal(part[inside], whole[inside])


def test_the_slab_is_a_window_thick_along_the_longest_axis(monkeypatch):
    seen = []
    add = _Slab.add

    def watched(self, *arguments):
        yield from add(self, *arguments)
        seen.append(tuple(self.sums.shape))

    monkeypatch.setattr(_Slab, "add", watched)
    slide(Local(), noise((20, 40, 12)), View(8, 0.5, ("w",)))
    assert set(seen) == {(2, 2, 20, 8, 12)}  # views, channels, d, h, w
    seen.clear()
    slide(Local(), noise((20, 40, 12)), View(8, 0.5), Box((5, 6, 7), (9, 30, 12)))
    assert set(seen) == {(1, 2, 4, 8, 5)}


def test_types_of_the_result_and_channels_one_by_one():
    net, volume, view = Local(), noise((14, 10, 9)), View(6, 0.5)
    full = slide(net, volume, view)
    half, steps = slide(net, volume, view, dtype=np.float16), slide(net, volume, view, dtype=np.uint8)
    assert half.dtype == np.float16 and steps.dtype == np.uint8
    np.testing.assert_allclose(half, full, atol=1e-3)
    np.testing.assert_array_equal(steps, np.round(full * 255).astype(np.uint8))
    np.testing.assert_array_equal(slide(net, [volume[0]], view), full)
    logits = slide(net, volume, view, activate=lambda x: x)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), full, atol=1e-6)


def test_the_net_comes_back_in_its_mode_even_after_an_error():
    class Smaller(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., ::2]

    net = Smaller().train()
    with pytest.raises(ValueError, match="size of the window"):
        slide(net, noise((8, 8, 8)), View(8, 0.0))
    assert net.training


def test_wrong_boxes_and_windows():
    with pytest.raises(ValueError, match="leaves the volume"):
        slide(Local(), noise((8, 8, 8)), View(4, 0.0), Box((0, 0, 0), (8, 8, 9)))
    with pytest.raises(ValueError, match="holds voxels"):
        Box((0, 4, 0), (8, 4, 8))
    with pytest.raises(ValueError, match="do not cover"):
        slide(Local(), noise((8, 8, 8)), View(4, 0.0), starts=([0, 4], [0], [0, 4]))


def test_fewer_windows():
    view, shape = View(64, 0.25), (400, 400, 400)
    box = Box((100, 100, 90), (212, 212, 250))
    assert [len(s) for s in place(box, shape, view, exact=False).starts] == [2, 2, 3]
    assert [len(s) for s in place(box, shape, view, exact=True).starts] == [3, 3, 4]
    assert [len(s) for s in lattice(shape, view)] == [8, 8, 8]
    # From the origin the same box would meet more of them.
    reached = [s for s in window_starts(400, 64, 0.25) if s < 212 and s + 64 > 100]
    assert len(reached) == 4
