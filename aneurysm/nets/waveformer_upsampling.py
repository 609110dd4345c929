"""Parts of the WaveFormer decoder: calibration of the deepest features, and the ways up from there.

Source: WaveFormer, MICCAI 2025, arXiv 2503.23764. Two ways lead to a finer grid: an inverse Haar transform
with details of the encoder (`WaveletUpsample`), and a trilinear one followed by a learned correction
(`ResidualUpsample`).

Notation: b batch, c channels, (d, h, w) voxels of a map.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import Tensor, nn

from aneurysm.nets.no_effect import hold
from aneurysm.nets.shapes import expect_map
from aneurysm.nets.wavelet import haar_decompose, haar_reconstruct, haar_replace_low


def residual_block(in_channels: int, out_channels: int) -> UnetResBlock:
    """Two 3x3x3 convolutions with instance norm (no learned scale), leaky ReLU of slope 0.01 and a residual.

    (b, in_channels, d, h, w) -> (b, out_channels, d, h, w); the residual is a 1x1x1 convolution where the
    numbers of channels differ. MONAI's block, He et al. 2016 (arXiv 1603.05027) in the form of nnU-Net.
    """
    return UnetResBlock(3, in_channels, out_channels, kernel_size=3, stride=1, norm_name="instance")


class ChannelCalibration(nn.Module):
    """Weigh the channels of the deepest map: bottleneck convolutions, squeeze and excitation, residual.

    (b, c, d, h, w) -> the same, >= 0. The bottleneck and the excitation have c/4 channels. Needs a map of
    more than one voxel: instance norm of a single one is undefined. Raises ValueError for c that 4 does not
    divide, or a map of another shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"Channel calibration of {channels} channels: use a multiple of 4.")
        self.channels, hidden = channels, channels // 4
        self.reduce = nn.Conv3d(channels, hidden, 1)
        self.conv = nn.Conv3d(hidden, hidden, 3, padding=1)
        self.expand = nn.Conv3d(hidden, channels, 1)
        for conv in (self.reduce, self.conv, self.expand):
            hold(conv.bias)  # the norm that follows subtracts it
        self.norm_hidden = nn.InstanceNorm3d(hidden)
        self.norm = nn.InstanceNorm3d(channels)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        self.residual = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c d h w"]:
        expect_map("Channel calibration", x, self.channels)
        u = F.relu(self.norm_hidden(self.reduce(x)))
        u = F.relu(self.norm_hidden(self.conv(u)))
        u = self.norm(self.expand(u))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(u.mean((2, 3, 4))))))  # (b, c)
        return F.relu(u * gate[:, :, None, None, None] + self.residual(x))


class DetailRefinement(nn.Module):
    """Gate the seven detail bands of one Haar level by what surrounds each voxel; the bands share weights.

    x * sigmoid(conv1(ReLU(IN(depthwise3(x))))) for every band: (b, 7, c, d, h, w) -> the same. Meant to
    keep edges and drop noise.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.depthwise = nn.Conv3d(channels, channels, 3, padding=1, groups=channels)
        hold(self.depthwise.bias)  # the norm subtracts it
        self.norm = nn.InstanceNorm3d(channels, affine=True)
        self.gate = nn.Conv3d(channels, channels, 1)

    def forward(self, bands: Float[Tensor, "b n c d h w"]) -> Float[Tensor, "b n c d h w"]:
        x = bands.flatten(0, 1)  # (b n, c, d, h, w)
        expect_map("Detail refinement, each band", x, self.channels)
        gated = x * torch.sigmoid(self.gate(F.relu(self.norm(self.depthwise(x)))))
        return gated.unflatten(0, bands.shape[:2])


class WaveletUpsample(nn.Module):
    """Lift the deepest map over several Haar levels by the details of a finer map, and join that one's skip.

    low = conv3(deepest); inverse transform of low with the details of `seen`; residual block of both
    concatenated: (b, deep, d/2^levels, ...) -> (b, channels, d, h, w).
    """

    def __init__(self, deep_channels: int, channels: int, levels: int, refine_details: bool = False) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"Wavelet upsampling over {levels} levels: expected one or more.")
        self.deep_channels, self.channels, self.levels = deep_channels, channels, levels
        self.low = nn.Conv3d(deep_channels, channels, 3, padding=1, bias=False)
        self.refine = nn.ModuleList(
            DetailRefinement(channels) for _ in range(levels if refine_details else 0)
        )
        self.mix = residual_block(2 * channels, channels)

    def lift(
        self, deepest: Float[Tensor, "b k p q r"], seen: Float[Tensor, "b c d h w"]
    ) -> Float[Tensor, "b c d h w"]:
        """The map whose coarsest Haar average is conv3(deepest) and whose details are those of `seen`."""
        low = self.low(deepest)
        if not self.refine:
            return haar_replace_low(seen, low, self.levels)
        _, details = haar_decompose(seen, self.levels)
        details = [refine(high) for refine, high in zip(self.refine, details, strict=True)]
        return haar_reconstruct(low.to(details[0].dtype), details, seen.shape[2:])

    def forward(
        self,
        deepest: Float[Tensor, "b k p q r"],
        seen: Float[Tensor, "b c d h w"],
        skip: Float[Tensor, "b c d2 h2 w2"],
    ) -> Float[Tensor, "b c d h w"]:
        """Features of the grid of `seen`.

        seen: map whose details are used; skip: features of the same shape; deepest: ceil(n / 2^levels) voxels
        where `seen` has n. Raises ValueError for other shapes.
        """
        expect_map("Wavelet upsampling, deepest map", deepest, self.deep_channels)
        expect_map("Wavelet upsampling, map with the details", seen, self.channels)
        if skip.shape != seen.shape:
            raise ValueError(
                f"Wavelet upsampling: got a skip of shape {tuple(skip.shape)}, expected {tuple(seen.shape)}."
            )
        return self.mix(torch.cat([self.lift(deepest, seen), skip], dim=1))


class ResidualUpsample(nn.Module):
    """Trilinear upsampling by a factor with a learned correction, (b, c, ...) -> (b, e, d, h, w).

    up(1x1(x)) + head(norm(depthwise3(up(x)))), norm per channel and head 1x1 to 2c, GELU, 1x1; from factor 4
    on the head has one more such layer of c channels between. align_corners: see `WaveFormerDecoder`.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int, align_corners: bool = True) -> None:
        super().__init__()
        if factor < 2:
            raise ValueError(f"Residual upsampling by {factor}: expected a factor of 2 or more.")
        self.in_channels, self.factor, self.align_corners = in_channels, factor, align_corners
        self.depthwise = nn.Conv3d(in_channels, in_channels, 3, padding=1, groups=in_channels)
        hold(self.depthwise.bias)  # the norm subtracts it
        self.norm = nn.GroupNorm(in_channels, in_channels)
        steps = [in_channels, 2 * in_channels, *([in_channels] if factor >= 4 else []), out_channels]
        layers: list[nn.Module] = []
        for a, b in pairwise(steps):
            layers += [nn.Conv3d(a, b, 1), nn.GELU()]
        self.head = nn.Sequential(*layers[:-1])
        self.residual = nn.Conv3d(in_channels, out_channels, 1)

    def _up(self, x: Tensor, size: Sequence[int] | None) -> Tensor:
        x = F.interpolate(
            x, scale_factor=float(self.factor), mode="trilinear", align_corners=self.align_corners
        )
        return x if size is None else x[:, :, : size[0], : size[1], : size[2]]

    def forward(
        self, x: Float[Tensor, "b c p q r"], size: Sequence[int] | None = None
    ) -> Float[Tensor, "b e d h w"]:
        """Features on the finer grid; size: its (d, h, w), cut at the end of each axis, None for all of it.

        Raises ValueError for other channels, or a size that is not the map's times the factor, less than a
        factor cut off.
        """
        expect_map("Residual upsampling", x, self.in_channels)
        if size is not None and tuple(x.shape[2:]) != tuple(-(-n // self.factor) for n in size):
            raise ValueError(
                f"Residual upsampling by {self.factor}: a map of {tuple(x.shape[2:])} voxels cannot give "
                f"{tuple(size)}."
            )
        correction = self.head(self.norm(self.depthwise(self._up(x, size))))
        # A 1x1 convolution and an interpolation commute: the first costs less on the coarse grid.
        return correction + self._up(self.residual(x), size)
