"""WaveFormer encoder: a transformer that attends on the wavelet low band of its feature maps.

Source: WaveFormer, MICCAI 2025, arXiv 2503.23764. Every stage transforms its map with a few Haar levels,
runs the attention on the small low band and adds the upsampled answer; a feed-forward part with a depthwise
convolution works at the resolution of the stage. Where the published implementation departs from its own
description (window merge, index of the relative position bias, corners of the patch merging), this file
follows the description.

Notation: b batch, c channels, (d, h, w) map size, m = b x number of windows, n tokens of a window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.global_batch import rand_rows
from aneurysm.nets.no_effect import hold
from aneurysm.nets.wavelet import haar_low, pad_to_multiple


class PatchEmbed(nn.Conv3d):
    """Non-overlapping 2x2x2 patches to tokens; state is that of the plain convolution (`weight`, `bias`).

    (b, in_channels, d, h, w) -> (b, width, ceil(d/2), ceil(h/2), ceil(w/2)); odd axes repeat their last
    plane.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(in_channels, width, kernel_size=2, stride=2)

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b e d2 h2 w2"]:
        if image.shape[1] != self.in_channels:
            raise ValueError(
                f"The patch embedding was built for {self.in_channels} channel(s) but the image has shape "
                f"{tuple(image.shape)}: expected (b, {self.in_channels}, d, h, w)."
            )
        return super().forward(pad_to_multiple(image, (2, 2, 2)))


class DropPath(nn.Module):
    """Drop a residual branch for whole samples while training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float | int) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if self.rate == 0 or not self.training:
            return x
        keep = rand_rows(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


class WindowAttention(nn.Module):
    """Multi-head self-attention over all voxels of a window, with a bias by relative position.

    One bias table serves windows of every size and shape: entry (i, j, k) belongs to the offset in voxels
    of the attended map, and offsets of `reach` voxels or more share the outermost entry, so weights trained
    on small crops run on large ones.
    """

    def __init__(self, width: int, heads: int, reach: int = 8) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Attention of width {width} cannot be split over {heads} heads: use a divisor.")
        self.heads, self.reach = heads, reach
        self.qkv = nn.Linear(width, 3 * width)
        hold(self.qkv.bias, width, 2 * width)  # of the keys
        self.project = nn.Linear(width, width)
        side = 2 * reach - 1
        self.position_bias = nn.Parameter(torch.zeros(side, side, side, heads))

    def bias(self, window: Sequence[int]) -> Float[Tensor, "heads n n"]:
        """Additive attention bias of all token pairs of a window of (d, h, w) voxels."""
        device = self.position_bias.device
        axes = []
        for size in window:
            index = torch.arange(size, device=device)
            offset = (index[:, None] - index[None, :]).clamp(1 - self.reach, self.reach - 1) + self.reach - 1
            axes.append(offset)
        d, h, w = axes
        pairs = self.position_bias[  # query d, key d, query h, key h, query w, key w, heads
            d[:, :, None, None, None, None], h[None, None, :, :, None, None], w[None, None, None, None]
        ]
        n = window[0] * window[1] * window[2]
        return pairs.permute(6, 0, 2, 4, 1, 3, 5).reshape(self.heads, n, n)

    def forward(self, x: Float[Tensor, "m d h w c"]) -> Float[Tensor, "m d h w c"]:
        m, d, h, w, c = x.shape
        qkv = self.qkv(x).reshape(m, d * h * w, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (m, heads, n, c/heads)
        mask = self.bias((d, h, w)).to(query.dtype)[None].expand(m, -1, -1, -1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.project(out.transpose(1, 2).reshape(m, d, h, w, c))


def split_windows(x: Float[Tensor, "b d h w c"], window: Sequence[int]) -> Float[Tensor, "m p q r c"]:
    """Cut a map into windows of (p, q, r) voxels that divide it: m = b x number of windows."""
    b, d, h, w, c = x.shape
    p, q, r = window
    x = x.reshape(b, d // p, p, h // q, q, w // r, r, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, p, q, r, c)


def merge_windows(x: Float[Tensor, "m p q r c"], size: Sequence[int]) -> Float[Tensor, "b d h w c"]:
    """Put the windows of `split_windows` back into a map of (d, h, w) voxels."""
    _, p, q, r, c = x.shape
    d, h, w = size
    x = x.reshape(-1, d // p, h // q, w // r, p, q, r, c)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, d, h, w, c)


class FeedForward(nn.Module):
    """Token-wise expansion with a depthwise 3x3x3 convolution between, and a residual of its own.

    FFN(u) = u + fc(GELU(LN(dw3(GELU(LN(pw u)))))); the convolution also tells tokens where they are.
    """

    def __init__(self, width: int, mlp_ratio: float | int) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.expand = nn.Linear(width, hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.depthwise = nn.Conv3d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d h w c"]:
        u = F.gelu(self.norm1(self.expand(x)))
        # The permuted view is channels-last memory, the fast layout of the convolution: nothing is copied.
        u = self.depthwise(u.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return x + self.contract(F.gelu(self.norm2(u)))


class WaveletBlock(nn.Module):
    """Transformer block whose attention sees the wavelet low band of the map.

    z = LN(x); y = x + up(attention(low(z))); out = y + FFN(LN(y)). The answer of the attention is upsampled
    trilinearly. With `multi_scale` the same attention also runs on the low bands between, in windows of the
    size of the coarsest one, and the answers are added. level: Haar levels per axis; fewer where that would
    leave an axis of less than `min_window` voxels.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        level: int,
        mlp_ratio: float | int = 4.0,
        drop_path: float | int = 0.0,
        multi_scale: bool = False,
        normalise_lf: bool = True,
        min_window: int = 4,
        bias_reach: int = 8,
    ) -> None:
        super().__init__()
        self.level, self.min_window = level, min_window
        self.multi_scale, self.normalise_lf = multi_scale, normalise_lf
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = WindowAttention(width, heads, bias_reach)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def levels_for(self, size: Sequence[int]) -> tuple[int, ...]:
        """Haar levels along (d, h, w) that a map of this size gets."""
        fits = [[n for n in range(self.level + 1) if -(-s // 2**n) >= self.min_window] for s in size]
        return tuple(max(levels, default=0) for levels in fits)

    def mix(self, z: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d h w c"]:
        """Attention on the low band(s) of a normalised map, brought back to its size."""
        levels = self.levels_for(z.shape[1:4])
        deepest = max(levels)
        if deepest == 0:
            return self.attention(z)
        d, h, w = z.shape[1:4]
        padded = pad_to_multiple(z.permute(0, 4, 1, 2, 3), tuple(2**n for n in levels))
        window = tuple(s // 2**n for s, n in zip(padded.shape[2:], levels, strict=True))
        total = torch.zeros((), dtype=z.dtype, device=z.device)
        for scale in range(1, deepest + 1) if self.multi_scale else (deepest,):
            low = haar_low(padded, tuple(min(scale, n) for n in levels), self.normalise_lf)
            low = low.permute(0, 2, 3, 4, 1)
            answer = merge_windows(self.attention(split_windows(low, window)), low.shape[1:4])
            total = total + F.interpolate(
                answer.permute(0, 4, 1, 2, 3), size=padded.shape[2:], mode="trilinear", align_corners=False
            )
        return total[:, :, :d, :h, :w].permute(0, 2, 3, 4, 1)

    def forward(self, x: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d h w c"]:
        x = x + self.drop_path(self.mix(self.norm1(x)))
        return x + self.drop_path(self.feed_forward(self.norm2(x)))


class PatchMerging(nn.Module):
    """Halve the resolution: the 2x2x2 corners of a cell, in raster order, to one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * width, eps=1e-6)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d2 h2 w2 e"]:
        x = pad_to_multiple(x.permute(0, 4, 1, 2, 3), (2, 2, 2)).permute(0, 2, 3, 4, 1)
        b, d, h, w, c = x.shape
        cells = x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return self.reduction(self.norm(cells.reshape(b, d // 2, h // 2, w // 2, 8 * c)))


class WaveFormerEncoder(nn.Module):
    """Turn a volume into four feature maps of strides 2, 4, 8, 16 and widths width x (1, 2, 4, 8).

    Works for any input size, cubic or not: a map of stride s has ceil(n/s) voxels per axis. Each returned
    map is layer-normalised over its channels, without learned scale. heads must divide the stage widths;
    levels: Haar levels per stage (3, 2, 1, 0 in the paper, where every stage of a 128^3 crop attends on 8^3
    tokens); min_window: smallest side of the attended low band in voxels, the level drops on small crops to
    respect it (1 is the paper); normalise_lf: low band as a mean, without the Haar gain of 2*sqrt2 per
    level (False is the paper); drop_path: rate of the last block, growing linearly from 0. Raises
    ValueError if the lists differ in length or heads do not divide the widths.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 24,
        depths: Sequence[int] = (1, 1, 1, 1),
        heads: Sequence[int] = (3, 6, 12, 24),
        levels: Sequence[int] = (3, 2, 1, 0),
        mlp_ratio: float | int = 4.0,
        drop_path: float | int = 0.0,
        multi_scale: bool = False,
        normalise_lf: bool = True,
        min_window: int = 4,
        bias_reach: int = 8,
    ) -> None:
        super().__init__()
        if not len(depths) == len(heads) == len(levels):
            raise ValueError(
                "WaveFormer needs one depth, head count and level per stage, but got "
                f"depths {tuple(depths)}, heads {tuple(heads)}, levels {tuple(levels)}."
            )
        self.in_channels = in_channels
        self.widths: tuple[int, ...] = tuple(width * 2**i for i in range(len(depths)))
        self.strides: tuple[int, ...] = tuple(2 ** (i + 1) for i in range(len(depths)))
        self.patch_embed = PatchEmbed(in_channels, width)
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        self.merges = nn.ModuleList(PatchMerging(w) for w in self.widths[:-1])
        for stage_width, depth, stage_heads, level in zip(self.widths, depths, heads, levels, strict=True):
            blocks = [
                WaveletBlock(
                    stage_width,
                    stage_heads,
                    level,
                    mlp_ratio,
                    next(rates),
                    multi_scale,
                    normalise_lf,
                    min_window,
                    bias_reach,
                )
                for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.apply(_initialise)

    def encode(self, embedded: Float[Tensor, "b c d h w"]) -> list[Tensor]:
        """Feature maps (b, widths[i], d, h, w) of strides `strides[i]` from an embedded image (stride 2)."""
        if embedded.shape[1] != self.widths[0]:
            raise ValueError(
                f"The encoder expects an embedding of {self.widths[0]} channels but got "
                f"{tuple(embedded.shape)}."
            )
        x = embedded.permute(0, 2, 3, 4, 1).contiguous()
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.merges[i - 1](x)
            x = stage(x)
            # Only the copy that leaves is normalised, the residual stream goes on as it is.
            maps.append(F.layer_norm(x, x.shape[-1:]).permute(0, 4, 1, 2, 3))
        return maps

    def forward(self, image: Float[Tensor, "b c d h w"]) -> list[Tensor]:
        """Feature maps of an image (b, in_channels, d, h, w) of normalised intensities, finest first."""
        return self.encode(self.patch_embed(image))


def _initialise(module: nn.Module) -> None:
    """Truncated normal of variance 1/fan-in: the usual fixed 0.02 starves the branches of narrow networks."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
