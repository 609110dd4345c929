"""Dice plus voxel-wise cross entropy, the default of most medical segmentation nets."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from monai.losses.dice import DiceLoss as MonaiDiceLoss
from torch import Tensor, nn

from aneurysm.losses.present import full_precision, known_probabilities, mean_where


class DiceLoss(nn.Module):
    """One minus the soft Dice overlap of each annotated channel, counted over the whole batch.

    Args:
        smooth: voxels added to numerator and denominator; see TverskyLoss.
        batch: sum voxel counts over the batch before dividing; False gives one Dice per scan.

    Source: Milletari et al. 2016, arXiv:1606.04797 (with linear instead of squared terms).
    """

    def __init__(self, smooth: float = 1.0, batch: bool = True) -> None:
        super().__init__()
        if smooth <= 0:
            raise ValueError(f"smooth must be > 0, got {smooth}.")
        self.batch = batch
        self.one_minus_dice = MonaiDiceLoss(smooth_nr=smooth, smooth_dr=smooth, batch=batch, reduction="none")

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss of sigmoid(logits) against a 0/1 target over the channels that `valid` marks as annotated."""
        probability, target, known = known_probabilities(logits, target, valid)
        keep = known.any(0) if self.batch else known
        loss = self.one_minus_dice(probability, target).reshape(keep.shape)  # MONAI keeps dummy axes
        total = mean_where(loss, keep)
        return total, {"dice": total}


class DiceCELoss(nn.Module):
    """Weighted sum of soft Dice and binary cross entropy, each channel on its own sigmoid.

    Args:
        dice_weight: of the Dice term (0..1).
        ce_weight: of the cross entropy (nats per voxel, mean over the voxels of annotated channels).
        smooth, batch: see DiceLoss.

    Source: Isensee et al. 2021, nnU-Net, doi:10.1038/s41592-020-01008-z.
    """

    def __init__(
        self, dice_weight: float = 1.0, ce_weight: float = 1.0, smooth: float = 1.0, batch: bool = True
    ) -> None:
        super().__init__()
        if min(dice_weight, ce_weight) < 0 or dice_weight + ce_weight == 0:
            raise ValueError(f"Weights must be >= 0 and not both 0, got dice {dice_weight}, ce {ce_weight}.")
        self.dice_weight, self.ce_weight = float(dice_weight), float(ce_weight)
        self.dice = DiceLoss(smooth, batch)

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss against a 0/1 target over the channels that `valid` marks as annotated."""
        dice, terms = self.dice(logits, target, valid)
        _, known_target, known = known_probabilities(logits, target, valid)
        voxels = F.binary_cross_entropy_with_logits(full_precision(logits), known_target, reduction="none")
        terms["ce"] = mean_where(voxels.mean((2, 3, 4)), known)
        return self.dice_weight * dice + self.ce_weight * terms["ce"], terms
