"""The transformer block of WaveFormer: attention on the wavelet low band, a convolutional feed-forward part.

Source: WaveFormer, MICCAI 2025, arXiv 2503.23764. Notation: b batch, c channels, (d, h, w) map size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aneurysm.global_batch import rand_rows
from aneurysm.nets.depthwise import DepthwiseConv3d
from aneurysm.nets.oscillators import Oscillators, OscillatorState
from aneurysm.nets.shapes import expect_map
from aneurysm.nets.wavelet import haar_low, pad_to_multiple
from aneurysm.nets.window_attention import WindowAttention, merge_windows, split_windows

SLAB = 2**20  # numbers of the feed-forward part's wide maps that are worked on at a time without gradients


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


class FeedForward(nn.Module):
    """Token-wise expansion with a depthwise 3x3x3 convolution between, and a residual of its own.

    FFN(u) = u + fc(GELU(LN(dw3(GELU(LN(pw u)))))); the convolution also tells tokens where they are.
    """

    def __init__(self, width: int, mlp_ratio: float | int) -> None:
        super().__init__()
        self.width, hidden = width, int(width * mlp_ratio)
        self.expand = nn.Linear(width, hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.depthwise = DepthwiseConv3d(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d h w c"]:
        expect_map("FeedForward", x, self.width, channels_last=True)
        if torch.compiler.is_compiling():
            return x + self._answer(self._mix(self.expand(x)))
        if torch.is_grad_enabled():
            # Of the six maps of this width that a backward pass would read, two are kept.
            mixed = checkpoint(self._mix, self.expand(x), use_reentrant=False, preserve_rng_state=False)
            return x + checkpoint(self._answer, mixed, use_reentrant=False, preserve_rng_state=False)
        d, plane = x.shape[1], x.shape[2] * x.shape[3] * self.depthwise.in_channels
        planes = max(8, SLAB // plane)
        if d <= planes:
            return x + self._answer(self._mix(self.expand(x)))
        out = x.clone()
        for sample in range(len(x)):  # a part at a time, with the planes that its convolution looks at
            for begin in range(0, d, planes):
                end = min(d, begin + planes)
                first, last = max(0, begin - 1), min(d, end + 1)
                mixed = self._mix(self.expand(x[sample : sample + 1, first:last]))
                out[sample, begin:end] += self._answer(mixed[:, begin - first : end - first])[0]
        return out

    def _mix(self, hidden: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d h w c"]:
        return self.depthwise(F.gelu(self.norm1(hidden)))

    def _answer(self, mixed: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d h w e"]:
        return self.contract(F.gelu(self.norm2(mixed)))


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """What a block makes of a map, and what it saw on the way."""

    map: Float[Tensor, "b d h w c"]
    seen: Float[Tensor, "b d h w c"]  # the normalised map whose low band was attended
    oscillators: OscillatorState | None


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
        self.width, self.level, self.min_window = width, level, min_window
        self.multi_scale, self.normalise_lf = multi_scale, normalise_lf
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = WindowAttention(width, heads, bias_reach)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width, mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.oscillator: nn.Module | None = None
        self.placement: str | None = None

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

    def place(self, oscillators: Oscillators) -> None:
        """Give the block oscillators of its own."""
        self.oscillator, self.placement = oscillators.block(channels=self.width), oscillators.placement

    def forward(self, x: Float[Tensor, "b d h w c"]) -> BlockOutput:
        expect_map("WaveletBlock", x, self.width, channels_last=True)
        state = None
        seen = self.norm1(x)
        answer = self.mix(seen)
        if self.placement == "in_attention":
            answer, state = self._oscillate(answer)
        x = x + self.drop_path(answer)
        if self.placement == "before_mlp":
            x, state = self._oscillate(x)
        x = x + self.drop_path(self.feed_forward(self.norm2(x)))
        if self.placement == "after_mlp":
            x, state = self._oscillate(x)
        return BlockOutput(x, seen, state)

    def _oscillate(self, x: Tensor) -> tuple[Tensor, OscillatorState | None]:
        assert self.oscillator is not None
        out, state = self.oscillator(x.permute(0, 4, 1, 2, 3))
        return out.permute(0, 2, 3, 4, 1), state
