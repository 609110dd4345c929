"""How far a velocity and pressure field is from obeying mass and momentum conservation.

Steady and incompressible: div u = 0 and rho (u . grad) u + grad p - div(2 mu D) = 0, D the symmetric part of
grad u. At constant viscosity the last term is mu lap u and a field's jets hold all that is needed; one that
follows the shear rate adds 2 D grad mu and needs every second derivative.

Networks are trained in the units of the vessel, `Scales`: every term is then of order one in any vessel; in
SI units the same terms span five orders of magnitude and training stalls.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from aneurysm.physics.fluid import BLOOD_DENSITY, BLOOD_VISCOSITY, Fluid, Viscosity, trailing
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.jets import JetField, gradient, recorded_jet


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
    return continuity, density * convection + push - trailing(mu, push.ndim) * velocity[4]


def _transport(velocity: Float[Tensor, "5 *b 3"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3"]]:
    """div u and (u . grad) u."""
    slope = velocity[1:4]  # slope[j, ..., i] = d u_i / d x_j
    return slope.diagonal(dim1=0, dim2=-1).sum(-1), torch.einsum("...j,j...i->...i", velocity[0], slope)


def _double(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.shape != shape or values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The {name} must be {tuple(shape)} in single or double precision but got {tuple(values.shape)} "
            f"in {values.dtype}."
        )
    return values.double()
