"""Depthwise 3x3x3 convolution of channels-last maps whose backward pass is fast on a CPU.

PyTorch's backward pass of a channels-last depthwise convolution took half of all training time of the
WaveFormer encoder on a CPU: 0.6 s for the weights of 192 channels on 32^3 voxels, where the forward pass
takes 0.05 s. Here the input's gradient is the forward convolution with the mirrored kernel, and the weights'
gradient a sum of 27 products of shifted maps, in slabs that stay in the cache. On other devices, under
autocast and under torch.compile the library's own convolution runs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aneurysm.nets.shapes import expect_map

SLAB = 2**19  # numbers of a map in one slab, about what a core's cache holds


class DepthwiseConv3d(nn.Conv3d):
    """Convolution of every channel with a 3x3x3 kernel of its own, zero padding, on (b, d, h, w, c) maps.

    State (`weight` (c, 1, 3, 3, 3), `bias` (c)) and initial values are those of the plain convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, input: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d h w c"]:
        expect_map("DepthwiseConv3d", input, self.in_channels, channels_last=True)
        weight, bias = self.weight, self.bias
        assert bias is not None
        own = input.device.type == "cpu" and not torch.compiler.is_compiling()
        if own and not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
            return _Depthwise.apply(input, weight, bias)
        return _convolve(input, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The permuted view is channels-last memory, the fast layout of the convolution: nothing is copied.
    out = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, padding=1, groups=len(weight))
    return out.permute(0, 2, 3, 4, 1)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _convolve(grad, weight.flip(2, 3, 4), None) if for_x else None,
            _weight_gradient(x, grad).view_as(weight) if for_weight else None,
            grad.flatten(0, 3).sum(0) if for_bias else None,
        )


def _weight_gradient(
    x: Float[Tensor, "b d h w c"], grad: Float[Tensor, "b d h w c"]
) -> Float[Tensor, "c 27"]:
    h, w, c = x.shape[2:]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1, 1, 1))
    total = x.new_zeros(27, c)
    room = x.new_empty(max(SLAB, h * w * c))
    for samples, begin, planes in _slabs(x.shape):
        part = grad[samples, begin : begin + planes]
        product = room[: part.numel()].view(part.shape)
        for k in range(27):
            i, j, l = k // 9, k // 3 % 3, k % 3  # noqa: E741 - as the kernel's axes
            shifted = padded[samples, begin + i : begin + i + planes, j : j + h, l : l + w]
            torch.mul(shifted, part, out=product)
            total[k] += product.view(-1, c).sum(0)
    return total.t()


def _slabs(shape: torch.Size) -> Iterator[tuple[slice, int, int]]:
    """Samples, first plane and number of planes of parts of about `SLAB` numbers, one plane at least."""
    b, d, h, w, c = shape
    together = max(1, SLAB // (d * h * w * c))
    planes = d if together > 1 else min(d, max(1, SLAB // (h * w * c)))
    for sample in range(0, b, together):
        for begin in range(0, d, planes):
            yield slice(sample, min(b, sample + together)), begin, min(planes, d - begin)
