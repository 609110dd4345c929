"""Activations that are computed again on the way back instead of being kept: time for memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """block(*inputs), of which only the inputs are kept for the backward pass.

    Outputs, gradients and running statistics are those of the plain call, bit by bit. Without gradients or in
    eval mode it is the plain call.
    """
    if not (block.training and torch.is_grad_enabled()):
        return block(*inputs)
    # A compiled graph is computed again without its side effects, and takes no contexts.
    contexts: dict[str, Any] = (
        {} if torch.compiler.is_compiling() else {"context_fn": lambda: _contexts(block)}
    )
    return checkpoint(block, *inputs, use_reentrant=False, **contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first and the second run of a block."""
    return nullcontext(), _running_statistics_kept(block)


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second run of a batch must not enter a batch norm's running mean and variance again."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
