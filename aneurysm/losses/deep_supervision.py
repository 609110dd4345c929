"""A loss on the answers that a network gives at several resolutions at once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aneurysm.data.errors import UserError
from aneurysm.losses.present import beside_of


class DeepSupervision(nn.Module):
    """Weighted mean of a loss over the levels of a network, 1, 1/2, 1/4, ... from the finest on.

    A coarse voxel is foreground if any of its voxels is (max pooling): a thin vessel is an unbroken line at
    every level, where nearest-neighbour sampling would leave it out and averaging would fade it. The price is
    that coarse answers are thick, by less than one of their voxels; they only guide the features below, and
    recall comes first.

    Args:
        loss: of (logits, target, valid).

    Source: Lee et al. 2015, arXiv:1409.5185; the weights are those of nnU-Net, Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z, which samples its targets instead.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    @property
    def beside(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What the loss wants beside a target."""
        return beside_of(self.loss)

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"] | Sequence[Tensor],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
        beside: Bool[Tensor, "b p d h w"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The mean, and the terms of the finest level with the losses of the others as `level_<i>`.

        Args:
            logits: of the size of the target, or those followed by coarser ones (b, c, ...), whose sizes
                divide it. A single map, which is what networks give outside training, has the loss itself.
        Raises:
            UserError: sizes that do not divide the target's.
        """
        levels = [logits] if isinstance(logits, Tensor) else list(logits)
        extra = () if beside is None else (beside,)
        total, terms = self.loss(levels[0], target, valid, *extra)
        weight, weights = 1.0, 1.0
        for i, level in enumerate(levels[1:], start=1):
            steps = _steps(target, level)
            coarse = [_any(target, steps), valid, *(_any(e, steps) for e in extra)]
            value, _ = self.loss(level, *coarse)
            weight /= 2
            weights += weight
            total, terms = total + weight * value, {**terms, f"level_{i}": value}
        return total / weights, terms


def _steps(target: Tensor, coarse: Tensor) -> list[int]:
    fine, size = tuple(target.shape[2:]), tuple(coarse.shape[2:])
    if any(n % m for n, m in zip(fine, size, strict=True)):
        raise UserError(
            f"Deep supervision compares a target of {fine} voxels with an answer of {size}, which does not "
            "divide it. Train on patches whose side is a multiple of the network's coarsest supervised "
            "stride, or set deep_supervision lower."
        )
    return [n // m for n, m in zip(fine, size, strict=True)]


def _any(mask: Tensor, steps: list[int]) -> Tensor:
    """Whether any voxel of each block is set; NaN, in channels that nobody annotated, stays."""
    numbers = mask if mask.is_floating_point() else mask.float()
    return F.max_pool3d(numbers, steps, steps).to(mask.dtype)
