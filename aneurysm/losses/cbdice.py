"""A centreline loss that also sees how wide a vessel is and where in it the centreline runs."""

import torch
from jaxtyping import Bool, Float
from monai.losses.cldice import soft_dilate, soft_erode
from torch import Tensor, nn

from aneurysm.losses.dice_ce import DiceLoss
from aneurysm.losses.present import known_probabilities, nothing

_LEAST = 1e-3  # voxels: two depths of zero agree


class CbDiceLoss(nn.Module):
    """Dice on the volume mixed with Dice on centrelines that know their radius.

    ``(1 - share) * dice + share * cbdice``. clDice only asks whether one centreline lies anywhere inside the
    other vessel: a vessel twice as thick, or shifted by half its width, costs nothing. Here each point of a
    centreline counts by how well its radius r fits the depth d of the other vessel at this place,
    ``min(r, d) / max(r, d)``: 1 where both are equal, 0 outside. A ratio does not depend on the calibre, so
    thin arteries are not outvoted by the volume of wide ones. With S the soft centreline,

        precision = (sum S_p fit(r_p, d_t) + 1) / (sum S_p + 1)
        sensitivity = (sum S_t fit(r_t, d_p) + 1) / (sum S_t + 1)
        cbdice = 1 - 2 precision sensitivity / (precision + sensitivity)

    S, r and d of prediction and target come from the same repeated soft erosions: d counts those that a
    voxel survives, S has what an opening takes away, r is the count at which it did. So all of it has
    gradients, stays on the device, and a perfect prediction costs 0.

    Args:
        share: of the centreline term, 0..1.
        iterations: erosions; at least the largest vessel radius in voxels. Deeper vessels have no centreline
            and count in the Dice term alone.
        smooth, batch: of the Dice term, see DiceLoss. The centreline term is always per scan and channel.

    Source: after the idea of Shi et al. 2024, arXiv:2407.01517; the formulas are our own, not the paper's.
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
        self.share, self.iterations = float(share), int(iterations)
        self.dice = DiceLoss(smooth, batch)

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss against a 0/1 target over the channels that `valid` marks as annotated."""
        dice, terms = self.dice(logits, target, valid)
        probability, known_target, known = known_probabilities(logits, target, valid)
        chosen, truth = probability[known][:, None], known_target[known][:, None]  # (n, 1, d, h, w)
        terms["cbdice"] = self._centrelines(chosen, truth).mean() if len(chosen) else nothing(logits)
        return (1 - self.share) * dice + self.share * terms["cbdice"], terms

    def _centrelines(
        self, probability: Float[Tensor, "n 1 d h w"], target: Float[Tensor, "n 1 d h w"]
    ) -> Float[Tensor, " n"]:
        line_p, radius_p, depth_p = soft_centreline(probability, self.iterations)
        line_t, radius_t, depth_t = soft_centreline(target, self.iterations)
        precision = _mean_fit(line_p, radius_p, depth_t)
        sensitivity = _mean_fit(line_t, radius_t, depth_p)
        return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def soft_centreline(
    mask: Float[Tensor, "n 1 d h w"], iterations: int
) -> tuple[Float[Tensor, "n 1 d h w"], Float[Tensor, "n 1 d h w"], Float[Tensor, "n 1 d h w"]]:
    """Centreline 0..1, radius on it in voxels, and depth of every voxel in voxels, of probabilities.

    What leaves the image goes on there: no depth is lost at its border.
    """
    line, weighted, depth = torch.zeros_like(mask), torch.zeros_like(mask), torch.zeros_like(mask)
    for level in range(iterations + 1):
        depth = depth + mask
        smaller = soft_erode(mask)
        left = torch.relu(mask - soft_dilate(smaller))  # what an opening takes away
        added = torch.relu(left - line * left)
        line, weighted = line + added, weighted + (level + 1) * added
        mask = smaller
    return line, weighted / line.clamp_min(_LEAST), depth


def _mean_fit(
    line: Float[Tensor, "n 1 d h w"], radius: Float[Tensor, "n 1 d h w"], depth: Float[Tensor, "n 1 d h w"]
) -> Float[Tensor, " n"]:
    fit = torch.minimum(radius, depth) / torch.maximum(radius, depth).clamp_min(_LEAST)
    return ((line * fit).flatten(1).sum(1) + 1) / (line.flatten(1).sum(1) + 1)
