"""Deep supervision: answers of a segmentation network at coarser levels, in training only."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.prior import start_at


class CoarseHeads(nn.Module):
    """One convolution of one voxel for each of the finest `count` coarse maps of a decoder.

    They shorten the way from the loss to the deep layers. Outside training a network gives its full answer
    alone, and without heads (count 0) its weights are those of a network that knows nothing of them.

    Args:
        widths: channels of the maps that can have a head, finest first.
        out_channels: of the answers.
        prior: probability that an untrained head gives everywhere.

    Raises:
        ValueError: fewer than 0 heads or more than there are maps.

    Source: Lee et al. 2015, arXiv:1409.5185.
    """

    def __init__(self, widths: Sequence[int], out_channels: int, prior: float | int, count: int) -> None:
        super().__init__()
        if not 0 <= count <= len(widths):
            raise ValueError(
                f"deep_supervision={count}: this network has {len(widths)} coarser levels that can answer, "
                f"so it is a number from 0 to {len(widths)}."
            )
        self.heads = nn.ModuleList(nn.Conv3d(w, out_channels, 1) for w in widths[:count])
        for head in self.heads:
            start_at(head, prior)

    @property
    def wanted(self) -> bool:
        """Whether coarse answers are given: there are heads, and they are being trained."""
        return self.training and len(self.heads) > 0

    def forward(
        self,
        maps: Sequence[Tensor],
        image: Float[Tensor, "b c d h w"],
        strides: Sequence[int | Sequence[int]],
    ) -> list[Tensor]:
        """Logits (b, out_channels, ceil(n / stride) per axis), finest first.

        Args:
            maps: features, finest first; of an image that was padded they are cut to it.
            strides: voxels of the image per voxel of each map, one number or one per axis (d, h, w).
        """
        answers = []
        for head, x, stride in zip(self.heads, maps, strides, strict=False):
            steps = [stride] * 3 if isinstance(stride, int) else stride
            d, h, w = (-(-n // s) for n, s in zip(image.shape[2:], steps, strict=True))
            answers.append(head(x)[:, :, :d, :h, :w])
        return answers
