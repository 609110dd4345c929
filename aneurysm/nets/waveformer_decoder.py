"""WaveFormer decoder: wavelet details bring the deepest features back to the resolution of the image.

Source: WaveFormer, MICCAI 2025, arXiv 2503.23764. Every stage but the deepest takes the same calibrated
deepest features as its Haar low band and the details of its own map, so that one inverse transform per stage
lifts them without any learned interpolation; the lifted maps meet at stride 2, and a convolutional path of
the image itself joins at full resolution. The parts are in `waveformer_upsampling`.

Notation: b batch, c channels, (d, h, w) voxels of a map; stage s = 0 ... S-1, finest first.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.coarse_heads import CoarseHeads
from aneurysm.nets.prior import start_at
from aneurysm.nets.recomputation import recomputed
from aneurysm.nets.shapes import expect_map
from aneurysm.nets.waveformer_upsampling import (
    ChannelCalibration,
    ResidualUpsample,
    WaveletUpsample,
    residual_block,
)


class WaveFormerDecoder(nn.Module):
    """Segment a volume from the maps of a WaveFormer encoder: logits of the size of the image, any size.

    The paper has four stages; with another number S >= 2 the same rules hold: stage s < S-1 is lifted over
    S-1-s Haar levels and upsampled by 2^s to the finest grid, where S-1 maps are concatenated.

    Args:
        in_channels, out_channels: of the image and of the logits.
        widths: channels per stage, finest first, as the encoder's `widths`.
        strides: voxels of the image per voxel of each stage, as the encoder's `strides`; each twice the one
            before.
        refine_details: gate the details by `DetailRefinement` (78,576 more parameters at widths 48, 96, 192;
            the paper's best model has none). Needs the bands themselves, which are skipped otherwise.
        full_width: channels at full resolution, None for widths[0] as in the paper. Both residual blocks
            there cost its square: at width 48 and a crop of 96^3 (4 channels in, 4 out) they and the two
            layers next to them take 235 of all 331 G multiply-adds, at 24 channels 62 G and at 16 channels
            29 G, so that the whole net needs 157 and 124 G. What is lost is detail of the image itself below
            two voxels: it passes through fewer channels.
        align_corners: of the trilinear upsampling, True in the paper. It moves coarse voxels away from the
            voxels they were made of, by up to (factor-1)/2 fine ones at the border; False keeps them there.
        prior: probability that the untrained net gives everywhere.
        recompute: keep only what enters the residual blocks and upsamplings for the backward pass.
        deep_supervision: how many coarser answers it gives in training, from the lifted maps of the first
            stages (see CoarseHeads).
    Raises:
        ValueError: for fewer than two stages, lists of different lengths, or strides that do not double.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int] = (48, 96, 192, 384),
        strides: Sequence[int] = (2, 4, 8, 16),
        refine_details: bool = False,
        full_width: int | None = None,
        align_corners: bool = True,
        prior: float = 0.05,
        recompute: bool = False,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or len(widths) != len(strides):
            raise ValueError(
                "The WaveFormer decoder needs two or more stages with one width and one stride each, but got "
                f"widths {tuple(widths)}, strides {tuple(strides)}."
            )
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(
                f"The WaveFormer decoder got strides {tuple(strides)}: each must be twice the one before, "
                "the step of a Haar level."
            )
        if full_width is not None and full_width < 1:
            raise ValueError(f"full_width is {full_width}: use a number of channels >= 1, or None.")
        self.in_channels, self.recompute = in_channels, recompute
        self.widths, self.strides = tuple(widths), tuple(strides)
        finest, deepest, lifted = widths[0], widths[-1], len(widths) - 1
        full = full_width or finest
        self.calibrate = ChannelCalibration(deepest)
        self.skips = nn.ModuleList(residual_block(w, w) for w in widths[:-1])
        self.lifts = nn.ModuleList(
            WaveletUpsample(deepest, w, lifted - s, refine_details) for s, w in enumerate(widths[:-1])
        )
        self.upsamples = nn.ModuleList(
            ResidualUpsample(w, finest, 2**s, align_corners) for s, w in enumerate(widths[1:-1], start=1)
        )
        self.to_full = nn.ConvTranspose3d(lifted * finest, full, strides[0], strides[0], bias=False)
        self.image_path = residual_block(in_channels, full)
        self.mix_full = residual_block(2 * full, full)
        self.predict = nn.Conv3d(full, out_channels, 1)
        start_at(self.predict, prior)
        self.coarse = CoarseHeads(widths[:-1], out_channels, prior, deep_supervision)

    def _expect(self, image: Tensor, maps: Sequence[Tensor], seen: Sequence[Tensor]) -> None:
        owner, stages = "WaveFormer decoder", len(self.widths)
        expect_map(f"{owner}, image", image, self.in_channels)
        if len(maps) != stages or len(seen) not in (stages - 1, stages):
            raise ValueError(
                f"{owner}: got {len(maps)} maps and {len(seen)} inputs of wavelets, expected {stages} maps, "
                f"finest first, and one input for each or for each but the deepest."
            )
        for kind, tensors in (("map", maps), ("input of the wavelets", seen)):
            for tensor, width, stride in zip(tensors, self.widths, self.strides, strict=False):
                expect_map(f"{owner}, {kind} of stride {stride}", tensor, width)
                expected = (image.shape[0], width, *[-(-n // stride) for n in image.shape[2:]])
                if tensor.shape != expected:
                    raise ValueError(
                        f"{owner}, {kind} of stride {stride}: got {tuple(tensor.shape)} for an image of "
                        f"shape {tuple(image.shape)}, expected {expected}."
                    )
        if max(image.shape[2:]) <= self.strides[-1]:
            raise ValueError(
                f"{owner}: an image of {tuple(image.shape[2:])} voxels leaves one voxel at stride "
                f"{self.strides[-1]}, where instance norm is undefined: use larger crops or fewer stages."
            )

    def forward(
        self, image: Float[Tensor, "b i d h w"], maps: Sequence[Tensor], seen: Sequence[Tensor]
    ) -> Float[Tensor, "b o d h w"] | list[Tensor]:
        """Logits of an image (b, in_channels, d, h, w), in training followed by the coarse ones.

        Args:
            image: normalised intensities.
            maps: normalised maps (b, widths[s], ceil(n / strides[s]) per axis) of the encoder.
            seen: what the wavelets of each stage's last block saw, of the same shapes: there the details come
                from. The deepest stage has no details; its entry may be given or left out.
        Raises:
            ValueError: for other shapes, or an image that leaves a single voxel in the deepest stage.
        """
        self._expect(image, maps, seen)
        deepest = self.calibrate(maps[-1])
        size = maps[0].shape[2:]
        lifted: list[Tensor] = []
        for lift, skip, source, own in zip(self.lifts, self.skips, seen, maps, strict=False):
            lifted.append(lift(deepest, source, self._run(skip, own)))
        # Coarsest first, the order of the paper's weights.
        coarse = zip(reversed(self.upsamples), reversed(lifted[1:]), strict=True)
        parts = [self._run(up, x, size) for up, x in coarse]
        d, h, w = image.shape[2:]
        full = self.to_full(torch.cat([*parts, lifted[0]], dim=1))[:, :, :d, :h, :w]
        full = torch.cat([full, self._run(self.image_path, image)], dim=1)
        logits = self.predict(self._run(self.mix_full, full))
        return [logits, *self.coarse(lifted, image, self.strides)] if self.coarse.wanted else logits

    def _run(self, part: nn.Module, *inputs: Any) -> Tensor:
        return recomputed(part, *inputs) if self.recompute else part(*inputs)
