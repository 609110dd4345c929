"""A small residual 3-D U-Net, chosen for the accuracy it reaches per second of training.

The body is MONAI's residual U-Net (Kerfoot et al. 2018, doi 10.1007/978-3-030-12029-0_40): its first
convolution has stride 2, so the costly full resolution carries only a few channels. A short head sees these
channels next to the image itself, so that vessels of one or two voxels keep their border.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from monai.networks.blocks.convolutions import Convolution
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from aneurysm.nets.no_effect import hold


class UNet3D(nn.Module):
    """Segment a volume: logits (b, out_channels, d, h, w) of the size of the image, whatever that is.

    widths: channels at strides 2, 4, 8, ...; residual_units: convolutions per residual block; detail_width:
    channels of the head at full resolution, 0 for no head (half the time); dropout: rate inside the blocks;
    prior: probability that the untrained net gives everywhere.
    Instance norm and leaky ReLU throughout, so the result for a crop does not depend on its batch.
    Raises ValueError for fewer than two widths or an image with other channels than in_channels.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        widths: Sequence[int] = (8, 16, 32, 64),
        residual_units: int = 2,
        detail_width: int = 4,
        dropout: float | int = 0.0,
        prior: float = 0.05,
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
        # Structures are rare: start at a low probability, or the first steps only learn to say no.
        last = [m for m in self.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)][-1]
        assert last.bias is not None
        nn.init.constant_(last.bias, math.log(prior / (1 - prior)))
        # Twice as fast as the default layout on a CPU, and the layout tensor cores want. The weights carry
        # it: the layout of a one-channel image is ambiguous and would fall back to the slow one.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, image: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b o d h w"]:
        if image.shape[1] != self.in_channels:
            raise ValueError(
                f"The U-Net was built for {self.in_channels} channel(s) but the image has shape "
                f"{tuple(image.shape)}: expected (b, {self.in_channels}, d, h, w)."
            )
        d, h, w = image.shape[2:]
        # At least two voxels per axis at the bottom: instance norm of a single voxel is undefined.
        pad = [max(-(-n // self.multiple), 2) * self.multiple - n for n in (d, h, w)]
        padded = F.pad(image, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate") if any(pad) else image
        padded = padded.contiguous(memory_format=torch.channels_last_3d)
        logits = self.body(padded)
        if self.head is not None:
            logits = self.head(torch.cat([padded, logits], dim=1))
        return logits[:, :, :d, :h, :w]
