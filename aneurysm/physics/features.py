"""What a flow says about its vessel: numbers of one candidate, from its velocity at uniform points.

The residual alone does not tell an aneurysm from a bend; these do better. A sac slows and turns the flow.
"""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from aneurysm.physics.flow_field import SectionFlux

SLOW: Final = 0.1  # of the parent vessel's mean speed
LOW_SHEAR_PA: Final = 0.4  # below it endothelium turns to an inflamed state (Malek et al., JAMA 282, 1999)
POISEUILLE_ENERGY: Final = 4 / 3  # mean |u|^2 of the parabolic profile with mean speed 1

FEATURES: Final = (
    "log10_continuity",  # mean squared divergence, (U/R)^2
    "log10_momentum",  # mean squared momentum residual, (U^2/R)^2
    "coherence",  # mean cosine between flow and vessel direction
    "nematic_order",  # 1.5 (largest eigenvalue of <uu> - 1/3): 1 when all flow is on one axis
    "backflow_fraction",  # of points with flow against the vessel direction
    "slow_fraction",  # of points slower than a tenth of the mean speed
    "kinetic_energy_ratio",  # to a parabolic profile of the same flux
    "wall_shear_pa",  # mean wall shear stress
    "low_shear_fraction",  # of the wall under less than 0.4 Pa
    "flux_error",  # root mean square deviation over sections, in the parent's flux: how far to trust the rest
)


@torch.no_grad()
def flow_features(
    velocity: Float[Tensor, "b n 3"],
    tangent: Float[Tensor, "b n 3"],
    mass: Float[Tensor, "b n"],
    force: Float[Tensor, "b n"],
    wall_shear_pa: Float[Tensor, "b w"],
    through: SectionFlux,
) -> Float[Tensor, "b f"]:
    """FEATURES of every candidate.

    Args:
        velocity: at points uniform in the lumen, U.
        tangent: direction of the vessel there, downstream.
        mass, force: squared residuals there.
        wall_shear_pa: at places uniform on the wall, Pa.
        through: what passes the cross-sections.
    """
    speed = velocity.norm(dim=-1)
    direction = velocity / speed.clamp(min=1e-12)[..., None]
    along = (direction * tangent).sum(-1)
    spread = direction.mT @ direction / direction.shape[1]  # <uu>, (b, 3, 3)
    kind = speed.dtype
    return torch.stack(
        (
            mass.mean(1).clamp(min=1e-30).log10(),
            force.mean(1).clamp(min=1e-30).log10(),
            along.mean(1),
            1.5 * (torch.linalg.eigvalsh(spread)[:, -1] - 1 / 3),
            (along < 0).to(kind).mean(1),
            (speed < SLOW).to(kind).mean(1),
            speed.square().mean(1) / POISEUILLE_ENERGY,
            wall_shear_pa.mean(1),
            (wall_shear_pa < LOW_SHEAR_PA).to(kind).mean(1),
            through.error().sqrt(),
        ),
        dim=1,
    )
