"""From a vessel lumen to a scan: tissue contrast, inflow, point spread, coil shading and noise."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.ndimage import gaussian_filter

from aneurysm.data.phantom.head import HeadGeometry, head_tissue, smooth_noise, vessel_sheath

__all__ = ["HeadGeometry", "simulate_image"]


@dataclass(frozen=True)
class Contrast:
    """Mean signal of each tissue and of flowing arterial blood, before the random gain of a scan."""

    white: float
    grey: float
    fluid: float
    bone: float
    soft: float
    air: float
    vein: tuple[float, float]  # as a fraction of the artery's rise over grey matter
    artery: tuple[float, float]  # range over scans
    texture: float  # standard deviation of tissue signal


# CTA in HU; MR in units in which grey matter lies near 100.
CONTRAST: Final = {
    "CTA": Contrast(28, 38, 6, 950, 55, -950, (0.15, 0.75), (250, 450), 5),
    "MRA": Contrast(95, 105, 48, 22, 80, 6, (0.05, 0.2), (300, 460), 7),
    "T1": Contrast(130, 105, 42, 24, 95, 6, (0.8, 1.1), (210, 290), 6),
    "T2": Contrast(85, 112, 300, 22, 75, 6, (-0.95, -0.6), (8, 28), 7),
}


def simulate_image(
    lumen: np.ndarray,
    modality: str,
    spacing: np.ndarray | tuple[float, float, float],
    rng: np.random.Generator,
    *,
    head: HeadGeometry | None = None,
) -> np.ndarray:
    """A scan in which the lumen carries blood: CTA in HU, MR in arbitrary units of some hundred.

    Args:
        lumen: (d, h, w) float32 volume fraction of arterial lumen, sacs included, in 0..1, canonical axes.
        modality: CTA (bright vessels, bone brighter), MRA (time of flight: inflow bright, falling to
            distal and in slow flow), T1 (after contrast agent: bright), T2 (flow voids in bright fluid).
        spacing: (d, h, w) voxel size in mm.
        rng: every random choice comes from it, so that the same state gives the same image.
        head: where the skull lies; None puts the middle of the circle of Willis into the middle of the array.

    Returns:
        (d, h, w) float32.
    """
    if modality not in CONTRAST:
        raise ValueError(f"Contrast is known for {tuple(CONTRAST)}, got {modality!r}.")
    lumen = np.clip(np.asarray(lumen, np.float32), 0, 1)
    if lumen.ndim != 3:
        raise ValueError(f"The lumen is an array (d, h, w) but has shape {lumen.shape}.")
    size = np.asarray(spacing, np.float64)
    head = head or HeadGeometry(centre=tuple((n - 1) / 2 for n in lumen.shape))
    look = CONTRAST[modality]
    sheath = vessel_sheath(lumen, size)
    tissue = head_tissue(sheath, size, head, rng)
    artery = rng.uniform(*look.artery)
    vein = look.grey + rng.uniform(*look.vein) * (artery - look.grey)

    image = np.zeros(lumen.shape, np.float32)
    levels = {name: getattr(look, name) * rng.uniform(0.94, 1.06) for name in tissue if name != "vein"}
    for name, share in tissue.items():
        image += float(levels.get(name, vein)) * share
    blotches = smooth_noise(lumen.shape, tuple(2.5 / size), rng)
    living = 1 - tissue["air"] - tissue["bone"]
    image += np.float32(look.texture) * blotches * living
    image += tissue["bone"] * blotches * np.float32(0.3 * look.bone)  # marrow beside compact bone
    if modality in ("T1", "T2"):  # fat is bright in both; it lies in pads and planes, not in crumbs
        pads = smooth_noise(lumen.shape, tuple(7 / size), rng)
        pads = np.clip(2 * pads, 0, 1) * (1 - sheath)
        image += tissue["soft"] * pads * np.float32(90)
    blood = _blood(lumen, modality, artery, size, head, rng)
    image = image * (1 - lumen) + blood * lumen
    return _acquire(image, modality, artery, size, rng)


def _blood(
    lumen: np.ndarray,
    modality: str,
    artery: float,
    spacing: np.ndarray,
    head: HeadGeometry,
    rng: np.random.Generator,
) -> np.ndarray:
    """Signal of pure blood at every voxel, (d, h, w) float32."""
    patchy = smooth_noise(lumen.shape, tuple(9 / spacing), rng)
    # A wide lumen around a voxel means slow, swirling flow: near 1 in a large sac.
    width = rng.uniform(1.5, 1.9)
    slow = np.clip(gaussian_filter(lumen, width / spacing, truncate=2.5) * 2.2 - 0.9, 0, 1)
    if modality == "CTA":
        return np.float32(artery) * (1 + np.float32(0.05) * patchy)
    if modality == "MRA":
        # Blood that has travelled far in the slab is saturated: it enters from below (the neck).
        climb = (np.arange(lumen.shape[0], dtype=np.float32) - head.centre[0]) * spacing[0] + 25
        distal = np.exp(-np.clip(climb, 0, None) / rng.uniform(70, 140)).astype(np.float32)[:, None, None]
        signal = distal * (1 - np.float32(rng.uniform(0.25, 0.65)) * slow) * (1 + np.float32(0.08) * patchy)
        return np.float32(artery) * signal
    if modality == "T1":
        # Fast flow dephases, slow flow enhances fully.
        return np.float32(artery) * (1 - np.float32(0.12) * (1 - slow) + np.float32(0.08) * patchy)
    # Flow voids fill in where the flow is slow.
    return np.float32(artery) + np.float32(rng.uniform(10, 70)) * slow * (1 + np.float32(0.5) * patchy)


def _acquire(
    image: np.ndarray, modality: str, artery: float, spacing: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Point spread, coil shading and noise."""
    spread = rng.uniform(0.30, 0.50, size=3)  # standard deviation in mm
    spread[0] *= rng.uniform(1.0, 1.5)  # slices are thicker than pixels are wide
    image = gaussian_filter(image, spread / spacing, truncate=2.5)
    shape = image.shape
    if modality == "CTA":
        noise = rng.standard_normal(shape, dtype=np.float32)
        grain = rng.uniform(0.35, 0.6)  # voxels; the reconstruction kernel correlates CT noise
        noise = gaussian_filter(noise, grain, truncate=2.5)
        return image + noise * np.float32(rng.uniform(7, 17) / noise.std())
    shading = 1 + np.float32(rng.uniform(0.05, 0.2)) * smooth_noise(shape, tuple(45 / spacing), rng)
    sigma = np.float32(max(artery, 110.0) / rng.uniform(18, 45))
    real = image * shading + sigma * rng.standard_normal(shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(shape, dtype=np.float32)
    gain = np.float32(rng.uniform(1.0, 3.0))
    return gain * np.sqrt(real * real + imaginary * imaginary)
