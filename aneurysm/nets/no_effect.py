"""Biases that the network cannot see.

What all keys of an attention share, the softmax cancels; what a norm over one channel subtracts again, no
later layer meets. The gradient of such a bias is zero but for rounding, and Adam, which divides a gradient by
its size, makes full steps of that noise. The answers stay the same, but the weights then depend on the order
of sums, and so on the number of processes.
"""

from torch import Tensor


def hold(bias: Tensor | None, begin: int = 0, end: int | None = None) -> None:
    """Let entries `begin` to `end` of a bias stay as they are, by a gradient of exactly zero."""

    def without(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[begin:end] = 0
        return kept

    if bias is not None and bias.requires_grad:
        bias.register_hook(without)
