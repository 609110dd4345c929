"""3-D U-Nets for vessels: a small residual one, and nnU-Net's.

UNet3D is chosen for the accuracy it reaches per second of training. Its body is MONAI's residual U-Net
(Kerfoot et al. 2018, doi 10.1007/978-3-030-12029-0_40): its first convolution has stride 2, so the costly
full resolution carries only a few channels. A short head sees these channels next to the image itself, so
that vessels of one or two voxels keep their border.

DynUNet3D is MONAI's form of the network that nnU-Net trains (Isensee et al. 2021, doi
10.1038/s41592-020-01008-z): full width at full resolution, several times the time per step.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from aneurysm.nets.coarse_heads import CoarseHeads
from aneurysm.nets.no_effect import hold
from aneurysm.nets.prior import start_at
from aneurysm.nets.shapes import expect_map


class UNet3D(nn.Module):
    """Segment a volume: logits (b, out_channels, d, h, w) of the size of the image, whatever that is.

    widths: channels at strides 2, 4, 8, ...; residual_units: convolutions per residual block; detail_width:
    channels of the head at full resolution, 0 for no head (half the time); dropout: rate inside the blocks;
    prior: probability that the untrained net gives everywhere; deep_supervision: how many coarser answers it
    gives in training, at strides 2, 4, ... (see CoarseHeads).
    Instance norm and leaky ReLU throughout, so the result for a crop does not depend on its batch.
    Raises ValueError for fewer than two widths, more coarse answers than strides, or an image of other axes
    or channels than in_channels.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        widths: Sequence[int] = (8, 16, 32, 64),
        residual_units: int = 2,
        detail_width: int = 4,
        dropout: float | int = 0.0,
        prior: float | int = 0.05,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"A U-Net needs at least two widths but got {tuple(widths)}.")
        self.in_channels = in_channels
        self.multiple = 2 ** (len(widths) - 1)
        self.body = UNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=detail_width or out_channels,
            channels=tuple(widths),
            strides=(2,) * (len(widths) - 1),
            num_res_units=residual_units,
            act=("LEAKYRELU", {"negative_slope": 0.01, "inplace": True}),
            norm=("INSTANCE", {"affine": True}),
            dropout=float(dropout),
        )
        self.head: nn.Sequential | None = None
        if detail_width and residual_units:
            # The body ends in a residual unit at full resolution, which takes a fifth of all time; the head
            # convolves there anyway.
            layers: Any = self.body.model
            layers[-1] = layers[-1][0]
        if detail_width:
            self.head = nn.Sequential(
                nn.Conv3d(in_channels + detail_width, detail_width, 3, padding=1, bias=False),
                nn.InstanceNorm3d(detail_width, affine=True),
                nn.LeakyReLU(0.01, inplace=True),
                nn.Conv3d(detail_width, out_channels, 1),
            )
        for block in self.body.modules():
            norm = getattr(getattr(block, "adn", None), "N", None)
            if isinstance(block, Convolution) and isinstance(norm, nn.InstanceNorm3d):
                convolution: Any = block.conv
                hold(convolution.bias)
        start_at([m for m in self.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)][-1], prior)
        # Of what every level but the deepest hands up: its own map beside the one from below.
        joined = [2 * w for w in widths[:-2]] + [widths[-2] + widths[-1]]
        self.coarse = CoarseHeads(joined, out_channels, prior, deep_supervision)
        # Twice as fast as the default layout on a CPU, and the layout tensor cores want. The weights carry
        # it: the layout of a one-channel image is ambiguous and would fall back to the slow one.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b o d h w"] | list[Tensor]:
        expect_map(f"The U-Net was built for {self.in_channels} channel(s)", image, self.in_channels)
        d, h, w = image.shape[2:]
        padded = _padded(image, (self.multiple,) * 3)
        maps: list[Tensor] = []
        logits = self.body(padded) if not self.coarse.wanted else _through(self.body.model, padded, maps)
        if self.head is not None:
            logits = self.head(torch.cat([padded, logits], dim=1))
        logits = logits[:, :, :d, :h, :w]
        if not self.coarse.wanted:
            return logits
        return [logits, *self.coarse(maps[::-1], image, [2**i for i in range(1, len(maps) + 1)])]


class DynUNet3D(nn.Module):
    """Segment a volume: logits (b, out_channels, d, h, w) of the size of the image, whatever that is.

    widths: channels at full resolution and at every level below it; strides: from each level to the one
    below, one number or one per axis (d, h, w), 2 everywhere by default; an axis of stride 1 is convolved
    with kernel 1 there, nnU-Net's way with thick slices; residual: residual blocks in place of plain pairs of
    convolutions; dropout: rate after every convolution but the last; prior: probability that the untrained
    net gives everywhere; deep_supervision: how many coarser answers it gives in training, at the levels below
    the first (see CoarseHeads); nnU-Net has len(widths) - 2.
    Instance norm throughout, so the result for a crop does not depend on its batch.
    Raises ValueError for fewer than three widths, strides that are not one per level below the first or not
    positive, more coarse answers than levels between the first and the last, or an image of other axes or
    channels than in_channels.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        widths: Sequence[int] = (8, 16, 32, 64),
        strides: Sequence[int | Sequence[int]] | None = None,
        residual: bool = False,
        dropout: float | int = 0.0,
        prior: float | int = 0.05,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if len(widths) < 3:
            raise ValueError(f"DynUNet3D needs at least three widths but got {tuple(widths)}.")
        steps = _per_axis((2,) * (len(widths) - 1) if strides is None else strides)
        if len(steps) != len(widths) - 1:
            raise ValueError(
                f"DynUNet3D needs one stride per level below the first, {len(widths) - 1} for widths "
                f"{tuple(widths)}, but got {len(steps)}."
            )
        self.in_channels = in_channels
        self.multiple = tuple(prod(step[axis] for step in steps) for axis in range(3))
        self.body = DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=[(3, 3, 3), *(tuple(3 if s > 1 else 1 for s in step) for step in steps)],
            strides=[(1, 1, 1), *steps],
            upsample_kernel_size=steps,
            filters=list(widths),
            dropout=float(dropout) or None,
            norm_name=("INSTANCE", {"affine": True}),
            act_name=("LEAKYRELU", {"negative_slope": 0.01, "inplace": True}),
            res_block=residual,
        )
        # MONAI's forward walks a second tree of the same blocks, which would name every weight twice.
        del self.body.skip_layers
        last: Any = self.body.output_block.conv
        if dropout:
            del last.adn  # MONAI drops logits too
        start_at(last.conv, prior)
        self.coarse = CoarseHeads(widths[1:-1], out_channels, prior, deep_supervision)
        self.strides = [
            tuple(prod(step[axis] for step in steps[: i + 1]) for axis in range(3))
            for i in range(len(steps) - 1)
        ]  # of the levels between the first and the last, finest first
        # As in UNet3D. No bias has to be held: only the last convolution has one.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b o d h w"] | list[Tensor]:
        expect_map(f"DynUNet3D built for {self.in_channels} channel(s)", image, self.in_channels)
        d, h, w = image.shape[2:]
        net: Any = self.body
        levels = [net.input_block(_padded(image, self.multiple))]
        for down in net.downsamples:
            levels.append(down(levels[-1]))
        x = net.bottleneck(levels[-1])
        maps: list[Tensor] = []
        for up, skip in zip(net.upsamples, reversed(levels), strict=True):
            x = up(x, skip)
            maps.append(x)
        logits = net.output_block(x)[:, :, :d, :h, :w]
        if not self.coarse.wanted:
            return logits
        return [logits, *self.coarse(maps[-2::-1], image, self.strides)]


def _through(block: Any, x: Tensor, maps: list[Tensor]) -> Tensor:
    """What a level of MONAI's U-Net makes of x; adds what each level hands up to `maps`, deepest first."""
    down, skip, up = block
    own = down(x)
    below = skip.submodule
    joined = torch.cat([own, _through(below, own, maps) if _is_level(below) else below(own)], dim=1)
    maps.append(joined)
    return up(joined)


def _is_level(block: nn.Module) -> bool:
    return isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], SkipConnection)


def _per_axis(strides: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Strides (d, h, w) of every level."""
    steps = [(s,) * 3 if isinstance(s, int) else tuple(s) for s in strides]
    if any(len(step) != 3 or min(step) < 1 or max(step) < 2 for step in steps):
        raise ValueError(
            f"Strides {strides}: each is a number from 2, or one number from 1 per axis (d, h, w), of which "
            "one is 2 or more."
        )
    return steps


def _padded(image: Tensor, multiple: Sequence[int]) -> Tensor:
    """A map whose sizes are multiples, its border repeated at the far ends; channels last.

    At least two voxels per axis at the bottom: instance norm of a single voxel is undefined.
    """
    pad = [max(-(-n // m), 2) * m - n for n, m in zip(image.shape[2:], multiple, strict=True)]
    padded = F.pad(image, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate") if any(pad) else image
    return padded.contiguous(memory_format=torch.channels_last_3d)
