"""A coordinate network that returns its value, gradient and Laplacian in one forward pass.

Notation. A jet of a field f at a point is the 5 numbers (f, df/dx1, df/dx2, df/dx3, lap f). Jets are stacked
on the first axis, so a linear layer is one matrix product over all five channels.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

JET = 5  # value, three first derivatives, Laplacian


@runtime_checkable
class Curve(Protocol):
    """A scalar activation that knows its own derivatives."""

    def derivatives(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value and first three derivatives at h, elementwise."""
        ...


class Tanh:
    """tanh, the cheapest smooth activation on CPU."""

    def derivatives(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = h.tanh()
        square = t * t
        first = 1 - square
        return t, first, -2 * t * first, first * (6 * square - 2)


class Sine:
    """sin, for fields with fine detail."""

    def derivatives(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, c = h.sin(), h.cos()
        return s, c, -s, -c


Curves = tuple[Tensor, Tensor, Tensor, Tensor]  # an activation and its first three derivatives at the values


def activated(jet: Tensor, curves: Curves, square: Tensor) -> Tensor:
    """The chain rule to second order: v' = s(h), d_j' = s'(h) d_j, L' = s'(h) L + s''(h) sum_j d_j^2.

    Args:
        jet: (5, ...) before the activation; its value is not looked at, `curves` are taken at h already.
        square: sum_j d_j^2 of the jet.
    """
    value, first, second, _ = curves
    out = torch.empty_like(jet)
    out[0] = value
    torch.mul(jet[1:], first, out=out[1:])
    out[4].addcmul_(second, square)
    return out


def activated_backward(grad: Tensor, jet: Tensor, curves: Curves, square: Tensor) -> Tensor:
    """Gradient (5, ...) with respect to the jet, from that of what `activated` made of it."""
    _, first, second, third = curves
    out = grad * first
    out[0].addcmul_(second, (grad[1:] * jet[1:]).sum(0))
    out[0].addcmul_(grad[4] * third, square)
    out[1:4].addcmul_(2 * grad[4] * second, jet[1:4])
    return out


class _JetActivation(torch.autograd.Function):
    """`activated` at h = v + shift; keeps only its input for the backward pass.

    A bias or the latent's contribution moves the value and leaves the derivatives alone.
    """

    @staticmethod
    def forward(ctx, jet: Tensor, shift: Tensor, curve: Curve) -> Tensor:
        ctx.save_for_backward(jet, shift)
        ctx.curve = curve
        return activated(jet, curve.derivatives(jet[0] + shift), jet[1:4].square().sum(0))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        jet, shift = ctx.saved_tensors
        curves = ctx.curve.derivatives(jet[0] + shift)
        out = activated_backward(grad, jet, curves, jet[1:4].square().sum(0))
        return out, out[0].sum_to_size(shift.shape), None


class JetMLP(nn.Module):
    """A tanh network of position and latent code whose exact derivatives in position cost one forward pass.

    Forward-Laplacian propagation: five channels go through every layer, five times the work of the plain
    network and a fifth of nested autograd. First-order backward only: the derivatives are outputs, so a
    loss on them needs no second differentiation. The first layer is split, W_x x + (W_z z + b): the second
    part is computed once per candidate and not once per point.

    Source: forward Laplacian, Li et al., Nature Machine Intelligence 6, 2024, eq. 5-7.

    Args:
        latent_dim: length of the latent code of a candidate.
        width: hidden units per layer.
        depth: hidden layers, at least 1.
        outputs: fields; 4 for three velocity components and pressure.
        activation: an object with `derivatives`; tanh when None.
        dtype: "float64" or "float32".
    """

    def __init__(
        self,
        latent_dim: int,
        width: int = 32,
        depth: int = 3,
        outputs: int = 4,
        activation: Curve | None = None,
        dtype: str = "float64",
    ):
        super().__init__()
        if min(latent_dim, width, depth, outputs) < 1:
            raise ValueError(
                "JetMLP needs latent_dim, width, depth and outputs of at least 1 but got "
                f"{(latent_dim, width, depth, outputs)}."
            )
        if dtype not in ("float64", "float32"):
            raise ValueError(
                f"dtype must be 'float64' or 'float32': half precision loses the Laplacian; got {dtype!r}."
            )
        self.dtype = torch.float64 if dtype == "float64" else torch.float32
        self.curve = activation or Tanh()
        self.position = nn.Linear(3, width, dtype=self.dtype)
        self.latent = nn.Linear(latent_dim, width, bias=False, dtype=self.dtype)
        self.hidden = nn.ModuleList(nn.Linear(width, width, dtype=self.dtype) for _ in range(depth - 1))
        self.readout = nn.Linear(width, outputs, dtype=self.dtype)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_normal_(parameter)

    def forward(
        self, points: Float[Tensor, "b n 3"], latent: Float[Tensor, "b z"]
    ) -> Float[Tensor, "5 b n outputs"]:
        """Jets of all outputs at every point, in the units of `points`."""
        b, n, _ = points.shape
        weight = self.position.weight  # (w, 3)
        value = points @ weight.T  # (b, n, w)
        slope = weight.T[:, None, None].expand(3, b, n, -1)  # the gradient of an affine map is its matrix
        jet = torch.cat((value[None], slope, torch.zeros_like(value)[None]))  # (5, b, n, w)
        jet = self._activate(jet, self._shift(latent))
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            jet = self._activate(jet @ layer.weight.T, layer.bias)
        jet = jet @ self.readout.weight.T  # (5, b, n, outputs)
        return torch.cat((jet[:1] + self.readout.bias, jet[1:]))

    def values(
        self, points: Float[Tensor, "b n 3"], latent: Float[Tensor, "b z"]
    ) -> Float[Tensor, "b n outputs"]:
        """The outputs alone, at a fifth of the cost; equals `forward(...)[0]`."""
        hidden = self._curve(points @ self.position.weight.T + self._shift(latent))
        for layer in self.hidden:
            hidden = self._curve(layer(hidden))
        return self.readout(hidden)

    def _shift(self, latent: Tensor) -> Tensor:
        return (self.latent(latent) + self.position.bias)[:, None]  # (b, 1, w)

    def _activate(self, jet: Tensor, shift: Tensor) -> Tensor:
        out = _JetActivation.apply(jet, shift, self.curve)
        assert isinstance(out, Tensor)
        return out

    def _curve(self, h: Tensor) -> Tensor:
        return self.curve.derivatives(h)[0]
