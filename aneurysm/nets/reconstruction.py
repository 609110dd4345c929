"""Masked reconstruction: hide blocks of a scan and learn to paint them in again.

Sources: SparK (ICLR 2023, arXiv 2301.03580) for the densified pyramid and the light decoder, MAE (arXiv
2111.06377) for the dense control, AnatoMask (ECCV 2024) for the loss per block that ranks difficulty. The
image is masked before anything reads it, so nothing of a hidden voxel reaches the encoder. WaveFormer
attends globally and is not a sparse network: hidden cells do get features, made of what is visible around
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aneurysm.nets.masking import block_grid, blocks_to_voxels
from aneurysm.nets.shapes import expect_map
from aneurysm.nets.waveformer import WaveFormerEncoder

Ranking = Literal["denormalised", "normalised", "as_code"]


@dataclass(frozen=True, eq=False)
class ReconstructionOutput:
    """What a masked reconstruction gives back."""

    loss: Float[Tensor, ""]  # mean squared error over hidden valid voxels, in units of the target
    prediction: Float[Tensor, "b 1 d h w"]  # the decoder's answer, in units of the target
    per_block_loss: Float[Tensor, "b 1 gd gh gw"]  # ranking loss; 0 for visible and invalid blocks
    reconstruction: Float[Tensor, "b 1 d h w"]  # image intensities, hidden voxels painted in
    squared_error: Float[Tensor, "b"]  # summed over hidden valid voxels
    hidden_voxels: Float[Tensor, "b"]  # how many those are


def mean_error(squared_error: Float[Tensor, "b"], hidden_voxels: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """Mean squared error over the hidden valid voxels of all samples; 0 where there are none."""
    return squared_error.sum() / hidden_voxels.sum().clamp(min=1)


def block_mean(
    x: Float[Tensor, "b 1 d h w"], weight: Float[Tensor, "b 1 d h w"], block: int
) -> tuple[Float[Tensor, "b 1 gd gh gw"], Float[Tensor, "b 1 gd gh gw"]]:
    """Weighted mean over each block and the weight it rests on; 0 where there is none."""
    d, h, w = ((-n) % block for n in x.shape[2:])
    pooled = F.avg_pool3d(F.pad(torch.cat([x * weight, weight], 1), (0, w, 0, h, 0, d)), block) * block**3
    total, count = pooled[:, :1], pooled[:, 1:]
    return total / count.clamp(min=1), count


def to_voxels(
    x: Float[Tensor, "b 1 gd gh gw"], block: int, size: Sequence[int]
) -> Float[Tensor, "b 1 d h w"]:
    """Spread a value per block over the voxels of an image of (d, h, w) voxels."""
    for axis, n in zip((2, 3, 4), size, strict=True):
        x = x.repeat_interleave(block, axis).narrow(axis, 0, n)
    return x


def block_statistics(
    image: Float[Tensor, "b 1 d h w"], valid: Float[Tensor, "b 1 d h w"], block: int, floor: float
) -> tuple[Float[Tensor, "b 1 d h w"], Float[Tensor, "b 1 d h w"]]:
    """Mean and standard deviation (unbiased) of the valid voxels of each block, at every voxel of the block.

    floor: added to the deviation in quadrature, so that the noise of air is not blown up to a target.
    """
    mean, count = block_mean(image, valid, block)
    mean = to_voxels(mean, block, image.shape[2:])
    variance, _ = block_mean((image - mean) ** 2, valid, block)
    variance = variance * count / (count - 1).clamp(min=1)
    return mean, (to_voxels(variance, block, image.shape[2:]) + floor**2).sqrt()


class UpBlock(nn.Module):
    """Double the resolution, add the skip, mix with one convolution."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(width, out_width, 2, 2)
        self.mix = nn.Sequential(
            nn.Conv3d(out_width, out_width, 3, padding=1, bias=False),
            nn.GroupNorm(1, out_width),
            nn.GELU(),
        )

    def forward(
        self, x: Float[Tensor, "b c d h w"], skip: Float[Tensor, "b e d2 h2 w2"]
    ) -> Float[Tensor, "b e d2 h2 w2"]:
        d, h, w = skip.shape[2:]
        return self.mix(self.up(x)[:, :, :d, :h, :w] + skip)


class MaskedReconstruction(nn.Module):
    """Train an encoder by reconstructing hidden blocks of its input.

    backbone: the encoder to train. decoder_width: channels of the decoder at stride 2, doubled per level.
    mode: 'spark' puts a learned token in place of the features of hidden cells at every level, so the
    encoder alone need not paint; 'dense' is the control, plain masked autoencoding with the encoder's
    features everywhere. block: side of a mask block in voxels. normalise_patches: the target of a block is
    normalised by its own mean and deviation, with `deviation_floor` (in image units, i.e. standard
    deviations of a z-scored scan) added in quadrature. ranking: the loss per block that a mask generator
    gets to see. 'denormalised' compares in image units; 'normalised' in units of the target, which favours
    air; 'as_code' compares the normalised prediction with the raw image, as AnatoMask's published code
    does. All three agree without normalise_patches.
    """

    def __init__(
        self,
        backbone: WaveFormerEncoder,
        decoder_width: int = 16,
        mode: Literal["spark", "dense"] = "spark",
        block: int = 8,
        normalise_patches: bool = False,
        deviation_floor: float = 0.1,
        ranking: Ranking = "denormalised",
    ) -> None:
        super().__init__()
        if mode not in ("spark", "dense"):
            raise ValueError(f"Unknown mode {mode!r}: use 'spark' or 'dense'.")
        if ranking not in ("denormalised", "normalised", "as_code"):
            raise ValueError(f"Unknown ranking {ranking!r}: use 'denormalised', 'normalised' or 'as_code'.")
        if backbone.in_channels != 1:
            raise ValueError(
                f"Reconstruction paints one channel but the backbone reads {backbone.in_channels}: build it "
                "with in_channels=1 and copy its patch embedding where more are needed."
            )
        self.backbone, self.mode, self.block = backbone, mode, block
        self.normalise_patches, self.deviation_floor = normalise_patches, deviation_floor
        self.ranking: Ranking = ranking
        widths = [decoder_width * 2**i for i in range(len(backbone.widths))]
        self.tokens = nn.ParameterList(
            nn.Parameter(nn.init.trunc_normal_(torch.empty(1, w, 1, 1, 1), std=0.02, a=-0.02, b=0.02))
            for w in (backbone.widths if mode == "spark" else ())
        )
        self.lateral = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in zip(backbone.widths, widths, strict=True))
        self.ups = nn.ModuleList(UpBlock(widths[i + 1], widths[i]) for i in range(len(widths) - 1))
        # Each voxel of stride 2 paints its own 2x2x2 cell: the last step to full resolution costs next to
        # nothing.
        self.paint = nn.ConvTranspose3d(widths[0], 1, 2, 2)

    def decode(
        self, maps: Sequence[Tensor], visible: Bool[Tensor, "b 1 d h w"]
    ) -> Float[Tensor, "b 1 d h w"]:
        """Prediction at full resolution from the encoder's maps; visible: the mask at full resolution."""
        skips = []
        for i, (features, stride) in enumerate(zip(maps, self.backbone.strides, strict=True)):
            if self.mode == "spark":
                # A cell counts as visible if any of its voxels is.
                seen = F.max_pool3d(visible.to(features.dtype), stride, stride, ceil_mode=True) > 0
                features = torch.where(seen, features, self.tokens[i].to(features.dtype))
            skips.append(self.lateral[i](features))
        x = skips[-1]
        for up, skip in zip(reversed(self.ups), reversed(skips[:-1]), strict=True):
            x = up(x, skip)
        d, h, w = visible.shape[2:]
        return self.paint(x)[:, :, :d, :h, :w]

    def forward(
        self,
        image: Float[Tensor, "b 1 d h w"],
        active: Bool[Tensor, "b 1 gd gh gw"],
        valid: Bool[Tensor, "b 1 d h w"] | None = None,
    ) -> ReconstructionOutput:
        """Reconstruct the hidden blocks of an image.

        image: normalised intensities, finite where visible; active: True for visible blocks of `block`
        voxels; valid: True for voxels that may count in the loss (inside the scan, not defaced, not padding),
        all if None. The loss is sum(w e^2) / max(sum w, 1) with w = hidden x valid.
        Raises ValueError if the mask lies on another grid than the image.
        """
        expect_map("MaskedReconstruction", image, 1)
        grid = block_grid(image.shape, self.block)
        if tuple(active.shape[2:]) != grid:
            raise ValueError(
                f"The mask has {tuple(active.shape[2:])} blocks but an image of {tuple(image.shape[2:])} "
                f"voxels in blocks of {self.block} has {grid}: use the same block size in the mask and the "
                "reconstruction."
            )
        visible = blocks_to_voxels(active, self.block, image.shape[2:])
        prediction = self.decode(self.backbone(torch.where(visible, image, 0.0)), visible)
        counts = torch.ones_like(image) if valid is None else valid.to(image.dtype)
        hidden = (~visible).to(image.dtype) * counts
        # An invalid voxel may hold anything, NaN included; it must not spread through 0 x NaN.
        known = image if valid is None else torch.where(valid, image, 0.0)
        target, painted = known, prediction
        if self.normalise_patches:
            mean, deviation = block_statistics(known, counts, self.block, self.deviation_floor)
            target, painted = (known - mean) / deviation, prediction * deviation + mean
        squared = (hidden * (prediction - target) ** 2).flatten(1).sum(1)
        voxels = hidden.flatten(1).sum(1)
        with torch.no_grad():
            pairs = {
                "denormalised": (painted, known),
                "normalised": (prediction, target),
                "as_code": (prediction, known),
            }
            answer, truth = pairs[self.ranking]
            per_block, _ = block_mean((answer - truth) ** 2, hidden, self.block)
        painted = torch.where(visible, image, painted.detach().to(image.dtype))
        loss = mean_error(squared, voxels)
        return ReconstructionOutput(loss, prediction, per_block, painted, squared, voxels)
