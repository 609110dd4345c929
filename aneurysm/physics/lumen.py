"""A smooth function that is positive in the lumen, zero on the wall, and knows its exact derivatives.

A network times this function cannot slip along the wall. A distance transform would do that too, but its kink
on the centreline puts a spike into the Laplacian of every flow.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

CUT = 5.0  # in sigma: the Gaussian is dropped where it is below 4e-6 of its peak
LEVELS = (0.2, 0.6)  # of the smoothed indicator; outside them the wall would follow noise and not the vessel


@runtime_checkable
class Wall(Protocol):
    """A wall function phi: positive in the lumen, 0 on its wall; positions in mm in one set of axes."""

    @property
    def step_mm(self) -> float:
        """Size of the smallest detail."""
        ...

    def jet(self, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 5"]:
        """phi, its gradient per mm and its Laplacian per mm^2."""
        ...

    def interpolate(self, points_mm: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "..."]:
        """phi, as fast as can be."""
        ...

    def scatter(self, count: int, rng: np.random.Generator) -> Float[np.ndarray, "count 3"]:
        """Points uniform in a region that holds the lumen and some of what is beside it."""
        ...


@dataclass(frozen=True, eq=False)
class Lumen:
    """The wall function phi = (G_sigma * indicator - level) / (1 - level) of one crop.

    Positions are (d, h, w) in mm from the middle of the crop. phi grows from 0 on the wall to 1 deep inside,
    within about two sigma; beyond the edge of the crop the vessel continues as it left.
    """

    indicator: Float[np.ndarray, "d h w"]  # vessel probability of the chosen vessel, 0 elsewhere
    spacing_mm: Float[np.ndarray, "3"]  # of the indicator, coarser than the crop in wide vessels
    first_mm: Float[np.ndarray, "3"]  # position of voxel (0, 0, 0)
    sigma_mm: float
    level: float
    field: Float[np.ndarray, "d h w"]  # phi at the voxel centres
    inside: Bool[np.ndarray, "d h w"]  # phi > 0

    def jet(self, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 5"]:
        """phi, its gradient per mm and its Laplacian per mm^2 at any points, exactly.

        phi is a finite sum of Gaussians, one per voxel, so its derivatives are those of the Gaussian.
        """
        window, weights = [], []
        for axis in range(3):
            size = self.indicator.shape[axis]
            sigma = self.sigma_mm / self.spacing_mm[axis]
            reach = int(np.ceil(CUT * sigma))
            at = (points_mm[:, axis] - self.first_mm[axis]) / self.spacing_mm[axis]  # fractional voxel index
            offset = np.arange(-reach, reach + 1)
            index = np.rint(at).astype(int)[:, None] + offset  # (n, k)
            distance = (at[:, None] - index) / sigma
            bell = np.exp(-0.5 * distance**2)
            bell /= np.sqrt(2 * np.pi) * sigma
            scale = self.sigma_mm
            weights.append((bell, -distance * bell / scale, (distance**2 - 1) * bell / scale**2))
            window.append(np.clip(index, 0, size - 1))
        block = self.indicator[
            window[0][:, :, None, None], window[1][:, None, :, None], window[2][:, None, None, :]
        ]
        (d0, d1, d2), (h0, h1, h2), (w0, w1, w2) = weights

        def along_w(weight: np.ndarray) -> np.ndarray:
            return np.matmul(block, weight[:, None, :, None])[..., 0]  # (n, kd, kh)

        def reduce(plane: np.ndarray, weight_h: np.ndarray, weight_d: np.ndarray) -> np.ndarray:
            line = np.matmul(plane, weight_h[:, :, None])[..., 0]
            return np.einsum("nd,nd->n", line, weight_d)

        plane = along_w(w0)
        laplacian = reduce(plane, h0, d2) + reduce(plane, h2, d0) + reduce(along_w(w2), h0, d0)
        jet = np.stack(
            [
                reduce(plane, h0, d0) - self.level,
                reduce(plane, h0, d1),
                reduce(plane, h1, d0),
                reduce(along_w(w1), h0, d0),
                laplacian,
            ],
            axis=1,
        )
        return jet / (1 - self.level)

    @property
    def step_mm(self) -> float:
        """The coarsest side of a voxel."""
        return float(self.spacing_mm.max())

    def scatter(self, count: int, rng: np.random.Generator) -> Float[np.ndarray, "count 3"]:
        """Points uniform in the voxels that the lumen fills or its wall passes through."""
        cut = ndimage.binary_dilation(self.inside, structure=np.ones((3, 3, 3)))
        voxels = np.argwhere(cut)[rng.integers(int(cut.sum()), size=count)]
        return self.first_mm + (voxels + rng.uniform(-0.5, 0.5, (count, 3))) * self.spacing_mm

    def within(self, voxels: Bool[np.ndarray, "d h w"]) -> "Lumen":
        """The same wall function; `scatter` looks only at these voxels and beside them."""
        return replace(self, inside=self.inside & voxels)

    def interpolate(self, points_mm: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "..."]:
        """phi to first order between voxel centres: for searching the wall, where speed counts."""
        index = (points_mm - self.first_mm) / self.spacing_mm
        return ndimage.map_coordinates(self.field, np.moveaxis(index, -1, 0), order=1, mode="nearest")


def wall_function(
    vessel_prob: Float[np.ndarray, "d h w"],
    spacing_mm: Float[np.ndarray, "3"],
    sigma_mm: float,
    inside_mm: Float[np.ndarray, "m 3"],
) -> Lumen | None:
    """Builds the wall function of the vessel that holds most of the given points, or None where none does.

    Other vessels of the crop are removed: blood that no section drives would stand still and look diseased.
    The level is chosen so that smoothing keeps the volume of the vessel.

    Args:
        vessel_prob: 0..1; the vessel is where it exceeds one half.
        spacing_mm: voxel size along (d, h, w).
        sigma_mm: smoothing; about one voxel, more in wide vessels.
        inside_mm: points known to lie in the vessel, (d, h, w) in mm from the middle of the crop.
    """
    indicator = np.clip(np.nan_to_num(vessel_prob.astype(np.float64)), 0, 1)
    lumen = indicator > 0.5
    parts = np.empty(lumen.shape, dtype=np.int32)
    count = ndimage.label(lumen, structure=np.ones((3, 3, 3)), output=parts)
    if not isinstance(count, int) or count == 0:
        return None
    index = np.rint(inside_mm / spacing_mm + (np.array(lumen.shape) - 1) / 2).astype(int)
    index = np.clip(index, 0, np.array(lumen.shape) - 1)
    # A centreline point may sit a voxel outside a thin vessel: look one voxel around it.
    grown = ndimage.maximum_filter(parts, size=3)[tuple(index.T)]
    votes = np.bincount(grown, minlength=count + 1)[1:]
    if votes.max() == 0:
        return None
    part = parts == votes.argmax() + 1
    # Keep the soft edge of the chosen vessel, but no voxel that belongs to another one.
    rim = ndimage.binary_dilation(part, structure=np.ones((3, 3, 3)), iterations=2)
    indicator = np.where(rim & ((parts == 0) | part), indicator, 0.0)

    indicator, spacing, first = _coarsen(indicator, spacing_mm, sigma_mm)
    smooth = ndimage.gaussian_filter(indicator, sigma_mm / spacing, mode="nearest", truncate=CUT)
    level = _volume_level(smooth, indicator.sum())
    field = (smooth - level) / (1 - level)
    return Lumen(indicator, spacing, first, float(sigma_mm), level, field, field > 0)


def _coarsen(indicator: np.ndarray, spacing_mm: np.ndarray, sigma_mm: float) -> tuple[np.ndarray, ...]:
    """Halves each axis while sigma spans two voxels: the Gaussian hides what is lost and costs an eighth."""
    spacing = np.array(spacing_mm, dtype=np.float64)
    first = -(np.array(indicator.shape) - 1) / 2 * spacing
    for axis in range(3):
        while sigma_mm >= 2 * spacing[axis] and indicator.shape[axis] >= 4:
            if indicator.shape[axis] % 2:
                last = np.take(indicator, [-1], axis=axis)
                indicator = np.concatenate([indicator, last], axis=axis)
            pairs = np.moveaxis(indicator, axis, 0)
            indicator = np.moveaxis((pairs[::2] + pairs[1::2]) / 2, 0, axis)
            first[axis] += spacing[axis] / 2
            spacing[axis] *= 2
    return np.ascontiguousarray(indicator), spacing, first


def _volume_level(smooth: np.ndarray, volume: float) -> float:
    """The level whose superlevel set has the given volume in voxels, to sub-voxel accuracy.

    A voxel counts by how far its centre is inside, measured in its own gradient: counting whole voxels
    shrinks a vessel of two voxels' radius by a quarter.
    """
    slope = np.sqrt(sum(np.square(part) for part in np.gradient(smooth)))
    slope = np.maximum(slope, 1e-6)
    low, high = LEVELS
    for _ in range(20):
        level = (low + high) / 2
        if np.clip(0.5 + (smooth - level) / slope, 0, 1).sum() > volume:
            low = level
        else:
            high = level
    return (low + high) / 2
