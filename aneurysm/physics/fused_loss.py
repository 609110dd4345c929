"""A sum over collocation points and its gradient in one sweep: memory for a few hundred points, not for all.

A physics loss is a sum over points. So every chunk of them can go through the network forwards and, at once,
backwards; only the gradients of the parameters are kept. Autograd keeps every layer of every point until the
end instead. Forward-Laplacian propagation by the formulas of `jet_mlp`, with the first layer, whose
derivatives are its matrix, done apart.

The latent codes do not come in here: the sweep starts from the layers that they pick out for every candidate
and returns the gradients of those, which ordinary autograd carries on to codes and parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from aneurysm.physics.jet_mlp import Curve, Curves, JetMLP, Layer, activated, activated_backward, summed
from aneurysm.physics.jets import JET

CHUNK = 512  # points; between 128 and 1024 times are alike
Terms = Callable[..., Tensor]


def fused_sum(
    network: JetMLP,
    latent: Float[Tensor, "b z"],
    points: Float[Tensor, "b n 3"],
    terms: Terms,
    extras: Sequence[Tensor] = (),
    chunk: int = CHUNK,
    whole_rows: bool = False,
) -> Float[Tensor, ""]:
    """Sum of `terms` over chunks of points, differentiable once, in memory that does not grow with n.

    The upstream gradient is one number, so what is wanted of single points has to be collected, detached, by
    `terms` itself.

    Args:
        network: of position and latent code.
        latent: code of every candidate.
        points: of every candidate; they are constants, no gradient reaches them.
        terms: called as terms(jet, rows, columns, *extras) with jets (5, r, m, outputs) of candidates `rows`
            at their points `columns` (slices); returns the chunk's part of the sum, a scalar.
        extras: further tensors that the sum depends on, as a scale per candidate; they get gradients as well.
        chunk: points at a time, of all candidates together.
        whole_rows: a chunk holds all points of its candidates, for terms that compare points of one
            candidate; a candidate with more than `chunk` points is then a chunk of its own.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"A chunk has at least one point, got {chunk}.")
    plan = list(_chunks(points.shape[0], points.shape[1], chunk, whole_rows))
    tensors = [*extras, *(part for layer in network.layers(latent) for part in layer)]
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in tensors)
    total = _FusedSum.apply(network.curve, terms, points, plan, wanted, len(extras), *tensors)
    assert isinstance(total, Tensor)
    return total


def _chunks(rows: int, columns: int, chunk: int, whole_rows: bool) -> Iterator[tuple[slice, slice]]:
    wide = columns if whole_rows else min(columns, chunk)
    tall = max(1, chunk // max(wide, 1))
    for row in range(0, rows, tall):
        for column in range(0, columns, max(wide, 1)):
            yield slice(row, min(row + tall, rows)), slice(column, min(column + wide, columns))


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        curve: Curve,
        terms: Terms,
        points: Tensor,
        plan: list[tuple[slice, slice]],
        wanted: bool,
        extra_count: int,
        *tensors: Any,  # extras, then (matrix, gain or None, shift) of every layer
    ) -> Tensor:
        extras, parts = tensors[:extra_count], tensors[extra_count:]
        sweep = _Sweep(curve, points, [Layer(*parts[i : i + 3]) for i in range(0, len(parts), 3)])
        leaves = [extra.detach().requires_grad_(wanted) for extra in extras]
        outer = [torch.zeros_like(extra) for extra in extras]
        total = points.new_zeros(())
        for rows, columns in plan:
            jet = sweep.forwards(rows, columns)
            if not wanted:
                total += terms(jet, rows, columns, *leaves)
                continue
            jet = jet.requires_grad_()
            with torch.enable_grad():
                part = terms(jet, rows, columns, *leaves)
            total += part.detach()
            if not part.requires_grad:
                continue
            grads = torch.autograd.grad(part, [jet, *leaves], allow_unused=True)
            for sum_, grad in zip(outer, grads[1:], strict=True):
                if grad is not None:
                    sum_ += grad
            if grads[0] is not None:
                sweep.backwards(grads[0], rows)
        ctx.grads = [*outer, *(grad for layer in sweep.grads for grad in layer)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        return (None,) * 6 + tuple(None if grad is None else grad * scale for grad in ctx.grads)


class _Sweep:
    """One chunk at a time through the layers and back; gradients add up in `grads`, shaped as the layers.

    Notation as in `jet_mlp`: channels (value, d1, d2, d3, L); r candidates, m points, w units.
    """

    def __init__(self, curve: Curve, points: Tensor, layers: list[Layer]) -> None:
        self.curve, self.points, self.layers = curve, points, layers
        self.grads = [Layer._make(p if p is None else torch.zeros_like(p) for p in layer) for layer in layers]
        self.steepness = layers[0].matrix.square().sum(-1)[:, None]  # first layer's |grad h|^2, (b, 1, w)

    def forwards(self, rows: slice, columns: slice) -> Tensor:
        """Jets (5, r, m, outputs) at a chunk of points; what the way back needs is kept."""
        matrix, _, shift = self.layers[0]
        matrix, self.x = matrix[rows], self.points[rows, columns]
        first = torch.baddbmm(shift[rows], self.x, matrix.mT)  # (r, m, w)
        self.first_curve = value, slope, bend, _ = self.curve.derivatives(first)
        out = value.new_empty((JET, *value.shape))
        out[0] = value
        torch.mul(slope, matrix.movedim(-1, 0)[:, :, None], out=out[1:4])
        torch.mul(bend, self.steepness[rows], out=out[4])
        self.inner: list[tuple[Tensor, Tensor, Tensor, Curves, Tensor]] = []
        for layer in self.layers[1:-1]:
            below = out
            raw, h = _affine(layer, below, rows)
            curves, square = self.curve.derivatives(h[0]), summed(h[1:4], h[1:4])
            out = activated(h, curves, square)
            self.inner.append((below, raw, h, curves, square))
        raw, jet = _affine(self.layers[-1], out, rows)
        self.top = out, raw
        return jet

    def backwards(self, grad: Tensor, rows: slice) -> None:
        """Add the gradients of the chunk that went forwards last, from that of its jets."""
        grad = self._affine_backwards(len(self.inner) + 1, grad, *self.top, rows)
        for i, (below, raw, h, curves, square) in reversed(list(enumerate(self.inner, start=1))):
            through = activated_backward(grad, h, curves, square)
            grad = self._affine_backwards(i, through, below, raw, rows)
        matrix = self.layers[0].matrix[rows]
        _, slope, bend, third = self.first_curve
        value = grad[0] * slope + grad[4] * third * self.steepness[rows]
        value.addcmul_(bend, summed(grad[1:4], matrix.movedim(-1, 0)[:, :, None]))
        tilt = (grad[1:4] * slope).sum(2).movedim(0, -1)  # (r, w, 3)
        tilt = tilt + 2 * (grad[4] * bend).sum(1)[..., None] * matrix
        self.grads[0].matrix[rows] += tilt + value.mT @ self.x
        self.grads[0].shift[rows] += value.sum(1, keepdim=True)

    def _affine_backwards(self, index: int, grad: Tensor, below: Tensor, raw: Tensor, rows: slice) -> Tensor:
        layer, grads = self.layers[index], self.grads[index]
        grads.shift[rows] += grad[0].sum(1, keepdim=True)
        if layer.gain is not None and grads.gain is not None:
            grads.gain[rows] += (grad * raw).sum(0).sum(1, keepdim=True)  # at once it is three times slower
            grad *= layer.gain[rows]
        grads.matrix.addmm_(grad.flatten(0, -2).T, below.flatten(0, -2))
        return grad @ layer.matrix


def _affine(layer: Layer, below: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """W h, which only a gain's gradient needs, and gain * (W h) + shift; without a gain they share memory."""
    raw = below @ layer.matrix.T
    h = raw if layer.gain is None else raw * layer.gain[rows]
    h[0] += layer.shift[rows]
    return raw, h
