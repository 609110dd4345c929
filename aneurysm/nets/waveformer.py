"""WaveFormer: a transformer that attends on the wavelet low band of its feature maps.

Source: WaveFormer, MICCAI 2025, arXiv 2503.23764. Every stage transforms its map with a few Haar levels,
runs the attention on the small low band and adds the upsampled answer; a feed-forward part with a depthwise
convolution works at the resolution of the stage. Where the published implementation departs from its own
description (window merge, index of the relative position bias, corners of the patch merging), this file
follows the description.

Notation: b batch, c channels, (d, h, w) map size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.oscillators import Oscillators, OscillatorState
from aneurysm.nets.recomputation import recomputed
from aneurysm.nets.shapes import expect_map
from aneurysm.nets.waveformer_block import BlockOutput, WaveletBlock
from aneurysm.nets.waveformer_decoder import WaveFormerDecoder
from aneurysm.nets.wavelet import pad_to_multiple


@dataclass(frozen=True, eq=False)
class Encoding:
    """What the encoder makes of an image, finest stage first."""

    maps: list[Tensor]  # (b, widths[i], d, h, w), normalised over the channels
    seen: list[Tensor]  # (b, widths[i], d, h, w), what the wavelets of each stage's last block saw
    oscillators: list[OscillatorState] = field(default_factory=list)  # of the stages that have them


class PatchEmbed(nn.Conv3d):
    """Non-overlapping 2x2x2 patches to tokens; state is that of the plain convolution (`weight`, `bias`).

    (b, in_channels, d, h, w) -> (b, width, ceil(d/2), ceil(h/2), ceil(w/2)); odd axes repeat their last
    plane.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(in_channels, width, kernel_size=2, stride=2)

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b e d2 h2 w2"]:
        expect_map("PatchEmbed", image, self.in_channels)
        return super().forward(pad_to_multiple(image, (2, 2, 2)))


class PatchMerging(nn.Module):
    """Halve the resolution: the 2x2x2 corners of a cell, in raster order, to one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(8 * width, eps=1e-6)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "b d h w c"]) -> Float[Tensor, "b d2 h2 w2 e"]:
        expect_map("PatchMerging", x, self.width, channels_last=True)
        x = pad_to_multiple(x.permute(0, 4, 1, 2, 3), (2, 2, 2)).permute(0, 2, 3, 4, 1)
        b, d, h, w, c = x.shape
        cells = x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return self.reduction(self.norm(cells.reshape(b, d // 2, h // 2, w // 2, 8 * c)))


class WaveFormerEncoder(nn.Module):
    """Turn a volume into four feature maps of strides 2, 4, 8, 16 and widths width x (1, 2, 4, 8).

    Works for any input size, cubic or not: a map of stride s has ceil(n/s) voxels per axis. Each returned
    map is layer-normalised over its channels, without learned scale.

    Args:
        in_channels: of the image. width: of the first stage.
        depths: blocks per stage. heads: per stage, dividing its width.
        levels: Haar levels per stage (3, 2, 1, 0 in the paper, where every stage of a 128^3 crop attends on
            8^3 tokens).
        mlp_ratio: of the feed-forward parts. drop_path: rate of the last block, growing linearly from 0.
        multi_scale: attend on the low bands between as well (True is the paper).
        normalise_lf: low band as a mean, without the Haar gain of 2*sqrt2 per level (False is the paper).
        min_window: smallest side of the attended low band in voxels, the level drops on small crops to
            respect it (1 is the paper).
        bias_reach: offsets with a row of their own in the position bias, see `WindowAttention`.
        oscillators: blocks for the last transformer block of some stages, see `Oscillators`.
        recompute: keep only the input of every block for the backward pass and run it again there
            (activation checkpointing): less memory, a third more time.
    Raises:
        ValueError: the lists differ in length, heads do not divide the widths, or oscillators were asked for
            at a stride that no stage has.
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
        oscillators: Oscillators | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not len(depths) == len(heads) == len(levels) or min(depths, default=0) < 1:
            raise ValueError(
                "WaveFormer needs one depth (at least 1), head count and level per stage, but got "
                f"depths {tuple(depths)}, heads {tuple(heads)}, levels {tuple(levels)}."
            )
        self.in_channels, self.recompute = in_channels, recompute
        self.widths: tuple[int, ...] = tuple(width * 2**i for i in range(len(depths)))
        self.strides: tuple[int, ...] = tuple(2 ** (i + 1) for i in range(len(depths)))
        self.patch_embed = PatchEmbed(in_channels, width)
        blocks_in_all = sum(depths)
        rates = iter([drop_path * i / max(blocks_in_all - 1, 1) for i in range(blocks_in_all)])
        self.merges = nn.ModuleList(PatchMerging(w) for w in self.widths[:-1])
        stages: list[list[WaveletBlock]] = [
            [
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
            for stage_width, depth, stage_heads, level in zip(self.widths, depths, heads, levels, strict=True)
        ]
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.apply(_initialise)
        for stride in oscillators.strides if oscillators else ():
            if stride not in self.strides:
                raise ValueError(
                    f"Oscillators were asked for at stride {stride}, but the backbone has strides "
                    f"{list(self.strides)}. Set oscillator.strides to some of them."
                )
            assert oscillators is not None
            stages[self.strides.index(stride)][-1].place(oscillators)  # after their own initialisation

    def encode(self, embedded: Float[Tensor, "b c d h w"]) -> Encoding:
        """Feature maps of strides `strides[i]`, and what else is known, from an embedded image (stride 2)."""
        expect_map("WaveFormerEncoder.encode", embedded, self.widths[0])
        x = embedded.permute(0, 2, 3, 4, 1).contiguous()
        found = Encoding([], [])
        for i, blocks in enumerate(self.stages):
            if i:
                x = self.merges[i - 1](x)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                assert isinstance(block, WaveletBlock)
                out: BlockOutput = recomputed(block, x) if self.recompute else block(x)
                x = out.map
                if out.oscillators is not None:
                    found.oscillators.append(out.oscillators)
                if block is blocks[-1]:
                    found.seen.append(out.seen.permute(0, 4, 1, 2, 3))
            # Only the copy that leaves is normalised, the residual stream goes on as it is.
            found.maps.append(F.layer_norm(x, x.shape[-1:]).permute(0, 4, 1, 2, 3))
        return found

    def forward(self, image: Float[Tensor, "b c d h w"]) -> list[Tensor]:
        """Feature maps of an image (b, in_channels, d, h, w) of normalised intensities, finest first."""
        return self.encode(self.patch_embed(image)).maps

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of an encoder that was trained without oscillators; those stay as they are.

        Raises:
            RuntimeError: the state is that of another encoder.
        """
        own = {name: value for name, value in self.state_dict().items() if ".oscillator." in name}
        self.load_state_dict({**own, **state})

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """The parameters that `load_pretrained` fills."""
        return [p for name, p in self.named_parameters() if ".oscillator." not in name]


class WaveFormer(nn.Module):
    """Segment a volume: logits (b, out_channels, d, h, w) of the size of the image, whatever that is.

    The encoder and the decoder of the paper. Its network is width 48, depths (2, 2, 2, 2), multi_scale,
    normalise_lf False and min_window 1; with bias_reach 6 it has the paper's 16.98 million parameters of a
    96^3 crop.

    Args:
        in_channels, out_channels: of the image and of the logits.
        full_width: channels at full resolution, the costliest part; None for `width`, as in the paper.
        refine_details, align_corners, prior: see `WaveFormerDecoder`.
        oscillators: see `Oscillators`.
        recompute: keep only what enters the transformer blocks and the decoder's parts for the backward pass.
        deep_supervision: see `WaveFormerDecoder`.
        others: see `WaveFormerEncoder`.
    Raises:
        ValueError: settings that do not fit each other, or an image of other channels or too few voxels.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 16,
        depths: Sequence[int] = (1, 1, 1, 1),
        heads: Sequence[int] = (2, 4, 8, 8),
        levels: Sequence[int] = (3, 2, 1, 0),
        mlp_ratio: float | int = 4.0,
        drop_path: float | int = 0.0,
        multi_scale: bool = False,
        normalise_lf: bool = True,
        min_window: int = 4,
        bias_reach: int = 8,
        full_width: int | None = None,
        refine_details: bool = False,
        align_corners: bool = True,
        prior: float = 0.05,
        oscillators: Oscillators | None = None,
        recompute: bool = False,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = WaveFormerEncoder(
            in_channels,
            width,
            depths,
            heads,
            levels,
            mlp_ratio,
            drop_path,
            multi_scale,
            normalise_lf,
            min_window,
            bias_reach,
            oscillators,
        )
        self.decoder = WaveFormerDecoder(
            in_channels,
            out_channels,
            self.encoder.widths,
            self.encoder.strides,
            refine_details,
            full_width,
            align_corners,
            prior,
            deep_supervision=deep_supervision,
        )
        self.recompute = recompute

    @property
    def recompute(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.encoder.recompute

    @recompute.setter
    def recompute(self, again: bool) -> None:
        self.encoder.recompute = self.decoder.recompute = again

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b o d h w"] | list[Tensor]:
        found = self.encoder.encode(self.encoder.patch_embed(image))
        return self.decoder(image, found.maps, found.seen)


def _initialise(module: nn.Module) -> None:
    """Truncated normal of variance 1/fan-in: the usual fixed 0.02 starves the branches of narrow networks."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
