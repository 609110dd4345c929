"""The head around the arteries: brain, cerebrospinal fluid, bone, air and veins as volume fractions.

Positions are (z, y, x) in mm (superior, anterior, right) from the suprasellar cistern, the middle of the
circle of Willis. The shapes are rough anatomy; what matters is that bone, fluid and veins lie where they
disturb a detector: under the carotids, around the circle, beside the middle cerebral arteries.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

TISSUES = ("white", "grey", "fluid", "bone", "soft", "air", "vein")


@dataclass(frozen=True)
class HeadGeometry:
    """Where the head lies around the voxels of a canonical array."""

    centre: tuple[float, float, float]  # (d, h, w) fractional index of the suprasellar cistern
    scale: float = 1.0  # 1 = adult mean


def smooth_noise(shape: tuple[int, ...], cell: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Smooth random field (d, h, w) float32, mean 0, standard deviation 0.6, with knots every `cell` voxels.

    A uniform cubic B-spline through normal values, along one axis after the other; built from element-wise
    operations only, so that the same generator gives the same bits whatever the number of threads.
    """
    knots = [int(np.ceil(n / c)) + 4 for n, c in zip(shape, cell, strict=True)]
    field = rng.standard_normal(knots, dtype=np.float32) * np.float32(0.6 / 0.332)  # 0.692 per axis, cubed
    for axis in (2, 1, 0):  # the last axis first: the arrays stay small for longest
        position = np.arange(shape[axis], dtype=np.float32) / np.float32(cell[axis])
        low = position.astype(np.intp)
        t = (position - low.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(3)])
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        total = field.take(low, axis) * (weights[0] / 6)
        for k in (1, 2, 3):
            total += field.take(low + k, axis) * (weights[k] / 6)
        field = total
    return field


def head_tissue(
    sheath: np.ndarray, spacing: np.ndarray, head: HeadGeometry, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Volume fractions of the tissues around the arteries, each (d, h, w) float32 in 0..1, with sum 1.

    Args:
        sheath: (d, h, w) float32 as from `vessel_sheath`; fluid fills it.
        spacing: (d, h, w) voxel size in mm.
    """
    shape = sheath.shape
    z, y, x = (
        ((np.arange(n, dtype=np.float32) - float(c)) * float(s / head.scale)).reshape(
            [-1 if a == axis else 1 for a in range(3)]
        )
        for axis, (n, c, s) in enumerate(zip(shape, head.centre, spacing, strict=True))
    )
    coarse = smooth_noise(shape, tuple(11 / spacing), rng)
    fine = smooth_noise(shape, tuple(4.5 / spacing), rng)
    soft = float(0.35 / spacing.min())  # half width of a tissue border in 1/mm: about one voxel

    def inside(signed_mm: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - signed_mm * soft, 0, 1)

    # Skull: two ellipsoids. The circle lies before and below the middle of the brain.
    ellipsoid = np.sqrt(((z - 28) / 72) ** 2 + ((y + 18) / 86) ** 2 + (x / 69) ** 2) * 72
    outer = inside(ellipsoid - 84)
    shell = inside(np.abs(ellipsoid - 75) - 3)
    # Skull base: a height map of anterior, middle and posterior fossa with sella, clivus and petrous ridges.
    base = _skull_base(y, x)
    depth = z - base - 3 * coarse - fine  # mm above the base
    bone = inside(np.abs(depth + 6) - 6) * np.clip(0.72 + 0.5 * fine, 0.25, 1)
    below = inside(depth)
    bone = np.maximum(bone, shell * (1 - below))
    cells = inside(np.sqrt((z + 24) ** 2 + (y - 14) ** 2 + x**2) - 12 - 3 * coarse)  # sphenoid sinus

    # Brain: sulci are thin sheets where two smooth fields cross zero, cortex lines them.
    fold = np.abs(coarse + 0.55 * fine)
    sulcus = np.clip(1.6 - fold * 22, 0, 1)
    grey = np.clip(1.5 - fold * 5.5, 0, 1)
    cistern = np.maximum(
        inside(np.sqrt(((z - 0.5) / 8) ** 2 + ((y + 1) / 14) ** 2 + (x / 13) ** 2) * 8 - 7 - 4 * coarse),
        inside(
            np.sqrt(((z + 16) / 18) ** 2 + ((y + 13) / 4.5) ** 2 + (x / 11) ** 2) * 4.5 - 4 - 2.5 * coarse
        ),
    )
    # The cleft between the hemispheres ends at the corpus callosum.
    callosum = np.sqrt((z - 14) ** 2 + (0.66 * (y + 22)) ** 2)
    fissure = inside(np.abs(x + coarse) - 0.9) * inside(-(z - 3)) * inside(20 - callosum)
    fluid = np.maximum.reduce([sulcus * (1 - cistern), cistern, fissure])

    # Vessels run in fluid, also where they would have met bone or brain. Their wall and the mucosa part them
    # from air: a dark lumen in a dark sinus would be seen by nobody.
    fluid = np.maximum(fluid, sheath)
    bone = bone * (1 - sheath)

    vein = _veins(shape, spacing, head, rng)
    fractions: dict[str, np.ndarray] = {}
    left = np.ones(shape, np.float32)
    for name, part in (
        ("air", (1 - outer) * (1 - sheath)),
        ("bone", bone),
        ("air", cells * below * (1 - sheath)),
        ("vein", vein * (1 - 0.8 * sheath)),
        ("soft", np.maximum(below, 1 - inside(ellipsoid - 72))),
        ("fluid", fluid),
        ("grey", grey),
    ):
        share = (left * part).astype(np.float32)
        fractions[name] = fractions[name] + share if name in fractions else share
        left = left - share
    fractions["white"] = left
    return fractions


def vessel_sheath(lumen: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Share of what surrounds arteries within about 2 mm, (d, h, w) float32 in 0..1: no bone, air or fat."""
    return np.clip(gaussian_filter(lumen, 1.1 / spacing, truncate=2.5) * 5, 0, 1)


def _skull_base(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Height (mm, 1 h w) of the inner skull base under each axial position."""
    side = np.abs(x)
    anterior = 1 / (1 + np.exp(-(y - 14) / 2.5))
    posterior = 1 / (1 + np.exp((y + 9) / 2.0))
    lateral = 1 / (1 + np.exp(-(side - 15) / 2.0))
    middle_fossa = -9 - 13 * lateral
    clivus = np.maximum(-8 + 1.1 * (y + 9), -46)  # falls to the foramen magnum
    ridge = 12 * np.exp(-(((y + 22 - 0.25 * side) / 5) ** 2)) * lateral
    return (
        (1 - anterior - posterior) * middle_fossa + anterior * (-8 - 2 * lateral) + posterior * clivus + ridge
    )


def _veins(
    shape: tuple[int, ...], spacing: np.ndarray, head: HeadGeometry, rng: np.random.Generator
) -> np.ndarray:
    """Volume fraction of a few veins and the cavernous sinuses: what enhances and is no artery."""
    distance = np.full(shape, 9.0, np.float32)  # mm
    centre = np.asarray(head.centre)
    starts = np.array(
        [[2, -6, 12], [2, -6, -12], [8, -8, 30], [8, -8, -30], [-10, 2, 12], [-10, 2, -12], [28, -10, 3]],
        float,
    )
    ends = np.array(
        [
            [16, -30, 5],
            [16, -30, -5],
            [-6, 12, 28],
            [-6, 12, -28],
            [-10, -8, 12],
            [-10, -8, -12],
            [12, -32, 1],
        ],
        float,
    )
    radii = rng.uniform([0.8, 0.8, 0.9, 0.9, 1.8, 1.8, 0.9], [1.3, 1.3, 1.5, 1.5, 3.0, 3.0, 1.4])
    shown = rng.random(len(starts)) < 0.75
    for start, end, radius, show in zip(starts, ends, radii, shown, strict=True):
        t = np.linspace(0, 1, 13)[:, None]
        bow = rng.normal(0, 3.5, (1, 3)) * np.sin(np.pi * t) + rng.normal(0, 1.2, (1, 3)) * np.sin(
            3 * np.pi * t
        )
        path = start * (1 - t) + end * t + bow + rng.normal(0, 1.5, (1, 3))
        if show:
            for point in np.concatenate([path[:-1] * (1 - f) + path[1:] * f for f in (0.0, 0.5)]):
                _ball(distance, centre + point * head.scale / spacing, radius, spacing)
    return np.clip(0.5 - distance / spacing.mean(), 0, 1).astype(np.float32)


def _ball(distance: np.ndarray, index: np.ndarray, radius: float, spacing: np.ndarray) -> None:
    """Lower the distance field (mm) to that of a ball at a fractional index, in its neighbourhood."""
    reach = (radius + 1.5) / spacing
    low = np.maximum(np.ceil(index - reach), 0).astype(int)
    high = np.minimum(np.floor(index + reach) + 1, distance.shape).astype(int)
    if (high <= low).any():
        return
    window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    z, y, x = np.ogrid[window]
    d, h, w = index
    gap = np.sqrt(((z - d) * spacing[0]) ** 2 + ((y - h) * spacing[1]) ** 2 + ((x - w) * spacing[2]) ** 2)
    np.minimum(distance[window], (gap - radius).astype(np.float32), out=distance[window])
