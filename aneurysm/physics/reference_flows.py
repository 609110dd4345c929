"""Flows that are known in closed form: what a residual, a network or a solver is measured against.

Every flow is a function of position, (..., 3) to (u, v, w, p) (..., 4), in any consistent units: SI, or
density 1 and viscosity 1 / Re. One that truly decays in time is frozen, and its steady residual is what the
missing time derivative leaves, decay mu u. Plain formulas: exact in double precision, differentiable.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from aneurysm.physics.fluid import Fluid


@dataclass(frozen=True, kw_only=True)
class ReferenceFlow:
    """A flow of a Newtonian fluid."""

    density: float = 1.0
    viscosity: float = 0.05

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        raise NotImplementedError

    @property
    def fluid(self) -> Fluid:
        """What `flow_residual` needs."""
        return Fluid(self.density, self.viscosity)

    @property
    def decay(self) -> float:
        """-lap u / u where the flow only holds if it decays in time, 0 if it is steady; 1/length^2."""
        return 0.0

    def residual(self, points: Float[Tensor, "*b 3"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3"]]:
        """Steady residuals of continuity and momentum, in closed form."""
        velocity = self(points)[..., :3]
        return torch.zeros_like(velocity[..., 0]), self.decay * self.viscosity * velocity


@dataclass(frozen=True, kw_only=True)
class Poiseuille(ReferenceFlow):
    """A round tube along x, radius R, mean speed U: u = 2 U (1 - r^2/R^2), p = -8 mu U x / R^2.

    Source: White, Viscous Fluid Flow, section 3-3.
    """

    radius: float = 1.0
    mean_speed: float = 1.0

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        x, y, z = points.unbind(-1)
        u = 2 * self.mean_speed * (1 - (y**2 + z**2) / self.radius**2)
        return torch.stack((u, 0 * u, 0 * u, -self.pressure_drop * x), dim=-1)

    @property
    def pressure_drop(self) -> float:
        """-dp/dx = 8 mu U / R^2; Pa/m."""
        return 8 * self.viscosity * self.mean_speed / self.radius**2

    @property
    def flux(self) -> float:
        """pi R^2 U; m^3/s."""
        return math.pi * self.radius**2 * self.mean_speed

    @property
    def wall_shear(self) -> float:
        """4 mu U / R; Pa."""
        return 4 * self.viscosity * self.mean_speed / self.radius


@dataclass(frozen=True, kw_only=True)
class PowerLawChannel:
    """Between plates at y = -H and H, of a fluid whose viscosity is K g^(n - 1) at shear rate g.

    u = n / (n + 1) (G / K)^(1/n) (H^(1 + 1/n) - |y|^(1 + 1/n)), p = -G x, no residual; smooth off the axis.

    Source: Bird, Stewart and Lightfoot, Transport Phenomena, section 8.3.
    """

    consistency: float = 0.01  # K, Pa s^n
    power: float = 0.8  # n, below 1: thinning
    pressure_drop: float = 3.0  # G, Pa/m
    half_height: float = 1.0  # H, m

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        x, y, _ = points.unbind(-1)
        order = 1 + 1 / self.power
        fastest = (self.pressure_drop / self.consistency) ** (1 / self.power) / order
        u = fastest * (self.half_height**order - y.abs() ** order)
        return torch.stack((u, 0 * u, 0 * u, -self.pressure_drop * x), dim=-1)

    @property
    def fluid(self) -> Fluid:
        """Density does not matter: nothing accelerates."""
        return Fluid(1000.0, lambda shear_rate: self.consistency * shear_rate ** (self.power - 1))


@dataclass(frozen=True, kw_only=True)
class Kovasznay(ReferenceFlow):
    """The wake behind a row of bars a length 1 apart, in a stream of speed 1 along x; steady.

    Source: Kovasznay, Proc. Cambridge Phil. Soc. 44, 58-62 (1948).
    """

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        half = self.density / self.viscosity / 2
        rate = half - math.sqrt(half**2 + 4 * math.pi**2)
        wake, wave = (rate * points[..., 0]).exp(), 2 * math.pi * points[..., 1]
        u, v = 1 - wake * wave.cos(), rate / (2 * math.pi) * wake * wave.sin()
        return torch.stack((u, v, 0 * u, self.density * (1 - wake**2) / 2), dim=-1)


@dataclass(frozen=True, kw_only=True)
class TaylorGreen(ReferenceFlow):
    """Square vortices in the plane: u = sin x cos y, v = -cos x sin y; they decay.

    Source: Taylor and Green, Proc. R. Soc. A 158, 499-521 (1937).
    """

    @property
    def decay(self) -> float:
        return 2.0

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        x, y, _ = points.unbind(-1)
        p = self.density * ((2 * x).cos() + (2 * y).cos()) / 4
        return torch.stack((x.sin() * y.cos(), -x.cos() * y.sin(), 0 * x, p), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Beltrami(ReferenceFlow):
    """The ABC flow, whose vorticity is its velocity, with chaotic streamlines; p = -rho |u|^2 / 2; decays.

    Source: Dombre et al., J. Fluid Mech. 167, 353-391 (1986).
    """

    a: float = 1.0
    b: float = math.sqrt(2 / 3)
    c: float = math.sqrt(1 / 3)

    @property
    def decay(self) -> float:
        return 1.0

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        (sx, sy, sz), (cx, cy, cz) = points.sin().unbind(-1), points.cos().unbind(-1)
        u, v, w = self.a * sz + self.c * cy, self.b * sx + self.a * cz, self.c * sy + self.b * cx
        return torch.stack((u, v, w, -self.density * (u**2 + v**2 + w**2) / 2), dim=-1)


@dataclass(frozen=True, kw_only=True)
class EthierSteinman(ReferenceFlow):
    """A decaying flow in which every term of the equations is at work in all three directions.

    Source: Ethier and Steinman, Int. J. Numer. Meth. Fluids 19, 369-375 (1994), at t = 0.
    """

    a: float = math.pi / 4
    d: float = math.pi / 2

    @property
    def decay(self) -> float:
        return self.d**2

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        a, d = self.a, self.d
        components, pressure = [], torch.zeros_like(points[..., 0])
        for turn in range(3):  # the three directions take turns
            x, y, z = points.roll(-turn, -1).unbind(-1)
            wave = (a * x).exp() * (a * y + d * z).sin() + (a * z).exp() * (a * x + d * y).cos()
            components.append(-a * wave)
            cross = 2 * (a * x + d * y).sin() * (a * z + d * x).cos() * (a * (y + z)).exp()
            pressure = pressure - self.density * a**2 / 2 * ((2 * a * x).exp() + cross)
        return torch.stack((*components, pressure), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Dean(ReferenceFlow):
    """A gently curved tube, to first order in its curvature: the residual is 0 up to order curvature^2.

    Tube radius and greatest speed are 1 and Re = rho / mu. The axis is the circle of radius 1 / k about the
    origin in the plane z = 0, s its arc length, X and Z the distances outwards and upwards from it and
    r^2 = X^2 + Z^2. Two vortices carry the fast middle of the flow outwards:

    u_X = k Re (1 - r^2) (4 - 23 r^2 + 7 r^4 + 6 X^2 (3 - r^2)) / 288,
    u_Z = k Re (1 - r^2) 6 X Z (3 - r^2) / 288,
    u_s = (1 - r^2) (1 + k X (-3/4 + Re^2 (19 - 21 r^2 + 9 r^4 - r^6) / 11520)),
    p / rho = -4 s / Re + k X (9 - 6 r^2 + 2 r^4) / 12, which jumps where s does, at x < 0 and y = 0.

    Source: Dean, Phil. Mag. 4, 208-223 (1927), there in polar coordinates of the cross-section.
    """

    curvature: float = 0.05  # k, tube radius over radius of the bend

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        x, y, z = points.unbind(-1)
        k, reynolds = self.curvature, self.density / self.viscosity
        out = (x**2 + y**2).sqrt() - 1 / k
        q = out**2 + z**2  # r^2
        arc = torch.atan2(y, x) / k
        p = self.density * (-4 / reynolds * arc + k * out * (9 - 6 * q + 2 * q**2) / 12)
        velocity = (1 - q)[..., None] * self.over_wall(points)
        return torch.cat((velocity, p[..., None]), dim=-1)

    def over_wall(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
        """Velocity over 1 - r^2, which is smooth up to the wall and beyond it."""
        x, y, z = points.unbind(-1)
        k, reynolds = self.curvature, self.density / self.viscosity
        from_origin = (x**2 + y**2).sqrt()
        out = from_origin - 1 / k
        q = out**2 + z**2  # r^2
        vortex = k * reynolds / 288
        outward = vortex * (4 - 23 * q + 7 * q**2 + 6 * out**2 * (3 - q))
        upward = vortex * 6 * out * z * (3 - q)
        skew = -3 / 4 + reynolds**2 * (19 - 21 * q + 9 * q**2 - q**3) / 11520
        along = 1 + k * out * skew
        cos, sin = x / from_origin, y / from_origin
        return torch.stack((outward * cos - along * sin, outward * sin + along * cos, upward), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Manufactured(ReferenceFlow):
    """u = x^2 y, v = y^2 z, w = z^2 x, p = x y z: obeys nothing, not even conservation of mass.

    Every entry of the residual differs from every other, so a transposed gradient or a lost term shows.
    Source of the method: Roache, J. Fluids Eng. 124, 4-10 (2002).
    """

    def __call__(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
        velocity = points**2 * points.roll(-1, -1)
        return torch.cat((velocity, points.prod(-1, keepdim=True)), dim=-1)

    def residual(self, points: Float[Tensor, "*b 3"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3"]]:
        """div u = 2 (xy + yz + zx); in x: rho (2 x^3 y^2 + x^2 y^2 z) + y z - 2 mu y, then cyclic."""
        x, y, z = points, points.roll(-1, -1), points.roll(-2, -1)
        convection = 2 * x**3 * y**2 + x**2 * y**2 * z
        return 2 * (x * y).sum(-1), self.density * convection + y * z - 2 * self.viscosity * y
