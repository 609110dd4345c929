"""Which channels of a batch are annotated: everything else must neither count nor send a gradient."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def nothing(like: Tensor) -> Float[Tensor, ""]:
    """Zero that is still attached to the graph of `like`, so that a step without labels can go backward."""
    return like.flatten()[:0].sum()


def full_precision(logits: Tensor) -> Tensor:
    """Sums over 10^6 voxels overflow in half precision: lift float16 and bfloat16 to float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def known_channels(
    logits: Float[Tensor, "b c d h w"],
    target: Float[Tensor, "b c d h w"],
    valid: Bool[Tensor, "b c"] | None,
) -> Bool[Tensor, "b c"]:
    """Check a segmentation batch and say which of its channels are annotated.

    Raises:
        ValueError: shapes differ; the message gives all of them.
    """
    if logits.shape != target.shape or logits.ndim != 5:
        raise ValueError(
            f"Segmentation losses take logits and targets of one shape (b, c, d, h, w) but got logits "
            f"{tuple(logits.shape)} and target {tuple(target.shape)}. Add the channel axis or one-hot it."
        )
    if valid is None:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if valid.shape != logits.shape[:2]:
        raise ValueError(
            f"`valid` says for each scan and channel whether it is annotated: expected shape "
            f"{tuple(logits.shape[:2])}, got {tuple(valid.shape)}."
        )
    return valid


def known_probabilities(
    logits: Float[Tensor, "b c d h w"],
    target: Float[Tensor, "b c d h w"],
    valid: Bool[Tensor, "b c"] | None,
) -> tuple[Float[Tensor, "b c d h w"], Float[Tensor, "b c d h w"], Bool[Tensor, "b c"]]:
    """Sigmoid probabilities and targets with zeros in unknown channels: those add no true or false positives.

    The target of an unknown channel may hold anything, NaN included.
    """
    known = known_channels(logits, target, valid)
    spread = known[:, :, None, None, None]  # (b, c, 1, 1, 1)
    logits = full_precision(logits)
    probability = torch.where(spread, torch.sigmoid(logits), 0.0)
    return probability, torch.where(spread, target.to(logits.dtype), 0.0), known


def mean_where(values: Float[Tensor, "..."], keep: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean of the kept values; zero, still differentiable, when nothing is kept."""
    kept = torch.where(keep, values, 0.0)
    return kept.sum() / keep.sum().clamp_min(1)


def beside_of(loss: nn.Module) -> Callable[[np.ndarray], np.ndarray] | None:
    """What a loss can be spared: a function of a target (c, d, h, w) that the data loader may call for it.

    Its result (p, d, h, w) bool, stacked over the batch, is then the fourth argument of the loss. None for
    losses that need nothing but logits and target.
    """
    return getattr(loss, "beside", None)
