"""Jets: a field's value, its three first derivatives and its Laplacian at a point, and their algebra.

Jets are stacked on the first axis, (5, ...) = (f, df/dx1, df/dx2, df/dx3, lap f). Sums of jets are the jets
of sums; products and compositions follow here. They are exact, so a flow may be put together from a network,
a wall function and inflow profiles, and its Navier-Stokes residual needs no further differentiation.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

JET = 5  # value, three first derivatives, Laplacian


@runtime_checkable
class JetField(Protocol):
    """Fields of position that know their own derivatives."""

    def jet(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "5 b n c"]:
        """Exact jets of all c fields, in the units of the points."""
        ...


def product_jet(a: Float[Tensor, "5 ..."], b: Float[Tensor, "5 ..."]) -> Float[Tensor, "5 ..."]:
    """Jet of a product: grad(ab) = a grad b + b grad a, lap(ab) = a lap b + 2 grad a . grad b + b lap a.

    Shapes broadcast behind the first axis.
    """
    laplacian = b[4:] * a[:1] + 2 * (b[1:4] * a[1:4]).sum(0, keepdim=True) + b[:1] * a[4:]
    return torch.cat((a[:1] * b[:1], b[1:4] * a[:1] + b[:1] * a[1:4], laplacian))


def composed_jet(
    jet: Float[Tensor, "5 ..."], value: Tensor, first: Tensor, second: Tensor
) -> Float[Tensor, "5 ..."]:
    """Jet of s(f): grad = s' grad f, lap = s' lap f + s'' |grad f|^2, of s, s', s'' at the jet's values."""
    laplacian = first * jet[4] + second * jet[1:4].square().sum(0)
    return torch.cat((value[None], first * jet[1:4], laplacian[None]))


def plane_jet(points: Float[Tensor, "... 3"], through: Tensor, normal: Tensor) -> Float[Tensor, "5 ..."]:
    """Jet of the signed distance from a plane, positive on the side of its unit normal (3,)."""
    distance = (points - through) @ normal
    slope = [torch.full_like(distance, float(part)) for part in normal]
    return torch.stack((distance, *slope, torch.zeros_like(distance)))


def square_distance_jet(points: Float[Tensor, "... 3"], centre: Tensor) -> Float[Tensor, "5 ..."]:
    """Jet of |x - c|^2: gradient 2 (x - c), Laplacian 6."""
    away = points - centre
    square = away.square().sum(-1)
    return torch.cat((square[None], 2 * away.movedim(-1, 0), torch.full_like(square, 6.0)[None]))


def autograd_jet(
    function: Callable[[Tensor], Tensor], points: Float[Tensor, "... 3"]
) -> Float[Tensor, "5 ... c"]:
    """Jets of any function of position, (..., 3) to (..., c), by nested automatic differentiation.

    Every point's output must depend on that point alone. Differentiable with respect to the function's
    parameters; costs 4 c backward passes, which `JetMLP` needs none of.
    """
    with torch.enable_grad():
        x = points.detach().clone().requires_grad_()
        return recorded_jet(function(x), x)


def recorded_jet(value: Float[Tensor, "... c"], x: Float[Tensor, "... 3"]) -> Float[Tensor, "5 ... c"]:
    """Jets of what was computed from x while autograd recorded; the second half of `autograd_jet`."""
    jets = []
    for output in value.unbind(-1):
        slope = gradient(output, x)  # (..., 3)
        bend = sum((gradient(slope[..., j], x)[..., j] for j in range(3)), torch.zeros_like(output))
        jets.append(torch.cat((output[None], slope.movedim(-1, 0), bend[None])))
    return torch.stack(jets, dim=-1)


def gradient(field: Float[Tensor, "..."], x: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """Derivative of a field, one number per point, in that point; itself differentiable."""
    # A field that does not depend on the coordinates has no graph: its derivative is 0.
    if not field.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(field.sum(), x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad
