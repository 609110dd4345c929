"""Tokens, attention and feed-forward of SegFormer3D (arXiv 2404.10156): what one stage is made of.

Notation: b batch, c channels, (d, h, w) voxels of a map, n = d h w tokens. Maps lie in channels-last memory,
so that a map and its token sequence are two views of the same numbers.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.no_effect import hold
from aneurysm.nets.shapes import expect_map
from aneurysm.nets.wavelet import pad_to_multiple

Norm = Literal["batch", "instance", "group"]


def norm3d(kind: Norm, channels: int) -> nn.Module:
    """Normalisation of a (b, channels, d, h, w) map.

    batch is the paper's choice and wants many crops per step; instance and group do not depend on the
    batch, and group (8 channels each) also works on maps of one voxel.

    Raises:
        ValueError: another kind.
    """
    if kind == "batch":
        return nn.BatchNorm3d(channels)
    if kind == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(
            max(n for n in range(1, max(channels // 8, 1) + 1) if channels % n == 0), channels
        )
    raise ValueError(f"Unknown normalisation {kind!r}: use 'batch', 'instance' or 'group'.")


def as_tokens(x: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b n c"]:
    """Map to token sequence, d slowest."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Float[Tensor, "b n c"], size: Sequence[int]) -> Float[Tensor, "b c d h w"]:
    """Token sequence back to a map of (d, h, w) voxels; the size is passed, never guessed from n.

    Raises:
        ValueError: the tokens do not fill such a map.
    """
    if len(size) != 3 or x.shape[1] != size[0] * size[1] * size[2]:
        raise ValueError(
            f"Tokens of shape {tuple(x.shape)} do not fill a map of {tuple(size)} voxels: expected "
            "(b, d*h*w, c) and the size (d, h, w)."
        )
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


def pointwise(
    convolution: nn.Conv3d, x: Float[Tensor, "b c d h w"], weight: Tensor | None = None
) -> Float[Tensor, "b o d h w"]:
    """A convolution of one voxel as the product of matrices that it is, or with some columns of its weight.

    PyTorch's convolutions leave the channels-last layout where there are few channels, on a CPU.
    """
    weight = convolution.weight.flatten(1) if weight is None else weight
    return as_map(F.linear(as_tokens(x), weight, convolution.bias), x.shape[2:])


def upsample(
    x: Float[Tensor, "b c d h w"], factor: int, size: Sequence[int]
) -> Float[Tensor, "b c d2 h2 w2"]:
    """Trilinear upsampling by a factor, cut to (d, h, w).

    By factor and not to the size: voxel i of the coarse map stays over voxels factor*i ... of the fine one,
    also when the fine size is no multiple of the factor.
    """
    if factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode="trilinear", align_corners=False)
    return x[:, :, : size[0], : size[1], : size[2]]


class OverlapEmbed(nn.Module):
    """Overlapping patches to tokens: convolution of kernel 2s-1 and stride s, then LayerNorm.

    The map (b, in_channels, d, h, w) becomes tokens (b, n, width) and their size, each axis divided by s and
    rounded up. Raises ValueError for another number of axes or channels.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, width, 2 * stride - 1, stride, padding=stride - 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b c d h w"]) -> tuple[Float[Tensor, "b n e"], tuple[int, ...]]:
        expect_map("OverlapEmbed", x, self.conv.in_channels)
        x = self.conv(x)
        return self.norm(as_tokens(x)), tuple(x.shape[2:])


class ReducedAttention(nn.Module):
    """Self-attention whose keys and values come from a map made `reduction` times smaller per axis.

    Tokens (b, n, width) of a map of `size` voxels in and out. Raises ValueError if the heads do not divide
    the width, or tokens of another width or number come.
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Attention of width {width} cannot be split over {heads} heads: use a divisor.")
        self.heads, self.reduction = heads, reduction
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        hold(self.key_value.bias, 0, width)  # of the keys
        self.project = nn.Linear(width, width)
        self.reduce = nn.Conv3d(width, width, reduction, reduction) if reduction > 1 else None
        self.reduce_norm = nn.LayerNorm(width) if reduction > 1 else None

    def forward(self, x: Float[Tensor, "b n c"], size: Sequence[int]) -> Float[Tensor, "b n c"]:
        expect_map("ReducedAttention", x, self.query.in_features, axes=1, channels_last=True)
        b, n, c = x.shape
        source = x
        if self.reduce is not None and self.reduce_norm is not None:
            # Padding keeps the border planes in keys and values where the size is no multiple of the
            # reduction.
            grid = pad_to_multiple(as_map(x, size), (self.reduction,) * 3)
            source = self.reduce_norm(as_tokens(self.reduce(grid)))
        query = self.query(x).reshape(b, n, self.heads, c // self.heads).transpose(1, 2)
        pair = self.key_value(source).reshape(b, -1, 2, self.heads, c // self.heads)
        key, value = pair.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.project(out.transpose(1, 2).reshape(b, n, c))


class MixFeedForward(nn.Module):
    """fc2(GELU(norm(dw3(fc1 x)))): the depthwise convolution supplies the position.

    Tokens (b, n, width) of a map of `size` voxels in and out. Raises ValueError for others.
    """

    def __init__(self, width: int, mlp_ratio: float | int, norm: Norm) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.depthwise = nn.Conv3d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = norm3d(norm, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b n c"], size: Sequence[int]) -> Float[Tensor, "b n c"]:
        expect_map("MixFeedForward", x, self.fc1.in_features, axes=1, channels_last=True)
        u = self.norm(self.depthwise(as_map(self.fc1(x), size)))
        return self.fc2(F.gelu(as_tokens(u)))


class SegFormerBlock(nn.Module):
    """Pre-norm transformer block: t += attention(LN t); t += FFN(LN t).

    Tokens (b, n, width) of a map of `size` voxels in and out. Raises ValueError for others.
    """

    def __init__(self, width: int, heads: int, reduction: int, mlp_ratio: float | int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = ReducedAttention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = MixFeedForward(width, mlp_ratio, norm)

    def forward(self, x: Float[Tensor, "b n c"], size: Sequence[int]) -> Float[Tensor, "b n c"]:
        expect_map("SegFormerBlock", x, self.norm1.normalized_shape[0], axes=1, channels_last=True)
        x = x + self.attention(self.norm1(x), size)
        return x + self.feed_forward(self.norm2(x), size)


class FullResolutionHead(nn.Module):
    """Logits from upsampled decoder features next to features of the image itself, at full resolution.

    The image (b, in_channels, d, h, w) and features (b, decoder_width, ...) of a grid `stride` times coarser,
    rounded up, become logits (b, out_channels, d, h, w). Raises ValueError for other shapes.
    """

    def __init__(
        self, in_channels: int, decoder_width: int, width: int, out_channels: int, norm: Norm
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, width, 3, padding=1, bias=False),
            norm3d(norm, width),
            nn.ReLU(inplace=True),
        )
        self.narrow = nn.Conv3d(decoder_width, width, 1)
        self.mix = nn.Sequential(
            nn.Conv3d(2 * width, width, 3, padding=1, bias=False),
            norm3d(norm, width),
            nn.ReLU(inplace=True),
            nn.Conv3d(width, out_channels, 1),
        )
        # The faster layout for few channels at full resolution, on CPU and GPU.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(
        self, image: Float[Tensor, "b i d h w"], features: Float[Tensor, "b c d2 h2 w2"], stride: int
    ) -> Float[Tensor, "b o d h w"]:
        expect_map("FullResolutionHead", image, self.in_channels)
        expect_map("FullResolutionHead, features", features, self.narrow.in_channels)
        if (coarse_size := tuple(-(-n // stride) for n in image.shape[2:])) != features.shape[2:]:
            raise ValueError(
                f"FullResolutionHead: features of {tuple(features.shape[2:])} voxels do not lie under an "
                f"image of {tuple(image.shape[2:])} at stride {stride}: expected {coarse_size}."
            )
        image = image.contiguous(memory_format=torch.channels_last_3d)
        coarse = upsample(pointwise(self.narrow, features), stride, image.shape[2:])
        convolution, norm, activation, last = self.mix
        mixed = activation(norm(convolution(torch.cat([self.stem(image), coarse], dim=1))))
        return pointwise(cast(nn.Conv3d, last), mixed)
