"""Losses that care for the continuity of thin vessels: their centrelines count as much as their volume."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from monai.losses.cldice import SoftclDiceLoss
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor, nn

from aneurysm.losses.dice_ce import DiceLoss
from aneurysm.losses.present import known_channels, known_probabilities, nothing


class ClDiceLoss(nn.Module):
    """Dice on the volume mixed with Dice on soft centrelines: ``(1 - share) * dice + share * cldice``.

    A gap of one voxel in a vessel hardly changes Dice but cuts the centreline, which this loss sees.

    Args:
        share: of the centreline term, 0..1.
        iterations: erosions of the soft skeleton; at least the largest vessel radius in voxels.
        smooth, batch: of the Dice term, see DiceLoss. The centreline term is always per scan and channel.

    Source: Shit et al. 2021, arXiv:2003.07311.
    """

    def __init__(
        self, share: float = 0.5, iterations: int = 5, smooth: float = 1.0, batch: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share is the part of the centreline term, 0..1, got {share}.")
        if iterations < 1:
            raise ValueError(
                f"iterations must be at least 1 (the vessel radius in voxels), got {iterations}."
            )
        self.share = float(share)
        self.dice = DiceLoss(smooth, batch)
        self.centreline = SoftclDiceLoss(iter_=iterations, reduction="none")

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss against a 0/1 target over the channels that `valid` marks as annotated."""
        dice, terms = self.dice(logits, target, valid)
        probability, known_target, known = known_probabilities(logits, target, valid)
        # MONAI pools the channels of a scan into one value; as a batch of single channels each keeps its own
        chosen, chosen_target = probability[known][:, None], known_target[known][:, None]  # (n, 1, d, h, w)
        cldice = self.centreline(chosen, chosen_target).mean() if len(chosen) else nothing(logits)
        terms["cldice"] = cldice
        return (1 - self.share) * dice + self.share * cldice, terms


def skeleton_tube(mask: np.ndarray, dilations: int) -> np.ndarray:
    """Centreline of a binary mask (d, h, w), widened by `dilations` face-neighbour steps inside the mask."""
    inside = mask > 0
    tube = np.asarray(skeletonize(inside), dtype=bool)
    if dilations:
        tube = np.asarray(ndimage.binary_dilation(tube, iterations=dilations), dtype=bool)
    return np.logical_and(tube, inside)


class SkeletonRecallLoss(nn.Module):
    """Dice on the volume plus the missed share of the true centreline.

    Cheaper than clDice on the GPU: only the target is skeletonised, on the CPU, and no gradient passes
        through it.
    Written as one minus recall so that it is never negative, which UW-SO weighting relies on.

    Args:
        weight: of the recall term.
        dilations: how far the centreline is widened. In vessels of 3 voxels 2 steps already fill the
            whole vessel.
        smooth, batch: of the Dice term, see DiceLoss.

    Source: Kirchhoff et al. 2024, arXiv:2404.03010.
    """

    def __init__(
        self, weight: float = 1.0, dilations: int = 1, smooth: float = 1.0, batch: bool = True
    ) -> None:
        super().__init__()
        if weight < 0 or dilations < 0:
            raise ValueError(f"weight and dilations must be >= 0, got {weight} and {dilations}.")
        self.weight, self.dilations = float(weight), int(dilations)
        self.dice = DiceLoss(smooth, batch)

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss against a 0/1 target over the channels that `valid` marks as annotated."""
        dice, terms = self.dice(logits, target, valid)
        known = known_channels(logits, target, valid)
        probability, known_target, _ = known_probabilities(logits, target, known)
        recalls = []
        for found, truth in zip(probability[known], known_target[known], strict=True):
            tube = skeleton_tube((truth > 0.5).cpu().numpy(), self.dilations)
            if tube.any():  # an empty channel has no centreline to miss
                recalls.append(found[torch.from_numpy(tube).to(found.device)].mean())
        missed = 1 - torch.stack(recalls).mean() if recalls else nothing(logits)
        terms["skeleton_recall"] = missed
        return dice + self.weight * missed, terms
