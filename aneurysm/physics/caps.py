"""Inflow and outflow: what drives the blood through a crop.

With walls that hold the blood and nothing that moves it, standing blood obeys the equations exactly. At
every cap, a cross-section where a vessel leaves the crop, the flow is therefore prescribed: its direction
along the vessel, its profile that of the wall function, its amount from the vessel tree. The velocity is
u = phi ((1 - chi) sum_k A_k b_k t_k + chi (V + N)): phi is zero on the wall, b_k is 1 on cap k and falls to
0 within three radii, chi is zero on all caps, and the network N is free in between. V runs along the
centrelines: it is where the network starts from, which else has to invent all the flow between the caps
first. Without a guide to say so, V is the sum over the caps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from aneurysm.physics.jets import autograd_jet, composed_jet, plane_jet, product_jet, square_distance_jet

FULL: Final = 1.3  # in cap radii from its centre: the cap's influence is full up to here
GONE: Final = 3.0  # and has ended here
BACKGROUND: Final = 0.25  # weight of standing blood beside the guide: a sac, three radii off, starts slow
RISE: Final = 2.0  # in cap radii along the vessel: where the network has become free


@dataclass(frozen=True, eq=False)
class Cap:
    """One end of the fluid domain, any unit of length."""

    centre: Float[np.ndarray, "3"]
    inward: Float[np.ndarray, "3"]  # unit, into the domain
    radius: float  # of the smallest circle around the centre that holds the lumen there
    strength: float  # A: speed along `inward` where the wall function is 1, in U; negative at an outlet

    def placed(self, origin: np.ndarray, frame: np.ndarray, unit: float) -> "Cap":
        """The cap in other axes (rows of `frame`) and another unit of length."""
        return replace(
            self,
            centre=(self.centre - origin) @ frame.T / unit,
            inward=self.inward @ frame.T,
            radius=self.radius / unit,
        )

    def behind(self, points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, "n"]:
        """Whether points are outside the domain because of this cap; other vessels cross its plane freely."""
        away = points - self.centre
        return (away @ self.inward < 0) & (np.linalg.norm(away, axis=1) < GONE * self.radius)


@dataclass(frozen=True, eq=False)
class Guide:
    """Where blood is expected to run: points along the centrelines of a domain, any unit of length."""

    position: Float[np.ndarray, "g 3"]
    velocity: Float[np.ndarray, "g 3"]  # where the wall function is 1, U
    radius: Float[np.ndarray, "g"]  # of the vessel

    def placed(self, origin: np.ndarray, frame: np.ndarray, unit: float) -> "Guide":
        """The guide in other axes (rows of `frame`) and another unit of length."""
        return Guide((self.position - origin) @ frame.T / unit, self.velocity @ frame.T, self.radius / unit)

    def jet(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "5 n 3"]:
        """Jets of V: the velocities beside a point, weighted by nearness, falling to 0 away from them all."""
        position, velocity, radius = (
            torch.as_tensor(part, dtype=points.dtype) for part in vars(self).values()
        )

        def mean(x: Tensor) -> Tensor:
            square = (x[:, None] - position).square().sum(-1)  # (n, g)
            weight = torch.exp(-square / (2 * radius**2))
            return weight @ velocity / (weight.sum(1, keepdim=True) + BACKGROUND)

        return autograd_jet(mean, points).detach()


def drive(
    points: Float[Tensor, "n 3"], caps: Sequence[Cap], guide: Guide | None = None
) -> tuple[Float[Tensor, "5 n"], Float[Tensor, "5 n 3"]]:
    """Jets of chi and of (1 - chi) sum_k A_k b_k t_k + chi V at points in the unit and axes of the caps.

    Without caps chi is 1; without caps and guide nothing is prescribed.
    """
    free = torch.zeros(5, len(points), dtype=points.dtype)
    free[0] = 1
    prescribed = torch.zeros(5, len(points), 3, dtype=points.dtype)
    for cap in caps:
        centre, inward = (torch.as_tensor(part, dtype=points.dtype) for part in (cap.centre, cap.inward))
        near = _near(square_distance_jet(points, centre), cap.radius)
        prescribed = prescribed + cap.strength * near[..., None] * inward
        held = product_jet(near, _held(plane_jet(points, centre, inward), RISE * cap.radius))
        held[0] -= 1  # chi_k = 1 - held
        free = product_jet(free, -held)
    if guide is not None:
        # V takes over from the caps where the network does; beside them both would be counted.
        prescribed = prescribed + product_jet(free[..., None], guide.jet(points) - prescribed)
    return free, prescribed


def _near(square: Tensor, radius: float) -> Tensor:
    """b(|x - c|^2): 1 up to FULL radii, 0 from GONE radii on, with three continuous derivatives between."""
    low, high = (FULL * radius) ** 2, (GONE * radius) ** 2
    t = ((square[0] - low) / (high - low)).clamp(0, 1)
    value = 1 - t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
    first = -140 * (t * (1 - t)) ** 3 / (high - low)
    second = -420 * (t * (1 - t)) ** 2 * (1 - 2 * t) / (high - low) ** 2
    return composed_jet(square, value, first, second)


def _held(depth: Tensor, length: float) -> Tensor:
    """(1 - d / length)^4: 1 on the cap, 0 from `length` on; its slope on the cap leaves the network room."""
    s = (1 - depth[0] / length).clamp(min=0)
    return composed_jet(depth, s**4, -4 * s**3 / length, 12 * s**2 / length**2)
