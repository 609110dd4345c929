"""A batch of which several processes hold a part each: what has to be computed over all of it.

Every process calls these functions at the same places. For one process alone they are the identity, or the
plain computation.

Why gradients come out right: let W processes compute the same loss L from gathered rows. Going back, `gather`
adds up what all processes ask of a row, which is W dL/drow, so a process's own parameters receive W times
its share of the gradient, and averaging over the processes (DistributedDataParallel, FSDP) leaves the sum of
the shares: the gradient of one process that holds the whole batch. The same holds for sums inside a network.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def rank() -> int:
    """Number of this process among those that train together, 0 for one alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(*parts: Tensor) -> tuple[Tensor, ...]:
    """Rows of all processes, in the order of the processes.

    Args:
        parts: tensors (n, ...) of one n, which may differ from process to process and may be 0.
    """
    if world() == 1:
        return parts
    own = torch.tensor([len(parts[0])], device=parts[0].device)
    counts = [torch.zeros_like(own) for _ in range(world())]
    dist.all_gather(counts, own, group=_group())
    sizes = [int(n) for n in torch.cat(counts).tolist()]
    return tuple(_Gather.apply(part, sizes) for part in parts)


def total(x: Tensor) -> Tensor:
    """Sum of a tensor over the processes, elementwise."""
    return x if world() == 1 else _Total.apply(x)


def own_rows(x: Tensor) -> Tensor:
    """This process's part of rows that were made for the whole batch; all parts are equally long."""
    rows = len(x) // world()
    return x[rank() * rows : (rank() + 1) * rows]


def rand_rows(rows: int, *shape: int, device: Any = None) -> Tensor:
    """Uniform numbers (rows, *shape): this process's part of one draw for the whole batch.

    Processes whose generators agree so draw what one process draws for all of them.
    """
    return own_rows(torch.rand(rows * world(), *shape, device=device))


def rows_in_all(x: Tensor) -> int:
    """Rows of the whole batch, of which every process holds as many as this one."""
    return len(x) * world()


def over_all_processes(net: nn.Module) -> nn.Module:
    """Make the batch norms and the dropout of a network, in place, those of the whole batch.

    As `torch.nn.SyncBatchNorm`, but on every device; the names in the state dict stay.
    """
    for module in net.modules():
        if type(module) in _OVER_ALL:
            module.__class__ = _OVER_ALL[type(module)]
    return net


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.begin, ctx.rows = sum(sizes[: rank()]), len(part)
        sent = part.detach().to(torch.uint8) if part.dtype == torch.bool else part.detach()
        room = sent.new_zeros(max(sizes), *sent.shape[1:])  # memory in rows, whatever the layout of the part
        room[: len(sent)] = sent
        held = [torch.empty_like(room) for _ in sizes]
        dist.all_gather(held, room, group=_group())
        return torch.cat([h[:n] for h, n in zip(held, sizes, strict=True)]).to(part.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device).copy_(grads[0])
        dist.all_reduce(grad, group=_group())
        return grad[ctx.begin : ctx.begin + ctx.rows], None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.detach().clone()
        dist.all_reduce(summed, group=_group())
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = grads[0].contiguous().clone()
        dist.all_reduce(summed, group=_group())
        return summed


def _group() -> Any:
    """Processes talk here, not in the default group: there the order is that in which gradients get ready."""
    return _group_beside(dist.group.WORLD)


@lru_cache(maxsize=1)
def _group_beside(default: Any) -> Any:
    return dist.new_group()


class _BatchNormOverAll(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the mean and variance of the whole batch."""

    def forward(self, input: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        if world() == 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        x = input if input.dtype == torch.float64 else input.float()
        shape = [1, -1] + [1] * (input.ndim - 2)
        count = total(x.new_tensor([x.numel() / x.shape[1]]))
        mean = total(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance = total(centred.square().sum(axes)) / count
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        rate = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if rate is None:  # a plain average
                rate = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate or 0.0)
        self.running_var.lerp_(variance.to(self.running_var.dtype), rate or 0.0)


class BatchNorm1dOverAll(_BatchNormOverAll, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over the whole batch."""


class BatchNorm2dOverAll(_BatchNormOverAll, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the whole batch."""


class BatchNorm3dOverAll(_BatchNormOverAll, nn.BatchNorm3d):
    """`nn.BatchNorm3d` over the whole batch."""


class DropoutOverAll(nn.Dropout):
    """`nn.Dropout` whose zeros are this process's part of one draw for the whole batch."""

    def forward(self, input: Tensor) -> Tensor:
        if world() == 1 or not self.training or self.p in (0, 1) or self.inplace:
            return F.dropout(input, self.p, self.training, self.inplace)
        # As PyTorch draws it, so that the numbers are the same; of another layout they would not be.
        kept = torch.empty(rows_in_all(input), *input.shape[1:], dtype=input.dtype, device=input.device)
        return input * own_rows(kept.bernoulli_(1 - self.p).div_(1 - self.p))


_OVER_ALL: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1dOverAll,
    nn.BatchNorm2d: BatchNorm2dOverAll,
    nn.BatchNorm3d: BatchNorm3dOverAll,
    nn.Dropout: DropoutOverAll,
}
