"""SegFormer3D: a light segmentation transformer for volumes, with an optional path at full resolution.

Source: SegFormer3D, CVPR workshops 2024, arXiv 2404.10156. Four stages of overlapping patches and attention
on keys of reduced resolution; the decoder brings every stage to the finest grid, fuses them and upsamples.
As published the logits exist at 1/4 of the resolution only, so anything thinner than about four voxels is a
blur; `full_resolution_skip` adds a small convolutional path at full resolution before the logits.

Notation: b batch, c channels, (d, h, w) voxels of a map.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.coarse_heads import CoarseHeads
from aneurysm.nets.prior import start_at
from aneurysm.nets.recomputation import recomputed
from aneurysm.nets.segformer_blocks import (
    FullResolutionHead,
    Norm,
    OverlapEmbed,
    SegFormerBlock,
    as_map,
    as_tokens,
    norm3d,
    pointwise,
    upsample,
)
from aneurysm.nets.shapes import expect_map


class SegFormer3D(nn.Module):
    """Segment a volume: logits (b, out_channels, d, h, w) of the size of the image, whatever that is.

    patch_stride: voxels per token of the first stage, 4 in the paper; 2 keeps finer detail at 8 times the
    tokens. reductions: how much smaller keys and values are, per stage. full_resolution_skip: the path
    described above, `skip_width` channels wide; without it the network is the published one, whose largest
    variant is widths (32, 64, 160, 256), depths (2, 2, 2, 2), heads (1, 2, 5, 8), decoder_width 256, norm
    batch. prior: probability that the untrained net gives everywhere. recompute: keep only what enters each
    transformer block and compute its inside again on the way back, for less memory in training.
    deep_supervision: how many coarser answers it gives in training (see CoarseHeads), the first from the
    fused maps at stride patch_stride, the others from the stages of twice, four times, ... that stride.
    Raises ValueError if the lists differ in length, the image has other axes or channels, or a crop is too
    small for its norm.
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
        prior: float | int = 0.05,
        recompute: bool = False,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(heads) == len(reductions):
            raise ValueError(
                "SegFormer3D needs one width, depth, head count and reduction per stage, but got "
                f"widths {tuple(widths)}, depths {tuple(depths)}, heads {tuple(heads)}, "
                f"reductions {tuple(reductions)}."
            )
        self.in_channels, self.norm_kind, self.patch_stride = in_channels, norm, patch_stride
        self.widths, self.recompute = tuple(widths), recompute
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
        start_at([m for m in self.predict.modules() if isinstance(m, nn.Conv3d)][-1], prior)
        self.coarse = CoarseHeads([decoder_width, *widths[1:]], out_channels, prior, deep_supervision)
        # Tokens and maps are then views of each other. The weights carry the layout: that of a one-channel
        # image is ambiguous.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def encode(self, image: Float[Tensor, "b c d h w"]) -> list[Tensor]:
        """Feature maps (b, widths[i], ...) of strides patch_stride * (1, 2, 4, 8), finest first."""
        expect_map(f"SegFormer3D built for {self.in_channels} channel(s)", image, self.in_channels)
        x, maps = image.contiguous(memory_format=torch.channels_last_3d), []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            tokens, size = embed(x)
            for block in cast(nn.ModuleList, stage):
                tokens = recomputed(block, tokens, size) if self.recompute else block(tokens, size)
            x = as_map(norm(tokens), size)
            maps.append(x)
        return maps

    def decode(self, maps: Sequence[Tensor]) -> Float[Tensor, "b c d h w"]:
        """Features (b, decoder_width, ...) on the grid of the first stage, from the maps of `encode`.

        Raises:
            ValueError: other maps.
        """
        if len(maps) != len(self.widths):
            raise ValueError(f"SegFormer3D.decode: got {len(maps)} maps for {len(self.widths)} stages.")
        size = maps[0].shape[2:]
        # The convolution over all stages' channels is a sum of one per stage, and a convolution of one voxel
        # does not mind whether it comes before or after an interpolation: each stage is weighted on its own
        # coarse grid, and the maps of all stages never stand side by side at the finest.
        weights = cast(nn.Conv3d, self.fuse[0]).weight.flatten(1).chunk(len(maps), dim=1)
        total: Tensor | None = None
        for i, (lift, m) in enumerate(zip(self.lift, maps, strict=True)):
            expect_map(f"SegFormer3D.decode, stage {i + 1}", m, self.widths[i])
            # coarsest first, the order of the paper's weights
            tokens = F.linear(lift(as_tokens(m)), weights[len(maps) - 1 - i])
            part = upsample(as_map(tokens, m.shape[2:]), 2**i, size)
            total = part if total is None else total + part
        assert total is not None
        _, norm, activation = self.fuse
        return activation(norm(total))

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b o d h w"] | list[Tensor]:
        expect_map(f"SegFormer3D built for {self.in_channels} channel(s)", image, self.in_channels)
        self._expect_statistics(image)
        maps = self.encode(image)
        features = self.decode(maps)
        logits = self._full_resolution(image, features)
        if not self.coarse.wanted:
            return logits
        strides = [self.patch_stride * 2**i for i in range(len(maps))]
        return [logits, *self.coarse([features, *maps[1:]], image, strides)]

    def _full_resolution(self, image: Tensor, features: Tensor) -> Tensor:
        if isinstance(self.predict, FullResolutionHead):
            return self.predict(image, features, self.patch_stride)
        # Channels last would take three times as long to interpolate this few channels.
        logits = pointwise(cast(nn.Conv3d, self.predict), features).contiguous()
        return upsample(logits, self.patch_stride, image.shape[2:])

    def _expect_statistics(self, image: Tensor) -> None:
        """Let images pass that leave the norms more than one voxel to average over."""
        coarsest = self.patch_stride * 2 ** (len(self.embeds) - 1)
        alone = max(image.shape[2:]) <= coarsest
        if self.norm_kind == "instance" and alone:
            raise ValueError(
                f"A crop of {tuple(image.shape[2:])} voxels leaves one voxel at stride {coarsest}, where "
                "instance norm is undefined: use larger crops, a smaller patch_stride or norm 'group'."
            )
        if self.norm_kind == "batch" and alone and self.training and image.shape[0] == 1:
            raise ValueError(
                f"One crop of {tuple(image.shape[2:])} voxels leaves one voxel at stride {coarsest}, where "
                "batch norm cannot be trained: use larger crops, more of them per step or norm 'group'."
            )


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
