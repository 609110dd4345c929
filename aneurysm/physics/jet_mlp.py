"""A coordinate network that returns its value, gradient and Laplacian in one forward pass.

Notation. A jet of a field f at a point is the 5 numbers (f, df/dx1, df/dx2, df/dx3, lap f). Jets are stacked
on the first axis, so a linear layer is one matrix product over all five channels.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# What a latent code decides, by the number of vectors (width,) that are made of it, given the depth.
CONDITIONINGS: dict[str, Callable[[int], int]] = {
    "shift": lambda depth: 1,
    "film": lambda depth: 2 * depth,
    "hypernetwork": lambda depth: 3 + depth,
}
SMALL = 0.05  # how far a code of unit variance moves gains, weights and biases before training


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
        first = 1 - t * t
        return t, first, (t * first).mul_(-2), first * (4 - 6 * first)


class Sine:
    """sin, for fields with fine detail."""

    def derivatives(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, c = h.sin(), h.cos()
        return s, c, -s, -c


Curves = tuple[Tensor, Tensor, Tensor, Tensor]  # an activation and its first three derivatives at the values


def summed(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products a_j b_j over the first axis, one after the other: half the memory traffic."""
    out = a[0] * b[0]
    for left, right in zip(a[1:], b[1:], strict=True):
        out.addcmul_(left, right)
    return out


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
    out[0].addcmul_(second, summed(grad[1:], jet[1:]))
    out[0].addcmul_(grad[4] * third, square)
    out[1:4].addcmul_(grad[4] * second, jet[1:4], value=2)
    return out


class _JetActivation(torch.autograd.Function):
    """`activated` at h = v + shift; keeps only its input for the backward pass.

    A bias or the latent's contribution moves the value and leaves the derivatives alone.
    """

    @staticmethod
    def forward(ctx, jet: Tensor, shift: Tensor, curve: Curve) -> Tensor:
        ctx.save_for_backward(jet, shift)
        ctx.curve = curve
        return activated(jet, curve.derivatives(jet[0] + shift), summed(jet[1:4], jet[1:4]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        jet, shift = ctx.saved_tensors
        curves = ctx.curve.derivatives(jet[0] + shift)
        out = activated_backward(grad, jet, curves, summed(jet[1:4], jet[1:4]))
        return out, out[0].sum_to_size(shift.shape), None


class Layer(NamedTuple):
    """One affine map gain * (W h) + shift of the network that a batch of latent codes picks out.

    Attributes:
        matrix: W, (w, v); of the first layer (b, w, 3).
        gain: (b, 1, w), or None for 1.
        shift: (b, 1, w), of the value alone: derivatives do not see it.
    """

    matrix: Tensor
    gain: Tensor | None
    shift: Tensor

    def linear(self, below: Tensor) -> Tensor:
        """All but the shift, (..., b, n, v) to (..., b, n, w)."""
        h = below @ self.matrix.mT
        return h if self.gain is None else h * self.gain


class JetMLP(nn.Module):
    """A tanh network of position and latent code whose exact derivatives in position cost one forward pass.

    Forward-Laplacian propagation: five channels go through every layer, five times the work of the plain
    network and a fifth of nested autograd. First-order backward only: the derivatives are outputs, so a
    loss on them needs no second differentiation.

    The latent code z acts through one linear map of it, taken once per candidate and not once per point.
    `conditioning` names what that map moves:

    - "shift": the first bias, W_x x + (b + W_z z). The same as a network of the coordinates with z appended.
    - "film": gain and bias of every hidden layer, gamma_l(z) (W_l h) + b_l + beta_l(z), gamma_l(0) = 1.
    - "hypernetwork": the matrix of the coordinates, W_x + dW_x(z), and the bias of every hidden layer,
      b_l + beta_l(z): every candidate gets its own coordinate axes. It costs what "shift" costs.

    Sources: forward Laplacian, Li et al., Nature Machine Intelligence 6, 2024, eq. 5-7; FiLM, Perez et al.,
    AAAI 2018, eq. 1-2; hypernetworks, Ha et al., ICLR 2017.

    Args:
        latent_dim: length of the latent code of a candidate.
        width: hidden units per layer.
        depth: hidden layers, at least 1.
        outputs: fields; 4 for three velocity components and pressure.
        activation: an object with `derivatives`; tanh when None.
        dtype: "float64" or "float32".
        conditioning: "shift", "film" or "hypernetwork".
    """

    def __init__(
        self,
        latent_dim: int,
        width: int = 32,
        depth: int = 3,
        outputs: int = 4,
        activation: Curve | None = None,
        dtype: str = "float64",
        conditioning: str = "shift",
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
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {list(CONDITIONINGS)}, got {conditioning!r}.")
        self.dtype = torch.float64 if dtype == "float64" else torch.float32
        self.curve = activation or Tanh()
        self.conditioning = conditioning
        generated = CONDITIONINGS[conditioning](depth) * width
        self.position = nn.Linear(3, width, dtype=self.dtype)
        self.latent = nn.Linear(latent_dim, generated, bias=False, dtype=self.dtype)
        self.hidden = nn.ModuleList(nn.Linear(width, width, dtype=self.dtype) for _ in range(depth - 1))
        self.readout = nn.Linear(width, outputs, dtype=self.dtype)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_normal_(parameter)
        if conditioning != "shift":
            # Nearly one network for all codes: Xavier's spread is that of a layer, not of a layer's change.
            nn.init.normal_(self.latent.weight, std=SMALL / latent_dim**0.5)

    def forward(
        self, points: Float[Tensor, "b n 3"], latent: Float[Tensor, "b z"]
    ) -> Float[Tensor, "5 b n outputs"]:
        """Jets of all outputs at every point, in the units of `points`."""
        first, *hidden, readout = self.layers(latent)
        value = first.linear(points)  # (b, n, w)
        slope = first.matrix.movedim(-1, 0)[:, :, None]  # the gradient of an affine map is its matrix
        slope = slope.expand(3, *value.shape)
        jet = torch.cat((value[None], slope, torch.zeros_like(value)[None]))  # (5, b, n, w)
        jet = self._activate(jet, first.shift)
        for layer in hidden:
            jet = self._activate(layer.linear(jet), layer.shift)
        jet = readout.linear(jet)  # (5, b, n, outputs)
        return torch.cat((jet[:1] + readout.shift, jet[1:]))

    def values(
        self, points: Float[Tensor, "b n 3"], latent: Float[Tensor, "b z"]
    ) -> Float[Tensor, "b n outputs"]:
        """The outputs alone, at a fifth of the cost; equals `forward(...)[0]`."""
        *hidden, readout = self.layers(latent)
        below = points
        for layer in hidden:
            below = self.curve.derivatives(layer.linear(below) + layer.shift)[0]
        return readout.linear(below) + readout.shift

    def layers(self, latent: Float[Tensor, "b z"]) -> list[Layer]:
        """The network of every candidate, first layer to readout; the only place where the latent acts."""
        b, width, depth = len(latent), self.position.out_features, len(self.hidden) + 1
        plain: list[nn.Linear] = [self.position, *self.hidden, self.readout]  # type: ignore[list-item]
        matrices = [layer.weight for layer in plain]
        gains: list[Tensor | None] = [None for _ in plain]
        shifts = [layer.bias.expand(b, 1, -1) for layer in plain]

        made = self.latent(latent).unflatten(1, (-1, 1, width)).unbind(1)  # (b, 1, w) each
        matrices[0] = matrices[0].expand(b, -1, -1)
        if self.conditioning == "film":
            matrices[0] = (1 + made[0]).mT * matrices[0]
            gains[1:depth] = [1 + gain for gain in made[1:depth]]
            made = made[depth:]
        elif self.conditioning == "hypernetwork":
            matrices[0] = matrices[0] + torch.cat(made[:3], dim=1).mT
            made = made[3:]
        for i, move in enumerate(made):
            shifts[i] = shifts[i] + move
        return [Layer(*parts) for parts in zip(matrices, gains, shifts, strict=True)]

    def _activate(self, jet: Tensor, shift: Tensor) -> Tensor:
        out = _JetActivation.apply(jet, shift, self.curve)
        assert isinstance(out, Tensor)
        return out
