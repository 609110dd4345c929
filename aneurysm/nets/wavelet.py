"""Orthonormal 3-D Haar wavelet transform in plain torch, differentiable and exact for any size.

Along an axis a = (x0 + x1)/sqrt2 is the average and d = (x0 - x1)/sqrt2 the detail, so a level of the
transform turns each 2x2x2 cell into one low band (aaa) and seven high bands. A smooth signal grows by
2*sqrt2 in the low band at every level, white noise does not: see `LOW_GAIN` and the `normalise` option of
`haar_low`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from aneurysm.nets.shapes import expect_map

BANDS = ("aad", "ada", "add", "daa", "dad", "dda", "ddd")  # letters in the order d, h, w
LOW_GAIN = 2.0 * 2.0**0.5  # gain of the low band per level on a constant signal


def _basis(like: Tensor) -> Float[Tensor, "8 8"]:
    """Rows: bands aaa, aad, ... ddd; columns: the voxels of a 2x2x2 cell in d, h, w raster order."""
    pair = like.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    return torch.kron(torch.kron(pair, pair), pair) / LOW_GAIN


def _channels_last(x: Tensor, axis: int) -> bool:
    """Whether the channels, at this axis, lie side by side in memory, as a transformer leaves its maps.

    The products below then keep that order: a third of the time of a detour over the other one.
    """
    return x.stride(axis) == 1 and x.shape[axis] > 1


def _expect_levels(owner: str, levels: int) -> None:
    if levels < 0:
        raise ValueError(f"{owner}: got {levels} levels, expected 0 or more.")


def pad_to_multiple(x: Float[Tensor, "b c d h w"], multiple: Sequence[int]) -> Float[Tensor, "b c d2 h2 w2"]:
    """Repeat the last plane of each axis until the size is a multiple of the given number of voxels.

    Repetition and not zeros: a constant signal keeps its value at the border, and no false edge appears
    there.
    """
    expect_map("Padding to a multiple", x, None)
    d, h, w = ((-n) % m for n, m in zip(x.shape[2:], multiple, strict=True))
    return F.pad(x, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else x


def haar_analysis(
    x: Float[Tensor, "b c d h w"],
) -> tuple[Float[Tensor, "b c d2 h2 w2"], Float[Tensor, "b 7 c d2 h2 w2"]]:
    """Split a volume into its half-resolution average and seven half-resolution details, one level.

    x: (b, c, d, h, w), any size; odd axes are padded by repetition, so the bands have ceil(n/2) voxels.
    Returns the low band and the high bands in the order of `BANDS`, in the memory layout of x.
    Raises ValueError for another number of axes.
    """
    expect_map("Haar analysis", x, None)
    x = pad_to_multiple(x, (2, 2, 2))
    b, c, d, h, w = x.shape
    half = (d // 2, h // 2, w // 2)
    if _channels_last(x, 1):
        rows = x.permute(0, 2, 3, 4, 1).reshape(b, half[0], 2, half[1], 2, half[2], 2, c)
        cells = rows.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, 8, *half, c)
        bands = torch.einsum("ok,bkdhwc->bodhwc", _basis(x), cells).permute(0, 1, 5, 2, 3, 4)
    else:
        cells = x.reshape(b, c, half[0], 2, half[1], 2, half[2], 2).permute(0, 3, 5, 7, 1, 2, 4, 6)
        bands = torch.einsum("ok,bkcdhw->bocdhw", _basis(x), cells.reshape(b, 8, c, *half))
    return bands[:, 0], bands[:, 1:]


def haar_synthesis(
    low: Float[Tensor, "b c d h w"],
    high: Float[Tensor, "b bands c2 d2 h2 w2"],
    size: Sequence[int] | None = None,
) -> Float[Tensor, "b c d3 h3 w3"]:
    """Put a volume together again from its low and high bands, one level; inverse of `haar_analysis`.

    high: (b, 7, c, d, h, w) of the same c, d, h, w as the low band; size: (d, h, w) of the original volume,
    to cut the padding of odd axes off; None keeps 2n voxels per axis.
    Raises ValueError for bands that do not belong together, or a size that is neither 2n nor 2n-1.
    """
    expect_map("Haar synthesis", low, None)
    b, c, d, h, w = low.shape
    if high.shape != (b, 7, c, d, h, w):
        raise ValueError(
            f"Haar synthesis: a low band of shape {tuple(low.shape)} got high bands of shape "
            f"{tuple(high.shape)}, expected {(b, 7, c, d, h, w)}."
        )
    bands = torch.cat([low.unsqueeze(1), high], dim=1)
    # The basis is orthonormal and symmetric, hence its own inverse.
    if _channels_last(high, 2):
        rows = torch.einsum("ok,bkdhwc->bodhwc", _basis(low), bands.permute(0, 1, 3, 4, 5, 2))
        cells = rows.reshape(b, 2, 2, 2, d, h, w, c).permute(0, 4, 1, 5, 2, 6, 3, 7)
        x = cells.reshape(b, 2 * d, 2 * h, 2 * w, c).permute(0, 4, 1, 2, 3)
    else:
        cells = torch.einsum("ok,bkcdhw->bocdhw", _basis(low), bands).reshape(b, 2, 2, 2, c, d, h, w)
        x = cells.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(b, c, 2 * d, 2 * h, 2 * w)
    if size is None:
        return x
    if any(not 2 * n - 1 <= s <= 2 * n for n, s in zip((d, h, w), size, strict=True)):
        raise ValueError(
            f"Bands of {(d, h, w)} voxels cannot give a volume of {tuple(size)}: expected 2n or 2n-1."
        )
    return x[:, :, : size[0], : size[1], : size[2]]


def haar_decompose(
    x: Float[Tensor, "b c d h w"], levels: int
) -> tuple[Float[Tensor, "b c d2 h2 w2"], list[Tensor]]:
    """Transform over several levels: the coarsest average and the details, coarsest first.

    levels >= 0; level 0 gives the volume itself and no details. Raises ValueError for fewer levels.
    """
    _expect_levels("Haar decomposition", levels)
    details: list[Tensor] = []
    for _ in range(levels):
        x, high = haar_analysis(x)
        details.insert(0, high)
    return x, details


def haar_reconstruct(
    low: Float[Tensor, "b c d h w"], details: Sequence[Tensor], size: Sequence[int] | None = None
) -> Float[Tensor, "b c d2 h2 w2"]:
    """Inverse of `haar_decompose`: details coarsest first, each (b, 7, c, d, h, w); original size.

    Raises ValueError for bands that do not belong together.
    """
    finer = [tuple(high.shape[3:]) for high in details[1:]] + [size]
    for high, target in zip(details, finer, strict=False):
        low = haar_synthesis(low, high, target)
    return low


def haar_replace_low(
    x: Float[Tensor, "b c d h w"], low: Float[Tensor, "b c2 d2 h2 w2"], levels: int
) -> Float[Tensor, "b c d h w"]:
    """Give a volume another coarsest average and keep its details.

    Equals `haar_reconstruct(low, haar_decompose(x, levels)[1], size of x)`: the transform is linear and
    inverts itself, so that is x plus the change of its coarsest average, spread evenly over the voxels below
    each coarse one. One pooling and one sum do it, instead of eight bands per level there and back.
    low: (b, c, ceil(n / 2^levels) voxels per axis). Raises ValueError for another shape or levels < 0.
    """
    expect_map("Haar low band to replace", x, None)
    _expect_levels("Haar low band to replace", levels)
    b, c, d, h, w = x.shape
    expected = (b, c, *[-(-n // 2**levels) for n in (d, h, w)])
    if low.shape != expected:
        raise ValueError(
            f"Haar low band to replace: a volume of shape {tuple(x.shape)} got one of {tuple(low.shape)} for "
            f"{levels} level(s), expected {expected}."
        )
    if levels == 0:
        return low
    mean = x
    for _ in range(levels):  # level by level: the padding of an odd size differs from that of all at once
        mean = F.avg_pool3d(pad_to_multiple(mean, (2, 2, 2)), 2)
    change = F.interpolate(low * LOW_GAIN**-levels - mean, scale_factor=2.0**levels, mode="nearest")
    return x + change[:, :, :d, :h, :w]


def haar_low(
    x: Float[Tensor, "b c d h w"], levels: Sequence[int], normalise: bool
) -> Float[Tensor, "b c d2 h2 w2"]:
    """Coarsest average after several Haar levels, without computing the details.

    levels: number of levels along (d, h, w); three equal numbers give the low band of `haar_decompose`,
    unequal ones transform a flat slab less often along its short axis. The Haar low band is the block mean
    times sqrt2 per level and axis, so it is a pooling. With `normalise` the gain is left out: the band
    keeps the scale of the signal, and an attention on it does not saturate with depth.
    Raises ValueError for a number of levels other than one per axis, or a negative one.
    """
    expect_map("Haar low band", x, None)
    if len(levels) != 3 or min(levels) < 0:
        raise ValueError(
            f"Haar low band: got levels {tuple(levels)}, expected three numbers >= 0 for (d, h, w)."
        )
    if not any(levels):
        return x
    side = tuple(2**level for level in levels)
    low = F.avg_pool3d(pad_to_multiple(x, side), side)
    return low if normalise else low * 2.0 ** (sum(levels) / 2)
