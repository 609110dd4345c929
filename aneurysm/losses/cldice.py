"""Losses that care for the continuity of thin vessels: their centrelines count as much as their volume."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from monai.losses.cldice import SoftclDiceLoss
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor, nn

from aneurysm.losses.dice_ce import DiceLoss
from aneurysm.losses.present import known_probabilities, mean_where, nothing


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


def centreline(mask: np.ndarray) -> np.ndarray:
    """Lines of voxels along the middle of every structure of a binary mask (d, h, w), bool; none is left out.

    Lee's thinning deletes straight tubes of even width, whole ones and branches alike. Where no line of its
    runs within half a radius (and two voxels) of the middle of a structure, the ridge of the structure's own
    depth stands in, one or two voxels wide.
    """
    inside = mask > 0
    line = np.asarray(skeletonize(inside), dtype=bool)
    if not inside.any():
        return line
    depth = np.asarray(ndimage.distance_transform_edt(inside)) if not inside.all() else inside.astype(float)
    ridge = inside & (depth >= ndimage.maximum_filter(depth, 3))
    if line.any():
        ridge &= np.asarray(ndimage.distance_transform_edt(~line)) > 0.5 * depth + 2
    return line | ridge


def skeleton_tube(mask: np.ndarray, dilations: int) -> np.ndarray:
    """Centreline of a binary mask (d, h, w), widened by `dilations` face-neighbour steps inside the mask."""
    inside = mask > 0
    tube = centreline(inside)
    if dilations:
        tube = np.asarray(ndimage.binary_dilation(tube, iterations=dilations), dtype=bool)
    return np.logical_and(tube, inside)


class SkeletonRecallLoss(nn.Module):
    """Dice on the volume plus the missed share of the true centreline.

    Cheaper than clDice on the GPU: only the target is skeletonised, on the CPU, and no gradient passes
    through it. Whoever loads the data can do that beforehand (`beside`); otherwise the loss does, and a GPU
    waits for it.
    Written as one minus recall so that it is never negative, which UW-SO weighting relies on.

    Args:
        weight: of the recall term.
        dilations: how far the centreline is widened, in face-neighbour steps. In vessels of 3 voxels 2 steps
            already fill the whole vessel.
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

    def beside(self, target: np.ndarray) -> np.ndarray:
        """The tubes of a target (c, d, h, w), bool, as `forward` takes them."""
        return np.stack([skeleton_tube(channel > 0.5, self.dilations) for channel in target])

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
        beside: Bool[Tensor, "b c d h w"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss against a 0/1 target over the channels that `valid` marks as annotated.

        Args:
            beside: what the method of that name makes of each target; None makes it here.
        """
        dice, terms = self.dice(logits, target, valid)
        probability, known_target, known = known_probabilities(logits, target, valid)
        if beside is None:
            made = [self.beside(scan) for scan in known_target.cpu().numpy()]
            beside = torch.from_numpy(np.stack(made)).to(logits.device)
        size = beside.sum((2, 3, 4))  # (b, c) voxels of tube
        recall = torch.where(beside, probability, 0.0).sum((2, 3, 4)) / size.clamp_min(1)
        # an empty channel has no centreline to miss
        missed = mean_where(1 - recall, known & (size > 0))
        terms["skeleton_recall"] = missed
        return dice + self.weight * missed, terms
