"""Which blocks of a crop are hidden during masked pretraining.

A mask lives on a grid of cubic blocks: `active` (b, 1, gd, gh, gw) is True where the network may look. All
samples of a batch hide the same number of blocks.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def block_grid(shape: Sequence[int], block: int) -> tuple[int, ...]:
    """Blocks along (d, h, w) that cover an image of shape (b, 1, d, h, w); border blocks may be cut."""
    if len(shape) != 5:
        raise ValueError(f"Expected the shape (b, 1, d, h, w) of a batch of crops but got {tuple(shape)}.")
    return tuple(-(-n // block) for n in shape[2:])


def blocks_to_voxels(
    active: Bool[Tensor, "b 1 gd gh gw"], block: int, size: Sequence[int]
) -> Bool[Tensor, "b 1 d h w"]:
    """Give every voxel of an image of (d, h, w) voxels the value of its block."""
    for axis, n in zip((2, 3, 4), size, strict=True):
        active = active.repeat_interleave(block, axis).narrow(axis, 0, n)
    return active


class RandomBlocks:
    """Hide a fixed share of the blocks, drawn uniformly (SparK, ICLR 2023: ratio 0.6; 0.75 for 3-D crops).

    ratio: share of hidden blocks, 0..1; block: side of a block in voxels.
    """

    def __init__(self, ratio: float = 0.6, block: int = 8) -> None:
        if not 0 < ratio < 1:
            raise ValueError(f"The share of hidden blocks must lie between 0 and 1 but is {ratio}.")
        if block < 1:
            raise ValueError(f"A block needs a side of at least one voxel but got {block}.")
        self.ratio, self.block = ratio, block

    def hidden_count(self, blocks: int) -> int:
        """Number of hidden blocks out of `blocks`; at least one is hidden and one visible."""
        return min(max(blocks - round(blocks * (1 - self.ratio)), 1), blocks - 1)

    def priorities(
        self, noise: Float[Tensor, "b n"], loss_map: Tensor | None, progress: float | int
    ) -> Float[Tensor, "b n"]:
        """Order in which blocks get hidden, highest first; here the order of the noise."""
        return noise

    def __call__(
        self,
        loss_map: Float[Tensor, "b 1 gd gh gw"] | None,
        shape: Sequence[int],
        progress: float | int = 0.0,
        generator: torch.Generator | None = None,
    ) -> Bool[Tensor, "b 1 gd gh gw"]:
        """Draw the mask of a batch.

        loss_map: difficulty of every block, 0 where unknown or not to be chosen (see `AnatoMask`); None if
        there is none. shape: (b, 1, d, h, w) of the crops. progress: share of the training done, 0..1.
        generator: on the CPU, makes the mask repeatable. Raises ValueError if the crop holds a single block
        or the loss map lies on another grid.
        """
        grid = block_grid(shape, self.block)
        n = math.prod(grid)
        if n < 2:
            raise ValueError(
                f"A crop of {tuple(shape[2:])} voxels holds {n} block of {self.block} voxels; masking needs "
                "two or more. Use larger crops or smaller blocks."
            )
        if loss_map is not None and tuple(loss_map.shape[2:]) != grid:
            raise ValueError(
                f"The loss map has {tuple(loss_map.shape[2:])} blocks but crops of {tuple(shape[2:])} voxels "
                f"in blocks of {self.block} have {grid}: use the same block size in the mask and in the "
                "reconstruction."
            )
        noise = torch.rand(shape[0], n, generator=generator)  # on the CPU: the same on every device
        if loss_map is not None:
            noise = noise.to(loss_map.device)
        hidden = self.priorities(noise, loss_map, progress).topk(self.hidden_count(n), dim=1).indices
        active = torch.ones_like(noise, dtype=torch.bool).scatter(1, hidden, False)
        return active.reshape(shape[0], 1, *grid)


class AnatoMask(RandomBlocks):
    """Hide more and more of the blocks a teacher finds hard, from easy to hard (AnatoMask, ECCV 2024).

    The teacher reconstructs under a random mask; its loss per block is `loss_map`. A share of the hidden
    blocks, growing linearly with progress from `hard_start` to `hard_end` (0 and 0.5 in the paper), are the
    ones with the highest loss, the rest is random among all others. Blocks of zero loss (seen by the
    teacher, air, padding) never count as hard; where fewer are left than asked for, chance fills the gap.
    """

    def __init__(
        self, ratio: float = 0.6, block: int = 8, hard_start: float = 0.0, hard_end: float = 0.5
    ) -> None:
        super().__init__(ratio, block)
        if not 0 <= hard_start <= 1 or not 0 <= hard_end <= 1:
            raise ValueError(f"Shares of hard blocks lie in 0..1 but are {hard_start} and {hard_end}.")
        self.hard_start, self.hard_end = hard_start, hard_end

    def hard_count(self, blocks: int, progress: float | int) -> int:
        """Number of hidden blocks that are chosen by the teacher."""
        share = self.hard_start + (self.hard_end - self.hard_start) * min(max(progress, 0.0), 1.0)
        return int(self.hidden_count(blocks) * share)

    def priorities(
        self, noise: Float[Tensor, "b n"], loss_map: Tensor | None, progress: float | int
    ) -> Float[Tensor, "b n"]:
        """Noise in 0..1, raised above 1 for the hard blocks."""
        hard = self.hard_count(noise.shape[1], progress)
        if loss_map is None or hard == 0:
            return noise
        loss = loss_map.detach().reshape(noise.shape).float()
        chosen = torch.zeros_like(noise).scatter(1, loss.topk(hard, dim=1).indices, 1.0)
        return noise + 2 * chosen * (loss > 0)


def teacher_decay(progress: float | int) -> float:
    """Decay of the teacher's moving average: 0.999 to 0.9999 over the first quarter (AnatoMask)."""
    return 0.999 + 0.0009 * min(max(4 * progress, 0.0), 1.0)
