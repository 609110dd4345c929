"""How far a velocity and pressure field is from obeying mass and momentum conservation.

Lengths are measured in vessel radii R, speeds in the mean speed U of the parent vessel and pressure in
rho U^2, so every term of the equations is of order one in any vessel; in SI units the same terms span five
orders of magnitude and training stalls.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

BLOOD_DENSITY = 1060.0  # kg/m^3
BLOOD_VISCOSITY = 0.0035  # Pa s, Newtonian limit at the shear rates of large arteries
WALL_SHEAR = 1.5  # Pa, arteries remodel towards this value


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


def navier_stokes_residual(
    velocity: Float[Tensor, "5 b n 3"], pressure: Float[Tensor, "5 b n"], reynolds: Float[Tensor, "b"]
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n 3"]]:
    """Dimensionless steady residuals of continuity and momentum from jets (value, gradient, Laplacian).

    div u = 0 and (u . grad) u + grad p - lap u / Re = 0, in units of U/R and U^2/R.
    """
    value, gradient, laplacian = (
        velocity[0],
        velocity[1:4],
        velocity[4],
    )  # gradient[j, ..., i] = d u_i / d x_j
    continuity = gradient.diagonal(dim1=0, dim2=-1).sum(-1)  # (b, n)
    convection = torch.einsum("bnj,jbni->bni", value, gradient)
    momentum = convection + pressure[1:4].movedim(0, -1) - laplacian / reynolds[:, None, None]
    return continuity, momentum


def dimensional_residual(
    network_output: Float[Tensor, "n 4"],
    coords: Float[Tensor, "n 3"],
    rho: float = BLOOD_DENSITY,
    mu: float | Viscosity = BLOOD_VISCOSITY,
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """Residuals of continuity and u, v, w momentum in SI units, by nested automatic differentiation.

    rho (u . grad) u + grad p - div(2 mu D) = 0 with D the symmetric part of grad u. In an incompressible
    fluid div(2 mu D) is mu lap u + 2 D grad mu; the second term is that of a viscosity that varies.

    The slow and obvious form that works for any differentiable network: 13 backward passes against one
    forward pass of `JetMLP`, and one more for a viscosity that depends on the shear rate, which needs all
    second derivatives and therefore this form.

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

    def gradient(field: Tensor) -> Tensor:
        # A field that does not depend on the coordinates has no graph: its derivative is 0.
        if not field.requires_grad:
            return torch.zeros_like(coords)
        (grad,) = torch.autograd.grad(field.sum(), coords, create_graph=True, allow_unused=True)
        return torch.zeros_like(coords) if grad is None else grad

    velocity = network_output[:, :3]
    first = [gradient(network_output[:, i]) for i in range(4)]  # each (n, 3)
    continuity = sum((first[i][:, i] for i in range(3)), torch.zeros_like(coords[:, 0]))
    strain = torch.stack(first[:3], dim=1)  # [:, i, j] = d u_i / d x_j
    strain = strain + strain.mT  # 2 D
    if callable(mu):
        # g = sqrt(2 D : D); its slope at rest is not defined, so rest is a shear of 1e-12/s
        local = mu((strain.square().sum((1, 2)) / 2 + 1e-24).sqrt())
        varying = torch.einsum("nij,nj->ni", strain, gradient(local))
    else:
        local, varying = torch.full_like(continuity, mu), torch.zeros_like(coords)
    momentum = []
    for i in range(3):
        convection = (velocity * first[i]).sum(1)
        laplacian = sum((gradient(first[i][:, j])[:, j] for j in range(3)), torch.zeros_like(convection))
        momentum.append(rho * convection + first[3][:, i] - local * laplacian - varying[:, i])
    u, v, w = momentum
    return continuity[:, None], u[:, None], v[:, None], w[:, None]


compute_navier_stokes_residuals = dimensional_residual  # the name under which the method paper lists it
