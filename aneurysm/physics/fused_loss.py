"""A sum over collocation points and its gradient in one sweep: memory for a few hundred points, not for all.

A physics loss is a sum over points. So every chunk of them can go through the network forwards and, at once,
backwards; only the gradients of the parameters are kept. Autograd keeps every layer of every point until the
end instead. Forward-Laplacian propagation by the formulas of `jet_mlp`, with the first layer, whose
derivatives are its matrix, done apart.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from aneurysm.physics.jet_mlp import JET, Curve, Curves, JetMLP, activated, activated_backward

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
    total = _FusedSum.apply(network, terms, points, plan, len(extras), latent, *extras, *_parameters(network))
    assert isinstance(total, Tensor)
    return total


def _parameters(network: JetMLP) -> list[Tensor]:
    hidden: list[Tensor] = [p for layer in network.hidden for p in (layer.weight, layer.bias)]  # type: ignore
    return [
        network.position.weight,
        network.position.bias,
        network.latent.weight,
        *hidden,
        network.readout.weight,
        network.readout.bias,
    ]


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
        network: JetMLP,
        terms: Terms,
        points: Tensor,
        plan: list[tuple[slice, slice]],
        extra_count: int,
        latent: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        extras, weights = tensors[:extra_count], tensors[extra_count:]
        wanted = any(ctx.needs_input_grad)
        sweep = _Sweep(network.curve, points, latent, list(weights))
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
        ctx.grads = [sweep.latent_grad(), *outer, *sweep.weight_grads()] if wanted else []
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        return (None,) * 5 + tuple(grad * scale for grad in ctx.grads)


class _Sweep:
    """One chunk at a time through the layers and back; gradients add up.

    Notation as in `jet_mlp`: channels (value, d1, d2, d3, L); r candidates, m points, w units.
    """

    def __init__(self, curve: Curve, points: Tensor, latent: Tensor, weights: list[Tensor]) -> None:
        self.curve, self.points, self.latent = curve, points, latent
        self.weights = weights  # position W, b; latent W; hidden W, b ...; readout W, b
        self.grads = [torch.zeros_like(weight) for weight in weights]
        position, bias, code = weights[:3]
        self.shift = (latent @ code.T + bias)[:, None]  # (b, 1, w)
        self.shift_grad = torch.zeros_like(self.shift)
        self.steepness = position.square().sum(1)  # |grad h|^2 of the first layer, (w,)
        self.layers = [(3 + 2 * i, 4 + 2 * i) for i in range((len(weights) - 5) // 2)]

    def forwards(self, rows: slice, columns: slice) -> Tensor:
        """Jets (5, r, m, outputs) at a chunk of points; what the way back needs is kept."""
        position = self.weights[0]
        self.x = self.points[rows, columns]
        first = self.x @ position.T + self.shift[rows]  # (r, m, w)
        self.first_curve = value, slope, bend, _ = self.curve.derivatives(first)
        out = value.new_empty((JET, *value.shape))
        out[0] = value
        torch.mul(slope, position.T[:, None, None], out=out[1:4])
        torch.mul(bend, self.steepness, out=out[4])
        self.inner: list[tuple[Tensor, Tensor, Curves, Tensor]] = []
        for weight, bias in self.layers:
            below = out
            h = below @ self.weights[weight].T
            h[0] += self.weights[bias]
            curves, square = self.curve.derivatives(h[0]), h[1:4].square().sum(0)
            out = activated(h, curves, square)
            self.inner.append((below, h, curves, square))
        self.top = out
        jet = out @ self.weights[-2].T
        jet[0] += self.weights[-1]
        return jet

    def backwards(self, grad: Tensor, rows: slice) -> None:
        """Add the gradients of the chunk that went forwards last, from that of its jets."""
        self._add(len(self.weights) - 2, grad, self.top)
        self.grads[-1] += grad[0].sum((0, 1))
        grad = grad @ self.weights[-2]
        for (weight, bias), (below, h, curves, square) in zip(
            reversed(self.layers), reversed(self.inner), strict=True
        ):
            through = activated_backward(grad, h, curves, square)
            self._add(weight, through, below)
            self.grads[bias] += through[0].sum((0, 1))
            grad = through @ self.weights[weight]
        position = self.weights[0]
        _, slope, bend, third = self.first_curve
        value = grad[0] * slope + grad[4] * third * self.steepness
        value.addcmul_(bend, torch.einsum("jrmw,wj->rmw", grad[1:4], position))
        tilt = (grad[1:4] * slope).sum((1, 2)).T  # (w, 3)
        tilt += 2 * (grad[4] * bend).sum((0, 1))[:, None] * position
        self.grads[0] += tilt + value.flatten(0, 1).T @ self.x.flatten(0, 1)
        self.shift_grad[rows] += value.sum(1, keepdim=True)

    def latent_grad(self) -> Tensor:
        """Of the latent codes, (b, z)."""
        return self.shift_grad[:, 0] @ self.weights[2]

    def weight_grads(self) -> list[Tensor]:
        """Of all weights, once all chunks have been through."""
        shift = self.shift_grad[:, 0]
        self.grads[1] = shift.sum(0)
        self.grads[2] = shift.T @ self.latent
        return self.grads

    def _add(self, weight: int, grad: Tensor, below: Tensor) -> None:
        self.grads[weight].addmm_(grad.flatten(0, -2).T, below.flatten(0, -2))
