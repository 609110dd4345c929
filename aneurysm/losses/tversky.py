"""Overlap losses that price a missed voxel and a false alarm differently."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from monai.losses.tversky import TverskyLoss as MonaiTverskyLoss
from torch import Tensor, nn

from aneurysm.losses.present import full_precision, known_probabilities, mean_where


class TverskyLoss(nn.Module):
    """One minus the Tversky index, per channel, with its own price for missed voxels.

    ``index = tp / (tp + fn_weight * fn + fp_weight * fp)``, loss ``(1 - index) ** exponent``, dimensionless
    in 0..1.

    The name of the weight says what it weighs because the literature disagrees: Salehi 2017 and MONAI put
    alpha on false positives, Abraham & Khan 2019 put it on false negatives.

    Args:
        fn_weight: price of a missed voxel; above 0.5 favours recall.
        fp_weight: price of a falsely found voxel.
        exponent: 1 is the plain loss. Below 1 sharpens the gradient of almost solved cases, above 1 damps it
            (the focal Tversky literature writes 1/gamma for it).
        smooth: voxels added to numerator and denominator. With 1 a patch without foreground still pushes
            false positives down; with MONAI's 1e-5 its loss is stuck at 1 without a useful gradient.
        batch: sum the voxel counts over the batch before dividing, so that a patch without foreground
            does not weigh as much as a patch with some. False gives one index per scan.
        ce_weight: factor on a voxel-wise binary cross entropy added to it, in nats; 0 is the bare index. The
            index alone saturates: its probabilities are near 0 or 1, and a threshold chosen for recall
            finds no graded margin to move in.

    Source: Salehi et al. 2017, arXiv:1706.05721; Abraham & Khan 2019, arXiv:1810.07842.
    """

    term = "tversky"

    def __init__(
        self,
        fn_weight: float = 0.7,
        fp_weight: float = 0.3,
        exponent: float = 1.0,
        smooth: float = 1.0,
        batch: bool = True,
        ce_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if min(fn_weight, fp_weight) < 0 or fn_weight + fp_weight == 0:
            raise ValueError(
                f"Tversky weights must be >= 0 and not both 0, got fn {fn_weight}, fp {fp_weight}."
            )
        if exponent <= 0 or smooth <= 0:
            raise ValueError(f"exponent and smooth must be > 0, got {exponent} and {smooth}.")
        self.fn_weight, self.fp_weight = float(fn_weight), float(fp_weight)
        self.exponent, self.batch, self.ce_weight = float(exponent), batch, float(ce_weight)
        self.one_minus_index = MonaiTverskyLoss(
            alpha=self.fp_weight,  # MONAI's alpha is the price of FALSE POSITIVES
            beta=self.fn_weight,
            smooth_nr=smooth,
            smooth_dr=smooth,
            batch=batch,
            reduction="none",
        )

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss of sigmoid(logits) against a 0/1 target over the channels that `valid` marks as annotated."""
        probability, target, known = known_probabilities(logits, target, valid)
        loss = self.one_minus_index(probability, target)  # (c,) over the batch, else (b, c)
        if self.exponent != 1.0:
            # x ** 0.75 has an infinite slope at 0
            loss = loss.clamp_min(1e-6) ** self.exponent
        total = mean_where(loss, known.any(0) if self.batch else known)
        if self.ce_weight == 0:
            return total, {self.term: total}
        entropy = F.binary_cross_entropy_with_logits(full_precision(logits), target, reduction="none")
        entropy = mean_where(entropy.mean((2, 3, 4)), known)
        return total + self.ce_weight * entropy, {self.term: total, "ce": entropy}


class FocalTverskyLoss(TverskyLoss):
    """Tversky loss to the power 3/4, which keeps the gradient of small, almost solved lesions alive.

    Source: Abraham & Khan 2019, arXiv:1810.07842, with gamma = 4/3, exponent = 1 / gamma.
    """

    term = "focal_tversky"

    def __init__(
        self,
        fn_weight: float = 0.7,
        fp_weight: float = 0.3,
        exponent: float = 0.75,
        smooth: float = 1.0,
        batch: bool = True,
    ) -> None:
        super().__init__(fn_weight, fp_weight, exponent, smooth, batch)
