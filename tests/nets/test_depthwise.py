import pytest
import torch
import torch.nn.functional as F

from aneurysm.nets import depthwise
from aneurysm.nets.depthwise import DepthwiseConv3d


def plain(conv, x):
    moved = x.permute(0, 4, 1, 2, 3)
    out = F.conv3d(moved, conv.weight, conv.bias, padding=1, groups=conv.in_channels)
    return out.permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 4), (7, 5, 6)])
@pytest.mark.parametrize("slab", [1, 400, 2**20])
def test_gradients_are_those_of_the_convolution_however_it_is_cut(size, slab, monkeypatch):
    monkeypatch.setattr(depthwise, "SLAB", slab)
    torch.manual_seed(0)
    conv = DepthwiseConv3d(5).double()
    x = torch.randn(3, *size, 5, dtype=torch.float64, requires_grad=True)
    aim = torch.randn(3, *size, 5, dtype=torch.float64)
    found = []
    for run in (lambda: conv(x), lambda: plain(conv, x)):
        inputs = (x, conv.weight, conv.bias)
        out = run()
        found.append((out, *torch.autograd.grad(out, inputs, aim)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_what_is_asked_for_gets_a_gradient():
    conv = DepthwiseConv3d(4)
    conv.weight.requires_grad_(False)
    x = torch.randn(1, 3, 3, 3, 4)
    conv(x).sum().backward()
    assert conv.weight.grad is None
    torch.testing.assert_close(conv.bias.grad, torch.full((4,), 27.0))


def test_state_and_layouts_are_those_of_the_plain_convolution():
    torch.manual_seed(0)
    conv = DepthwiseConv3d(4)
    usual = torch.nn.Conv3d(4, 4, 3, padding=1, groups=4)
    usual.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 3, 4, 5)
    expected = usual(x).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(conv(x.permute(0, 2, 3, 4, 1)), expected)
    torch.testing.assert_close(conv(x.permute(0, 2, 3, 4, 1).contiguous()), expected)
    conv.to(memory_format=torch.channels_last_3d)
    y = x.permute(0, 2, 3, 4, 1).contiguous().requires_grad_()
    conv(y).sum().backward()
    assert y.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(y).dtype == torch.bfloat16


def test_errors_teach():
    with pytest.raises(ValueError, match=r"expected \(b, d, h, w, 4\)"):
        DepthwiseConv3d(4)(torch.randn(1, 4, 3, 3, 3))
