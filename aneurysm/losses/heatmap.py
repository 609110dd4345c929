"""Loss of a dense aneurysm heat map: soft targets, a handful of peaks in a volume of nothing."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aneurysm.losses.present import beside_of, full_precision, known_channels

KINDS = ("focal", "bce")


class HeatmapLoss(nn.Module):
    """Cross entropy of a sigmoid heat map against a target in 0..1, in nats per voxel of peak.

    ``focal`` weighs a voxel by ``|target - p| ** gamma`` (the quality focal loss: what is nearly right fades,
    at peaks as in the background), ``bce`` by ``1 + positive_weight * target``. The sum over voxels is
    divided by the sum of the targets, at least `least_mass`, so that neither the size of a patch nor the
    number of empty ones changes what a peak is worth.

    Args:
        kind: focal or bce.
        gamma: of the focal weight.
        positive_weight: of the bce weight.
        least_mass: voxels of target that a batch without lesions is divided by.

    Source: Li et al. 2020, arXiv:2006.04388, eq. 4; normalised by peaks as in Zhou et al. 2019,
    arXiv:1904.07850.
    """

    def __init__(
        self,
        kind: str = "focal",
        gamma: float = 2.0,
        positive_weight: float = 50.0,
        least_mass: float = 50.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"A heat-map loss is one of {', '.join(KINDS)}, got {kind!r}.")
        if gamma < 0 or positive_weight < 0 or least_mass <= 0:
            raise ValueError(
                f"Expected gamma >= 0, positive_weight >= 0, least_mass > 0: "
                f"{gamma}, {positive_weight}, {least_mass}."
            )
        self.kind, self.gamma = kind, float(gamma)
        self.positive_weight, self.least_mass = float(positive_weight), float(least_mass)

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss over the channels that `valid` marks as annotated; what lies in the others is not read."""
        known = known_channels(logits, target, valid)[:, :, None, None, None]
        logits = full_precision(logits)
        truth = torch.where(known, target.to(logits.dtype), 0.0)
        entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        if self.kind == "focal":
            weight = (truth - torch.sigmoid(logits)).abs() ** self.gamma
        else:
            weight = 1 + self.positive_weight * truth
        total = torch.where(known, weight * entropy, 0.0).sum() / truth.sum().clamp_min(self.least_mass)
        return total, {"heatmap": total}


class WithHeatmap(nn.Module):
    """Segmentation loss on all channels but the last, heat-map loss on the last one.

    Args:
        segmentation: (logits, target, valid) -> loss, terms.
        heatmap: of the last channel.
        weight: of the heat map's loss in the sum.
    """

    def __init__(self, segmentation: nn.Module, heatmap: HeatmapLoss, weight: float = 1.0) -> None:
        super().__init__()
        if weight <= 0:
            raise ValueError(f"The weight of the heat-map loss must be > 0, got {weight}.")
        self.segmentation, self.heatmap, self.weight = segmentation, heatmap, float(weight)

    @property
    def beside(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What the segmentation loss wants beside a target: of its own channels."""
        wanted = beside_of(self.segmentation)
        return None if wanted is None else lambda target: wanted(target[:-1])

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
        beside: Bool[Tensor, "b p d h w"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Weighted sum, and the terms of both."""
        known = known_channels(logits, target, valid)
        extra = () if beside is None else (beside,)
        masks, terms = self.segmentation(logits[:, :-1], target[:, :-1], known[:, :-1], *extra)
        peaks, more = self.heatmap(logits[:, -1:], target[:, -1:], known[:, -1:])
        return masks + self.weight * peaks, {**terms, **more}
