"""How far a velocity and pressure field is from obeying mass and momentum conservation.

Steady and incompressible: div u = 0 and rho (u . grad) u + grad p - div(2 mu D) = 0, D the symmetric part of
grad u. At constant viscosity the last term is mu lap u and a field's jets hold all that is needed; one that
follows the shear rate adds 2 D grad mu and needs every second derivative.

Networks are trained in the units of the vessel, `Scales`: every term is then of order one in any vessel; in
SI units the same terms span five orders of magnitude and training stalls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.jets import JetField, gradient, recorded_jet

BLOOD_DENSITY = 1060.0  # kg/m^3
BLOOD_VISCOSITY = 0.0035  # Pa s, Newtonian limit at the shear rates of large arteries
WALL_SHEAR = 1.5  # Pa, arteries remodel towards this value

Quantity = Literal["points", "velocity", "pressure", "continuity", "momentum", "wall_shear"]


@runtime_checkable
class Viscosity(Protocol):
    """A generalised-Newtonian fluid: a viscosity for every shear rate."""

    def __call__(self, shear_rate: Tensor) -> Tensor:
        """Dynamic viscosity in Pa s at shear rates in 1/s, elementwise and differentiable."""
        ...


@dataclass(frozen=True)
class CarreauYasuda:
    """Shear-thinning blood: mu = mu_inf + (mu_0 - mu_inf) (1 + (lambda g)^a)^((n - 1) / a) at shear rate g.

    Red cells clump where blood is slow, as in a sac: at 1/s it is five times as viscous as in an artery.
    With exponent a = 2 this is Carreau's model; the defaults are those of Cho and Kensey, Biorheology 28,
    241-262 (1991).

    Raises:
        ValueError: a parameter is not positive, or mu_0 is below mu_inf.
    """

    at_rest: float = 0.056  # mu_0, Pa s
    at_high_shear: float = 0.00345  # mu_inf, Pa s
    relaxation_s: float = 3.313  # lambda
    exponent: float = 2.0  # a
    power: float = 0.3568  # n, below 1: thinning

    def __post_init__(self) -> None:
        if min(vars(self).values()) <= 0 or self.at_rest < self.at_high_shear:
            raise ValueError(f"Shear-thinning viscosities are positive and largest at rest, got {self}.")

    def __call__(self, shear_rate: Tensor) -> Tensor:
        thinning = (1 + (self.relaxation_s * shear_rate) ** self.exponent) ** (
            (self.power - 1) / self.exponent
        )
        return self.at_high_shear + (self.at_rest - self.at_high_shear) * thinning


@dataclass(frozen=True, eq=False)
class Fluid:
    """Density and dynamic viscosity, in kg/m^3 and Pa s or in any other consistent units."""

    density: float
    viscosity: float | Float[Tensor, "b"] | Viscosity  # one for all, per row of the batch, or per shear rate

    @classmethod
    def blood(cls) -> "Fluid":
        """Newtonian blood in SI units."""
        return cls(BLOOD_DENSITY, BLOOD_VISCOSITY)

    @classmethod
    def dimensionless(cls, reynolds: float | Float[Tensor, "b"]) -> "Fluid":
        """Any Newtonian fluid in the units of `Scales`: density 1, viscosity 1 / Re."""
        return cls(1.0, 1 / reynolds)


@dataclass(frozen=True, eq=False)
class Scales:
    """Units in which the flow of a vessel is dimensionless and of order one; numbers, or one per row (b,)."""

    radius_m: float | Float[Tensor, "b"]  # R, m
    speed_m_s: float | Float[Tensor, "b"]  # U, m/s: the mean speed in the parent vessel
    density: float = BLOOD_DENSITY  # rho, kg/m^3
    viscosity: float = BLOOD_VISCOSITY  # mu, Pa s

    @property
    def reynolds(self) -> float | Float[Tensor, "b"]:
        """Re = rho U R / mu, on the radius."""
        return self.density * self.speed_m_s * self.radius_m / self.viscosity

    @property
    def units(self) -> dict[Quantity, float | Float[Tensor, "b"]]:
        """What 1 in dimensionless form is in SI."""
        rate, pressure = self.speed_m_s / self.radius_m, self.density * self.speed_m_s**2
        return {
            "points": self.radius_m,  # x = R x*, m
            "velocity": self.speed_m_s,  # u = U u*, m/s
            "pressure": pressure,  # p = rho U^2 p*, Pa
            "continuity": rate,  # div u = U/R (div u)*, 1/s
            "momentum": pressure / self.radius_m,  # force per volume, rho U^2/R, Pa/m
            "wall_shear": self.viscosity * rate,  # tau = mu U/R tau* with tau* = du*/dn*, Pa
        }

    def to_si(self, quantity: Quantity, values: Float[Tensor, "*v"]) -> Float[Tensor, "*v"]:
        """Dimensionless values, (b, ...), in SI units."""
        return values * _trailing(self.units[quantity], values.ndim)

    def from_si(self, quantity: Quantity, values: Float[Tensor, "*v"]) -> Float[Tensor, "*v"]:
        """SI values, (b, ...), made dimensionless."""
        return values / _trailing(self.units[quantity], values.ndim)


def murray_speed(
    radius_mm: Float[Tensor, "b"], mu: float = BLOOD_VISCOSITY, wall_shear_pa: float = WALL_SHEAR
) -> Float[Tensor, "b"]:
    """Mean speed in m/s of a vessel that keeps its wall shear stress constant: U = tau_w R / (4 mu).

    Source: Murray, PNAS 12, 1926; Poiseuille's wall shear tau_w = 4 mu U / R.
    """
    return wall_shear_pa * radius_mm * 1e-3 / (4 * mu)


def reynolds_number(
    radius_mm: Float[Tensor, "b"],
    rho: float = BLOOD_DENSITY,
    mu: float = BLOOD_VISCOSITY,
    wall_shear_pa: float = WALL_SHEAR,
) -> Float[Tensor, "b"]:
    """Reynolds number rho U R / mu on the radius, with Murray's speed: 32 at R = 1 mm, 130 at 2 mm."""
    return rho * murray_speed(radius_mm, mu, wall_shear_pa) * radius_mm * 1e-3 / mu


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A coordinate network at given latent codes: a flow as a function of position alone, and its jets."""

    network: JetMLP
    latent: Float[Tensor, "b z"]

    def jet(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "5 b n 4"]:
        return self.network(points.to(self.network.dtype), self.latent.to(self.network.dtype))

    def __call__(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 4"]:
        return self.network.values(points.to(self.network.dtype), self.latent.to(self.network.dtype))


def flow_residual(
    field: Callable[[Tensor], Tensor] | JetField,
    points: Float[Tensor, "b n 3"],
    fluid: Fluid,
    *,
    form: str = "auto",
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n 3"]]:
    """Residuals of continuity and momentum of any coordinate network, in the units of points and fluid.

    Differentiable in what the field depends on, the fluid and the points. In double precision whatever
    autocast says: half precision has no second derivatives.

    Args:
        field: (b, n, 3) to (u, v, w, p) (b, n, 4), each point by itself (no batch normalisation) and in
            double precision (`network.double()`); or an object with exact jets of these, as `Conditioned`.
        points: single or double precision.
        form: "jets", of a `JetField` at a quarter of the time; "autograd", nested differentiation in 13
            backward passes; "auto", jets where field and fluid allow.

    Raises:
        ValueError: the form does not exist or does not fit field or fluid; a wrong shape; half precision.
    """
    mu = fluid.viscosity
    if form == "auto":
        form = "jets" if isinstance(field, JetField) and not callable(mu) else "autograd"
    shape = (*points.shape[:2], 4)
    with torch.autocast(points.device.type, enabled=False):
        x = _double("points", points, points.shape)
        if form == "jets":
            if not isinstance(field, JetField):
                raise ValueError(
                    f"{type(field).__name__} has no jets: give it a method jet(points) -> (5, b, n, 4), wrap "
                    "a JetMLP as Conditioned(network, latent), or ask for form='autograd'."
                )
            if callable(mu):
                raise ValueError(
                    "A viscosity that follows the shear rate needs second derivatives that jets do not hold: "
                    "ask for form='autograd'."
                )
            jet = _double("jets", field.jet(x), (5, *shape))
            return _balance(jet[..., :3], jet[1:4, ..., 3].movedim(0, -1), fluid.density, mu)
        if form != "autograd" or not callable(field) or torch.is_inference_mode_enabled():
            raise ValueError(
                f"form is 'auto', 'jets' or 'autograd', got {form!r}; autograd needs a field that can be "
                f"called, got {type(field).__name__}, and torch.no_grad() instead of inference mode."
            )
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            continuity, momentum = _recorded_residual(_double("flow", field(x), shape), x, fluid)
    return (continuity, momentum) if recording else (continuity.detach(), momentum.detach())


def navier_stokes_residual(
    velocity: Float[Tensor, "5 b n 3"], pressure: Float[Tensor, "5 b n"], reynolds: Float[Tensor, "b"]
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n 3"]]:
    """Dimensionless steady residuals of continuity and momentum from jets (value, gradient, Laplacian).

    div u = 0 and (u . grad) u + grad p - lap u / Re = 0, in units of U/R and U^2/R.
    """
    continuity, convection = _transport(velocity)
    return continuity, convection + pressure[1:4].movedim(0, -1) - velocity[4] / reynolds[:, None, None]


def dimensional_residual(
    network_output: Float[Tensor, "n 4"],
    coords: Float[Tensor, "n 3"],
    rho: float = BLOOD_DENSITY,
    mu: float | Viscosity = BLOOD_VISCOSITY,
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """Residuals of continuity and u, v, w momentum in SI units of a flow that is already computed.

    Args:
        network_output: (u, v, w) in m/s and p in Pa, computed from `coords` point by point.
        coords: (x, y, z) in m, with requires_grad.
        rho: density in kg/m^3.
        mu: dynamic viscosity in Pa s, or what gives it at a shear rate, as `CarreauYasuda`.

    Raises:
        ValueError: when `coords` does not require a gradient.
    """
    if not coords.requires_grad:
        raise ValueError("coords must require a gradient: call coords.requires_grad_() before the network.")
    continuity, momentum = _recorded_residual(network_output, coords, Fluid(rho, mu))
    u, v, w = momentum.split(1, dim=1)
    return continuity[:, None], u, v, w


compute_navier_stokes_residuals = dimensional_residual  # the name under which the method paper lists it


def _recorded_residual(
    flow: Float[Tensor, "*b 4"], x: Float[Tensor, "*b 3"], fluid: Fluid
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3"]]:
    """The plain form: 12 backward passes for the velocity's jets, one for the pressure, one for mu(x)."""
    velocity, push, mu = recorded_jet(flow[..., :3], x), gradient(flow[..., 3], x), fluid.viscosity
    if not callable(mu):
        return _balance(velocity, push, fluid.density, mu)
    slope = velocity[1:4].movedim(0, -1)
    strain = slope + slope.mT  # 2 D
    # g = sqrt(2 D : D); its slope at rest is not defined, so rest is a shear of 1e-12/s
    local = mu((strain.square().sum((-2, -1)) / 2 + 1e-24).sqrt())
    continuity, momentum = _balance(velocity, push, fluid.density, local)
    return continuity, momentum - torch.einsum("...ij,...j->...i", strain, gradient(local, x))


def _balance(
    velocity: Float[Tensor, "5 *b 3"], push: Float[Tensor, "*b 3"], density: float, mu: float | Tensor
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3"]]:
    """Both residuals, but for 2 D grad mu, from the velocity's jets and the pressure's gradient."""
    continuity, convection = _transport(velocity)
    return continuity, density * convection + push - _trailing(mu, push.ndim) * velocity[4]


def _transport(velocity: Float[Tensor, "5 *b 3"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3"]]:
    """div u and (u . grad) u."""
    slope = velocity[1:4]  # slope[j, ..., i] = d u_i / d x_j
    return slope.diagonal(dim1=0, dim2=-1).sum(-1), torch.einsum("...j,j...i->...i", velocity[0], slope)


def _trailing(quantity: float | Tensor, ndim: int) -> float | Tensor:
    """One number for all, per row (b,) or per point (b, n), made to multiply what has ndim axes."""
    if isinstance(quantity, Tensor):
        return quantity.reshape(*quantity.shape, *(1,) * (ndim - quantity.ndim))
    return quantity


def _double(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.shape != shape or values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The {name} must be {tuple(shape)} in single or double precision but got {tuple(values.shape)} "
            f"in {values.dtype}."
        )
    return values.double()
