"""SegFormer3D: a light segmentation transformer for volumes, with an optional path at full resolution.

Source: SegFormer3D, CVPR workshops 2024, arXiv 2404.10156. Four stages of overlapping patches and attention
on keys of reduced resolution; the decoder brings every stage to the finest grid, fuses them and upsamples.
As published the logits exist at 1/4 of the resolution only, so anything thinner than about four voxels is a
blur; `full_resolution_skip` adds a small convolutional path at full resolution before the logits.

Notation: b batch, c channels, (d, h, w) voxels of a map, n = d h w tokens.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.no_effect import hold
from aneurysm.nets.wavelet import pad_to_multiple

Norm = Literal["batch", "instance", "group"]


def norm3d(kind: Norm, channels: int) -> nn.Module:
    """Normalisation of a (b, channels, d, h, w) map.

    batch is the paper's choice and wants many crops per step; instance and group do not depend on the
    batch, and group (8 channels each) also works on maps of one voxel.
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
    """Token sequence back to a map of (d, h, w) voxels; the size is passed, never guessed from n."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


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
    """Overlapping patches to tokens: convolution of kernel 2s-1 and stride s, then LayerNorm."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, width, 2 * stride - 1, stride, padding=stride - 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b c d h w"]) -> tuple[Float[Tensor, "b n e"], tuple[int, ...]]:
        x = self.conv(x)
        return self.norm(as_tokens(x)), tuple(x.shape[2:])


class ReducedAttention(nn.Module):
    """Self-attention whose keys and values come from a map made `reduction` times smaller per axis."""

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
    """fc2(GELU(norm(dw3(fc1 x)))): the depthwise convolution supplies the position."""

    def __init__(self, width: int, mlp_ratio: float | int, norm: Norm) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.depthwise = nn.Conv3d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = norm3d(norm, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b n c"], size: Sequence[int]) -> Float[Tensor, "b n c"]:
        u = self.norm(self.depthwise(as_map(self.fc1(x), size)))
        return self.fc2(F.gelu(as_tokens(u)))


class SegFormerBlock(nn.Module):
    """Pre-norm transformer block: t += attention(LN t); t += FFN(LN t)."""

    def __init__(self, width: int, heads: int, reduction: int, mlp_ratio: float | int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = ReducedAttention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = MixFeedForward(width, mlp_ratio, norm)

    def forward(self, x: Float[Tensor, "b n c"], size: Sequence[int]) -> Float[Tensor, "b n c"]:
        x = x + self.attention(self.norm1(x), size)
        return x + self.feed_forward(self.norm2(x), size)


class FullResolutionHead(nn.Module):
    """Logits from upsampled decoder features next to features of the image itself, at full resolution."""

    def __init__(
        self, in_channels: int, decoder_width: int, width: int, out_channels: int, norm: Norm
    ) -> None:
        super().__init__()
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
        image = image.contiguous(memory_format=torch.channels_last_3d)
        coarse = upsample(self.narrow(features), stride, image.shape[2:])
        return self.mix(torch.cat([self.stem(image), coarse], dim=1))


class SegFormer3D(nn.Module):
    """Segment a volume: logits (b, out_channels, d, h, w) of the size of the image, whatever that is.

    patch_stride: voxels per token of the first stage, 4 in the paper; 2 keeps finer detail at 8 times the
    tokens. reductions: how much smaller keys and values are, per stage. full_resolution_skip: the path
    described above, `skip_width` channels wide; without it the network is the published one, whose largest
    variant is widths (32, 64, 160, 256), depths (2, 2, 2, 2), heads (1, 2, 5, 8), decoder_width 256, norm
    batch. prior: probability that the untrained net gives everywhere. Raises ValueError if the
    lists differ in length, or a crop is too small for instance norm.
    """

    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        widths: Sequence[int] = (16, 32, 64, 128),
        depths: Sequence[int] = (1, 1, 1, 1),
        heads: Sequence[int] = (1, 2, 4, 8),
        reductions: Sequence[int] = (4, 2, 1, 1),
        mlp_ratio: float | int = 4,
        decoder_width: int = 64,
        norm: Norm = "group",
        full_resolution_skip: bool = True,
        skip_width: int = 8,
        patch_stride: int = 4,
        prior: float = 0.05,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(heads) == len(reductions):
            raise ValueError(
                "SegFormer3D needs one width, depth, head count and reduction per stage, but got "
                f"widths {tuple(widths)}, depths {tuple(depths)}, heads {tuple(heads)}, "
                f"reductions {tuple(reductions)}."
            )
        self.in_channels, self.norm_kind, self.patch_stride = in_channels, norm, patch_stride
        sources = (in_channels, *widths[:-1])
        strides = (patch_stride, *[2] * (len(widths) - 1))
        self.embeds = nn.ModuleList(map(OverlapEmbed, sources, widths, strides))
        self.stages = nn.ModuleList(
            nn.ModuleList(SegFormerBlock(w, h, r, mlp_ratio, norm) for _ in range(depth))
            for w, depth, h, r in zip(widths, depths, heads, reductions, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths)
        self.lift = nn.ModuleList(
            nn.Sequential(nn.Linear(w, decoder_width), nn.LayerNorm(decoder_width)) for w in widths
        )
        self.fuse = nn.Sequential(
            nn.Conv3d(len(widths) * decoder_width, decoder_width, 1, bias=False),
            norm3d(norm, decoder_width),
            nn.ReLU(inplace=True),
        )
        self.predict: nn.Module
        if full_resolution_skip:
            self.predict = FullResolutionHead(in_channels, decoder_width, skip_width, out_channels, norm)
        else:
            self.predict = nn.Conv3d(decoder_width, out_channels, 1)
        self.apply(_initialise)
        # Structures are rare: start at a low probability, or the first steps only learn to say no.
        last = [m for m in self.predict.modules() if isinstance(m, nn.Conv3d)][-1]
        assert last.bias is not None
        nn.init.constant_(last.bias, math.log(prior / (1 - prior)))

    def encode(self, image: Float[Tensor, "b c d h w"]) -> list[Tensor]:
        """Feature maps (b, widths[i], ...) of strides patch_stride * (1, 2, 4, 8), finest first."""
        x, maps = image, []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            tokens, size = embed(x)
            for block in cast(nn.ModuleList, stage):
                tokens = block(tokens, size)
            x = as_map(norm(tokens), size)
            maps.append(x)
        return maps

    def decode(self, maps: Sequence[Tensor]) -> Float[Tensor, "b c d h w"]:
        """Features (b, decoder_width, ...) on the grid of the first stage, from the maps of `encode`."""
        size = maps[0].shape[2:]
        lifted = [
            upsample(as_map(lift(as_tokens(m)), m.shape[2:]), 2**i, size)
            for i, (lift, m) in enumerate(zip(self.lift, maps, strict=True))
        ]
        return self.fuse(torch.cat(lifted[::-1], dim=1))  # coarsest first, the order of the paper's weights

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b o d h w"]:
        if image.shape[1] != self.in_channels:
            raise ValueError(
                f"SegFormer3D was built for {self.in_channels} channel(s) but the image has shape "
                f"{tuple(image.shape)}: expected (b, {self.in_channels}, d, h, w)."
            )
        coarsest = self.patch_stride * 2 ** (len(self.embeds) - 1)
        if self.norm_kind == "instance" and max(image.shape[2:]) <= coarsest:
            raise ValueError(
                f"A crop of {tuple(image.shape[2:])} voxels leaves one voxel at stride {coarsest}, where "
                "instance norm is undefined: use larger crops, a smaller patch_stride or norm 'group'."
            )
        features = self.decode(self.encode(image))
        if isinstance(self.predict, FullResolutionHead):
            return self.predict(image, features, self.patch_stride)
        return upsample(self.predict(features), self.patch_stride, image.shape[2:])


def _initialise(module: nn.Module) -> None:
    """Initial weights of the published network."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv3d):
        fan_out = module.kernel_size[0] ** 3 * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
