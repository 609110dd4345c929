"""Where an untrained segmentation network starts."""

import math

from torch import nn


def start_at(convolution: nn.Module, probability: float | int) -> None:
    """Let a network whose last layer is `convolution` give `probability` everywhere before it is trained.

    Structures are rare: from one half, the first steps only learn to say no.

    Raises:
        ValueError: the probability is not between 0 and 1, or the layer has no bias.
    """
    if not 0 < probability < 1:
        raise ValueError(
            f"prior={probability}: the untrained probability lies between 0 and 1, without them."
        )
    bias = getattr(convolution, "bias", None)
    if bias is None:
        raise ValueError(f"The last layer {convolution} has no bias, which would carry the prior.")
    nn.init.constant_(bias, math.log(probability / (1 - probability)))
