"""Losses of labels per scan or per candidate; what is not known is skipped, not guessed."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from monai.losses.focal_loss import FocalLoss
from torch import Tensor, nn

from aneurysm.losses.present import full_precision, mean_where


class BinaryLoss(nn.Module):
    """Binary cross entropy of logits, in nats, over the labels that are known (not NaN).

    Args:
        positive_weight: factor on positive labels; above 1 when they are rare.
        smoothing: targets become ``t * (1 - smoothing) + smoothing / 2``.
    """

    def __init__(self, positive_weight: float = 1.0, smoothing: float = 0.0) -> None:
        super().__init__()
        if positive_weight <= 0 or not 0 <= smoothing < 1:
            raise ValueError(
                f"Expected positive_weight > 0 and 0 <= smoothing < 1: {positive_weight}, {smoothing}."
            )
        self.positive_weight, self.smoothing = float(positive_weight), float(smoothing)

    def forward(
        self, logits: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean over known labels of any shape; targets are 0, 1 or NaN."""
        logits = full_precision(logits)
        known = ~torch.isnan(target)
        truth = torch.where(known, target, 0.0).to(logits.dtype)
        truth = truth * (1 - self.smoothing) + self.smoothing / 2
        weight = torch.as_tensor(self.positive_weight, dtype=logits.dtype, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight, reduction="none")
        total = mean_where(loss, known)
        return total, {"bce": total}


class BinaryFocalLoss(nn.Module):
    """Binary focal loss of logits over the labels that are known (not NaN): easy cases fade.

    ``-(1 - p_true) ** gamma * log(p_true)``, in nats, times ``alpha`` for positives and ``1 - alpha`` for
    negatives.

    Args:
        gamma: 0 is cross entropy, 2 the usual value.
        alpha: 0..1, weight of positives; None weighs both classes by 1.

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 5.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = None) -> None:
        super().__init__()
        self.focal = FocalLoss(gamma=float(gamma), alpha=alpha, reduction="none")

    def forward(
        self, logits: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean over known labels of any shape; targets are 0, 1 or NaN."""
        logits = full_precision(logits)
        known = ~torch.isnan(target)
        truth = torch.where(known, target, 0.0).to(logits.dtype)
        loss = self.focal(logits.reshape(-1, 1), truth.reshape(-1, 1)).reshape(known.shape)
        total = mean_where(loss, known)
        return total, {"focal": total}


class LocationLoss(nn.Module):
    """Cross entropy over the arteries a candidate may lie in, in nats, for candidates whose artery is known.

    Args:
        smoothing: label smoothing, 0..1.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}.")
        self.smoothing = float(smoothing)

    def forward(
        self, logits: Float[Tensor, "b locations"], target: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean over candidates; a negative target: the artery is unknown or there is no lesion."""
        known = target >= 0
        loss = F.cross_entropy(
            full_precision(logits),
            target.clamp_min(0).long(),
            reduction="none",
            label_smoothing=self.smoothing,
        )
        total = mean_where(loss, known)
        return total, {"location": total}


class OffsetLoss(nn.Module):
    """Smooth L1 distance between the predicted and the true shift from candidate to lesion centre.

    Args:
        beta: below this error, in the unit of the offsets, the loss is quadratic.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}.")
        self.beta = float(beta)

    def forward(
        self,
        offset: Float[Tensor, "b 3"],
        target: Float[Tensor, "b 3"],
        valid: Bool[Tensor, "b"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean over candidates with a lesion; `valid` False or a NaN in the target skips a candidate."""
        known = ~torch.isnan(target).any(1)
        known = known if valid is None else known & valid
        offset = full_precision(offset)
        truth = torch.where(known[:, None], target.to(offset.dtype), 0.0)
        loss = F.smooth_l1_loss(offset, truth, beta=self.beta, reduction="none").mean(1)
        total = mean_where(loss, known)
        return total, {"offset": total}
