"""Maxima of a volume in which a network marks what it takes for aneurysms."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import ndimage
from skimage import measure

from aneurysm.data.files import replacing
from aneurysm.data.scan import Grid
from aneurysm.vessels.local_shape import ball_steps


@dataclass(frozen=True, eq=False)
class Peaks:
    """Maxima of a heat map, highest first."""

    centre_mm: np.ndarray  # (k, 3) RAS mm
    height: np.ndarray  # (k,) 0..1

    def __len__(self) -> int:
        return len(self.height)

    def above(self, threshold: float) -> "Peaks":
        """Those that reach a height."""
        chosen = self.height >= threshold
        return Peaks(self.centre_mm[chosen], self.height[chosen])

    def save(self, path: Path) -> None:
        """Write to one safetensors file, whole or not at all."""
        with replacing(path) as part:
            save_file(
                {
                    "centre_mm": np.ascontiguousarray(self.centre_mm, np.float64),
                    "height": np.ascontiguousarray(self.height, np.float64),
                },
                part,
            )

    @classmethod
    def load(cls, path: Path) -> "Peaks":
        """Read what `save` wrote."""
        return cls(**load_file(path))


NO_PEAKS = Peaks(np.zeros((0, 3)), np.zeros(0))


def evidence_peaks(
    evidence: np.ndarray, grid: Grid, threshold: float, min_distance_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Maxima of a probability volume (d, h, w): centres (k, 3) in mm and heights (k,), highest first.

    A centre is the centroid of the evidence within half the minimum distance of the maximum.
    """
    volume = np.asarray(evidence, np.float32)
    if not (volume >= threshold).any():
        return np.zeros((0, 3)), np.zeros(0)
    smooth = ndimage.gaussian_filter(volume, 0.7 / grid.spacing)
    size = np.maximum(1, 2 * np.round(min_distance_mm / 2 / grid.spacing).astype(int) + 1)
    top = (smooth == ndimage.maximum_filter(smooth, size)) & (volume >= threshold)
    plateaus = np.asarray(measure.label(top, connectivity=3))
    count = int(plateaus.max())
    maxima = [np.argwhere(plateaus == i) for i in range(1, count + 1)]
    found = np.array([np.rint(voxels.mean(0)) for voxels in maxima], int).reshape(-1, 3)
    height = np.array([volume[tuple(voxels.T)].max() for voxels in maxima], float)
    steps, step_mm = ball_steps(grid, max(min_distance_mm / 2, float(grid.spacing.max())))
    centres = np.empty((count, 3))
    for i, voxel in enumerate(found):
        around = voxel + steps
        valid = np.all((around >= 0) & (around < grid.shape), axis=1)
        weight = volume[tuple(around[valid].T)] ** 2 + 1e-9
        centres[i] = grid.to_mm(voxel) + (weight[:, None] * step_mm[valid]).sum(0) / weight.sum()
    order = np.argsort(-height, kind="stable")
    return centres[order], height[order]
