"""The algebra of jets against nested automatic differentiation, and that against a polynomial."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aneurysm.physics.jets import autograd_jet, composed_jet, plane_jet, product_jet, square_distance_jet

Field = Callable[[Tensor], Tensor]
POINTS = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CENTRE = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
NORMAL = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3


def wave(x: Tensor) -> Tensor:
    return (x[..., 0] * x[..., 1]).sin()


def bowl(x: Tensor) -> Tensor:
    return x.square().sum(-1).cos()


def jet(field: Field) -> Tensor:
    return autograd_jet(lambda x: field(x)[..., None], POINTS)[..., 0]


def same(mine: Tensor, theirs: Tensor) -> None:
    # Two ways to the same number: round-off of some ten operations on numbers of order one to ten.
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_autograd_finds_the_jet_of_a_polynomial():
    x, y, z = POINTS.unbind(-1)
    known = torch.stack(
        (x**2 * y * z**3, 2 * x * y * z**3, x**2 * z**3, 3 * x**2 * y * z**2, torch.zeros_like(x))
    )
    known[4] = 2 * y * z**3 + 6 * x**2 * y * z
    same(jet(lambda p: p[..., 0] ** 2 * p[..., 1] * p[..., 2] ** 3), known)
    assert not jet(lambda p: torch.ones_like(p[..., 0]))[1:].any()  # a constant has no graph at all


def test_product():
    same(product_jet(jet(wave), jet(bowl)), jet(lambda x: wave(x) * bowl(x)))


def test_one_factor_multiplies_many_fields():
    def many(x: Tensor) -> Tensor:
        return torch.stack((wave(x), bowl(x), x[..., 2]), dim=-1)

    mine = product_jet(jet(bowl)[..., None], autograd_jet(many, POINTS))
    same(mine, autograd_jet(lambda x: bowl(x)[..., None] * many(x), POINTS))


@pytest.mark.parametrize("field", [wave, bowl])
def test_composition(field):
    inner = jet(field)
    value = inner[0].exp()
    same(composed_jet(inner, value, value, value), jet(lambda x: field(x).exp()))
    cube = composed_jet(inner, inner[0] ** 3, 3 * inner[0] ** 2, 6 * inner[0])
    same(cube, product_jet(inner, product_jet(inner, inner)))


def test_distance_from_a_plane():
    mine = plane_jet(POINTS, CENTRE, NORMAL)
    same(mine, jet(lambda x: (x - CENTRE) @ NORMAL))
    ahead = plane_jet((CENTRE + 0.7 * NORMAL)[None], CENTRE, NORMAL)
    same(ahead[:, 0], torch.tensor([0.7, *NORMAL.tolist(), 0.0], dtype=torch.float64))


def test_square_of_the_distance_from_a_point():
    same(square_distance_jet(POINTS, CENTRE), jet(lambda x: (x - CENTRE).square().sum(-1)))
