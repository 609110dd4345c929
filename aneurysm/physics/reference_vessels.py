"""Vessels given by formulas: tubes, bends, sacs and forks on which the flow is known or can be computed.

Each is a wall function (see `lumen.Wall`) in units of the tube's radius, so that one millimetre of the code
that reads it is one radius R.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from aneurysm.physics.caps import Cap, drive
from aneurysm.physics.flow_domain import Domain
from aneurysm.physics.flow_points import FlowPoints, Sites
from aneurysm.physics.jets import autograd_jet, product_jet
from aneurysm.physics.sections import Path, cut_across, star_quadrature

DAUGHTER = 0.5 ** (1 / 3)  # radius of two equal daughters by Murray's law, 1 = 2 r^3
FILLET = 3.0  # sharpness of the edges of a fork, 1/R
_CHUNK = 4096  # points whose derivatives are taken at a time


@dataclass(frozen=True, eq=False)
class FormulaWall:
    """A wall function given as a function of position.

    phi: (n, 3) float64 to (n,), smooth, positive inside and 0 on the wall.
    low, high: corners of a box that holds the lumen.
    step_mm: size of its smallest detail.
    """

    phi: Callable[[Tensor], Tensor]
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    step_mm: float = 0.2

    def jet(self, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 5"]:
        """phi, its gradient and its Laplacian, by automatic differentiation."""
        parts = [
            autograd_jet(lambda x: self.phi(x)[..., None], torch.as_tensor(part))[..., 0].detach().T.numpy()
            for part in np.array_split(points_mm, max(1, len(points_mm) // _CHUNK))
        ]
        return np.concatenate(parts)

    def interpolate(self, points_mm: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "..."]:
        """phi."""
        with torch.no_grad():
            return self.phi(torch.as_tensor(points_mm)).numpy()

    def scatter(self, count: int, rng: np.random.Generator) -> Float[np.ndarray, "count 3"]:
        """Points uniform in the box and a step around it, so that both sides of the wall are met."""
        return rng.uniform(np.subtract(self.low, self.step_mm), np.add(self.high, self.step_mm), (count, 3))


def tube(half_length: float = 3.0) -> FormulaWall:
    """A straight tube of radius 1 along the first axis; phi = 1 - r^2, so 2 phi is Poiseuille's flow."""
    edge = (half_length, 1.0, 1.0)
    return FormulaWall(lambda x: 1 - x[..., 1] ** 2 - x[..., 2] ** 2, _negative(edge), edge)


def tube_with_sac(
    half_length: float = 4.0, sac_radius: float = 1.3, distance: float = 2.04, rounding: float = 0.1
) -> FormulaWall:
    """The tube with a sphere of `sac_radius` whose centre lies `distance` from the axis along the third axis.

    The two are joined by the R-disjunction a + b + sqrt(a^2 + b^2 + `rounding`^2). With no rounding the rim
    of the neck is a sharp edge, where the wall function has no second derivative.
    """

    def phi(x: Tensor) -> Tensor:
        straight = 1 - x[..., 1] ** 2 - x[..., 2] ** 2
        square = x[..., 0] ** 2 + x[..., 1] ** 2 + (x[..., 2] - distance) ** 2
        return _either(straight, (sac_radius**2 - square) / (2 * sac_radius), rounding)

    width = max(1.0, sac_radius)
    return FormulaWall(phi, (-half_length, -width, -1.0), (half_length, width, distance + sac_radius))


def bend(curvature: float, half_length: float = 3.0) -> FormulaWall:
    """A tube of radius 1 around an arc of radius 1 / `curvature` in the plane of the first two axes.

    The arc starts along the first axis and bends towards the second; its middle is the origin.
    """
    arc = 1 / curvature

    def phi(x: Tensor) -> Tensor:
        outward = torch.hypot(x[..., 0], x[..., 1] - arc) - arc
        return 1 - outward**2 - x[..., 2] ** 2

    high = arc - (arc - 1) * np.cos(half_length * curvature)
    return FormulaWall(phi, (-half_length - 1, -1.0, -1.0), (half_length + 1, high + 1, 1.0))


def fork(angle_deg: float = 35.0, daughter: float = DAUGHTER, length: float = 4.0) -> FormulaWall:
    """A parent tube of radius 1 along the first axis that divides at the origin into two daughters.

    The daughters lie in the plane of the first two axes, `angle_deg` off the parent's direction to either
    side. The three are blended smoothly; away from the fork each is a round tube with a parabolic phi.
    """
    arms = _arms(angle_deg)

    def phi(x: Tensor) -> Tensor:
        def branch(direction: np.ndarray, radius: float) -> Tensor:
            axis = torch.as_tensor(direction, dtype=x.dtype)
            along = (x @ axis)[..., None]
            # A rounded end: the tube starts at the fork, a little back so that the parts overlap.
            nearest = torch.nn.functional.softplus(along * 3) / 3
            return (radius**2 - (x - nearest * axis).square().sum(-1)) / radius

        parts = [branch(np.array([-1.0, 0, 0]), 1.0), *(branch(arm, daughter) for arm in arms)]
        return torch.logsumexp(FILLET * torch.stack(parts), dim=0) / FILLET

    side = length * np.sin(np.deg2rad(angle_deg)) + 1
    return FormulaWall(phi, (-length, -side, -1.2), (length, side, 1.2))


def straight_domain(wall: FormulaWall, half_length: float, caps: bool = True) -> Domain:
    """The fluid of a tube along the first axis between two caps with Poiseuille's profile and flux pi."""
    along = np.linspace(-half_length, half_length, 61)
    position = along[:, None] * np.array([1.0, 0, 0])
    tangent = np.tile([1.0, 0, 0], (len(along), 1))
    path = Path(along + half_length, position, tangent, np.ones(len(along)))
    ends = [(-1.0, 2.0), (1.0, -2.0)] if caps else []
    made = tuple(
        Cap(np.array([side * half_length, 0, 0]), np.array([-side, 0.0, 0]), 1.0, strength)
        for side, strength in ends
    )
    return Domain(wall, path, made, position, tangent, np.ones(len(along)), 1.0)


def bend_domain(curvature: float, half_length: float = 3.0, caps: bool = True) -> Domain:
    """The fluid of a bend between two caps with Poiseuille's profile and flux pi."""
    angle = np.linspace(-half_length, half_length, 61) * curvature
    zero = np.zeros_like(angle)
    position = np.stack([np.sin(angle), 1 - np.cos(angle), zero], axis=1) / curvature
    tangent = np.stack([np.cos(angle), np.sin(angle), zero], axis=1)
    path = Path(angle / curvature + half_length, position, tangent, np.ones(len(angle)))
    ends = (Cap(position[0], tangent[0], 1.0, 2.0), Cap(position[-1], -tangent[-1], 1.0, -2.0))
    made = ends if caps else ()
    return Domain(bend(curvature, half_length), path, made, position, tangent, np.ones(len(angle)), 1.0)


def fork_domain(angle_deg: float = 35.0, daughter: float = DAUGHTER, length: float = 4.0) -> Domain:
    """The fluid of a fork between three caps: flux pi comes in, each daughter takes half of it.

    The path runs from the parent into the first daughter.
    """
    wall = fork(angle_deg, daughter, length)
    run = np.linspace(0, length, 41)[:, None]
    parent = (run - length) * np.array([1.0, 0, 0])
    stems = [parent, *(run * arm for arm in _arms(angle_deg))]
    ways = [np.array([1.0, 0, 0]), *_arms(angle_deg)]
    amount, radius = (1.0, 0.5, 0.5), (1.0, daughter, daughter)
    caps = [_cap(wall, stems[0][0], ways[0], 1.0, np.pi)]
    caps += [_cap(wall, stems[k][-1], -ways[k], daughter, -np.pi / 2) for k in (1, 2)]
    tangent = [np.tile(way, (len(run), 1)) for way in ways]
    path = Path(
        np.concatenate([run[:, 0], length + run[1:, 0]]),
        np.concatenate([stems[0], stems[1][1:]]),
        np.concatenate([tangent[0], tangent[1][1:]]),
        np.repeat(radius[:2], [len(run), len(run) - 1]),
    )
    flux = np.repeat(amount, len(run))
    return Domain(wall, path, tuple(caps), np.concatenate(stems), np.concatenate(tangent), flux, 1.0)


def sites_at(domain: Domain, flow: FlowPoints, points: Float[np.ndarray, "n 3"]) -> Sites:
    """Any places of a domain, in its own axes, in the axes and units of a flow that was drawn from it."""
    origin, frame, radius = _placing(flow)
    jet = torch.as_tensor(domain.wall.jet(points))
    slope = jet[:, 1:4] @ frame.T * radius
    position = (torch.as_tensor(points) - origin) @ frame.T / radius
    free, prescribed = drive(position, _placed_caps(domain, flow))
    wall = torch.cat((jet[:, :1], slope, jet[:, 4:] * radius**2), dim=1)
    return Sites(position[None], wall[None], free.T[None], prescribed.movedim(0, 1)[None])


def prescribe(sites: Sites, domain: Domain, flow: FlowPoints, profile: Callable[[Tensor], Tensor]) -> Sites:
    """The same places with caps that ask for a given velocity instead of a multiple of phi.

    Args:
        profile: (n, 3) in the domain's axes to the velocity over phi there, U; differentiable.
    """
    origin, frame, radius = _placing(flow)
    position = sites.position[0]
    asked = autograd_jet(lambda x: profile(origin + radius * x @ frame) @ frame.T, position).detach()
    total = torch.zeros_like(asked)
    for cap in _placed_caps(domain, flow):
        _, pushed = drive(position, [replace(cap, strength=1.0)])
        near = pushed @ torch.as_tensor(cap.inward)
        total = total + product_jet(near[..., None], asked)
    return replace(sites, prescribed=total.movedim(0, 1)[None])


def _placing(flow: FlowPoints) -> tuple[Tensor, Tensor, float]:
    """Origin, axes and unit: x = origin + radius * placed @ frame."""
    return flow.origin_mm[0], flow.frame[0], float(flow.radius_mm[0])


def _placed_caps(domain: Domain, flow: FlowPoints) -> list[Cap]:
    origin, frame, radius = _placing(flow)
    return [cap.placed(origin.numpy(), frame.numpy(), radius) for cap in domain.caps]


def _cap(wall: FormulaWall, centre: np.ndarray, inward: np.ndarray, radius: float, flux: float) -> Cap:
    """A cap through which `flux` in U R^2 comes in, with the profile of the wall function."""
    star = cut_across(wall, centre[None], inward[None], np.array([radius]), rays=32)
    position, area = star_quadrature(*star[:3])
    return Cap(centre, inward, float(star[2].max()), flux / float(wall.interpolate(position[0]) @ area[0]))


def _arms(angle_deg: float) -> list[np.ndarray]:
    """Unit directions of a fork's daughters."""
    angle = np.deg2rad(angle_deg)
    return [np.array([np.cos(angle), side * np.sin(angle), 0.0]) for side in (1, -1)]


def _either(a: Tensor, b: Tensor, rounding: float) -> Tensor:
    """Positive where a or b is: Rvachev's disjunction, with its edge rounded."""
    return a + b + torch.sqrt(a**2 + b**2 + rounding**2 + 1e-12)


def _negative(edge: tuple[float, float, float]) -> tuple[float, float, float]:
    return (-edge[0], -edge[1], -edge[2])
