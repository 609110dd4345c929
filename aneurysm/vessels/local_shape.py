"""What the vessel mask looks like within a few millimetres of a point."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid

SMALL_BALL_MM: Final = 4.0
BALL_MM: Final = 6.0


def outside_tubes(mm: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Which points (n, 3) lie in none of the spheres.

    A fourth coordinate sqrt(R^2 - r^2) turns the nearest neighbour into the sphere of least power
    |x - c|^2 - r^2, so one query decides.
    """
    largest = float(radius.max())
    lifted = np.sqrt(np.maximum(largest**2 - radius**2, 0))
    tree = KDTree(np.concatenate([centres, lifted[:, None]], axis=1))
    gap, _ = tree.query(np.concatenate([mm, np.zeros((len(mm), 1))], axis=1))
    return gap > largest + 1e-6


@dataclass(frozen=True, eq=False)
class Balls:
    """Sums over the voxels in balls around the nodes, each (N,) unless noted; mm and mm^3."""

    small_mm3: np.ndarray
    large_mm3: np.ndarray
    small_bulge_mm3: np.ndarray
    bulge_mm3: np.ndarray
    bulge_depth: np.ndarray
    bulge_centre: np.ndarray  # (N, 3)
    inscribed: np.ndarray
    linearity: np.ndarray
    planarity: np.ndarray
    offset: np.ndarray


def ball_sums(
    topology: Mapping[str, np.ndarray], bulge: np.ndarray, distance: np.ndarray, grid: Grid
) -> Balls:
    position, radius, tangent = topology["position"], topology["radius"], topology["tangent"]
    steps, step_mm = ball_steps(grid, BALL_MM)
    gap = np.linalg.norm(step_mm, axis=1)
    small = gap <= SMALL_BALL_MM
    rim = np.abs(steps).max(0)  # padded so that every ball stays on the volume
    padded = np.pad(np.where(bulge, -distance, distance), [(n, n) for n in rim])  # negative in the bulge
    strides = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    home = (np.rint(grid.to_index(position)).astype(np.int64) + rim) @ strides
    reached = steps @ strides
    outer = (step_mm[:, :, None] * step_mm[:, None, :]).reshape(-1, 9)
    powers = np.concatenate([step_mm, outer], axis=1)[small].astype(np.float32)
    parts = []
    for start in range(0, len(position), 128):  # bounds the memory
        rows = slice(start, start + 128)
        signed = padded.ravel()[home[rows, None] + reached]
        depth = np.abs(signed)
        extra = signed < 0
        excess = depth * extra
        filled = (depth > 0).astype(np.float32)
        moments = filled[:, small] @ powers
        mass = np.maximum(filled[:, small].sum(1), 1)
        mean = moments[:, :3] / mass[:, None]
        spread = moments[:, 3:].reshape(-1, 3, 3) / mass[:, None, None] - mean[:, :, None] * mean[:, None, :]
        value = np.maximum(np.linalg.eigvalsh(spread)[:, ::-1], 0)  # largest first
        first = np.maximum(value[:, 0], 1e-6)
        rounded = grid.to_mm(np.rint(grid.to_index(position[rows])))
        away = rounded + mean - position[rows]
        across = away - (away * tangent[rows]).sum(1, keepdims=True) * tangent[rows]
        weight = excess.sum(1)
        centre = rounded + excess @ step_mm / np.maximum(weight, 1e-6)[:, None]
        nearby = gap[None] <= np.maximum(1.5 * radius[rows, None], 1.0)
        parts.append(
            (
                filled[:, small].sum(1) * grid.voxel_mm3,
                filled.sum(1) * grid.voxel_mm3,
                extra[:, small].sum(1) * grid.voxel_mm3,
                extra.sum(1) * grid.voxel_mm3,
                excess.max(1),
                np.where(weight[:, None] > 0, centre, position[rows]),
                np.maximum((depth * nearby).max(1), radius[rows]),
                (value[:, 0] - value[:, 1]) / first,
                (value[:, 1] - value[:, 2]) / first,
                np.linalg.norm(across, axis=1),
            )
        )
    return Balls(*(np.concatenate(part).astype(float) for part in zip(*parts, strict=True)))


def ball_steps(grid: Grid, radius_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Voxel steps (k, 3) to all voxels within a radius, and the same steps in mm (k, 3)."""
    half = np.floor(radius_mm / grid.spacing + 1e-6).astype(int)
    steps = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in half), indexing="ij"), -1).reshape(-1, 3)
    mm = steps @ grid.affine[:3, :3].T
    near = np.linalg.norm(mm, axis=1) <= radius_mm + 1e-6  # rounding must not decide on voxels at the rim
    return steps[near], mm[near]


def around(position: np.ndarray, steps: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """For points (n, 3) in mm: which steps stay on the grid (n, k) and the flat voxel index (n, k)."""
    index = np.rint(grid.to_index(position)).astype(np.int64)[:, None] + steps
    on_grid = np.all((index >= 0) & (index < grid.shape), axis=-1)
    index = np.clip(index, 0, np.array(grid.shape) - 1)
    return on_grid, np.asarray(np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), grid.shape))
