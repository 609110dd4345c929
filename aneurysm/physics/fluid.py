"""Blood: its density and viscosity, the speed at which arteries run it, and the units that make that one."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

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
        return values * trailing(self.units[quantity], values.ndim)

    def from_si(self, quantity: Quantity, values: Float[Tensor, "*v"]) -> Float[Tensor, "*v"]:
        """SI values, (b, ...), made dimensionless."""
        return values / trailing(self.units[quantity], values.ndim)


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


def trailing(quantity: float | Tensor, ndim: int) -> float | Tensor:
    """One number for all, per row (b,) or per point (b, n), made to multiply what has ndim axes."""
    if isinstance(quantity, Tensor):
        return quantity.reshape(*quantity.shape, *(1,) * (ndim - quantity.ndim))
    return quantity
