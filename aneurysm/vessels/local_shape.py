"""What the vessel mask looks like within a few millimetres of a point."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import sparse
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid

SMALL_BALL_MM: Final = 4.0
BALL_MM: Final = 6.0
_PRODUCTS: Final = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))  # of a symmetric 3 x 3 matrix
_AT_ONCE = 256  # nodes; bounds the memory


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
    linearity: np.ndarray
    planarity: np.ndarray
    offset: np.ndarray


def within(position: np.ndarray, tree: KDTree, radius: float) -> sparse.coo_matrix:
    """Which points of a tree lie within a radius of each position: (N, n) of ones."""
    found = KDTree(position).sparse_distance_matrix(tree, radius + 1e-6, output_type="ndarray")
    shape = (len(position), tree.n)
    return sparse.coo_matrix((np.ones(len(found)), (found["i"], found["j"])), shape=shape)


def ball_sums(
    topology: Mapping[str, np.ndarray],
    mm: np.ndarray,
    depth: np.ndarray,
    bulge: np.ndarray,
    voxel_mm3: float,
) -> Balls:
    """Measure the mask within 4 and 6 mm of every node.

    Args:
        topology: position and tangent of the nodes.
        mm: (n, 3) RAS mm, the voxels of the mask.
        depth: (n,) mm.
        bulge: (n,) bool, voxels that no vessel explains.
        voxel_mm3: volume of a voxel.
    """
    position, tangent = topology["position"], topology["tangent"]
    count = len(position)
    tree = KDTree(mm, balanced_tree=False, compact_nodes=False)
    large = tree.query_ball_point(position, BALL_MM + 1e-6, return_length=True)
    middle = mm.mean(0)
    away = mm - middle  # near zero, or the products lose digits
    powers = np.column_stack([np.ones(len(mm)), away, *[away[:, i] * away[:, j] for i, j in _PRODUCTS]])
    sums = np.concatenate(
        [within(position[i : i + _AT_ONCE], tree, SMALL_BALL_MM) @ powers for i in range(0, count, _AT_ONCE)]
    )
    mass = np.maximum(sums[:, 0], 1)
    mean = sums[:, 1:4] / mass[:, None]
    spread = np.empty((count, 3, 3))
    for k, (i, j) in enumerate(_PRODUCTS):
        spread[:, i, j] = spread[:, j, i] = sums[:, 4 + k] / mass - mean[:, i] * mean[:, j]
    value = np.maximum(np.linalg.eigvalsh(spread)[:, ::-1], 0)  # largest first
    first = np.maximum(value[:, 0], 1e-6)
    off = np.where(sums[:, :1] > 0, mean + middle - position, 0)
    across = off - (off * tangent).sum(1, keepdims=True) * tangent

    extra = np.zeros((count, 5))
    deepest, small = np.zeros(count), np.zeros(count)
    if bulge.any():
        outside = KDTree(mm[bulge])
        near = within(position, outside, BALL_MM)
        weight = depth[bulge]
        columns = np.column_stack([np.ones(len(weight)), weight, weight[:, None] * mm[bulge]])
        extra = near @ columns
        small = outside.query_ball_point(position, SMALL_BALL_MM + 1e-6, return_length=True).astype(float)
        np.maximum.at(deepest, near.row, weight[near.col])
    centre = np.where(extra[:, 1:2] > 0, extra[:, 2:5] / np.maximum(extra[:, 1:2], 1e-6), position)
    return Balls(
        small_mm3=sums[:, 0] * voxel_mm3,
        large_mm3=large * voxel_mm3,
        small_bulge_mm3=small * voxel_mm3,
        bulge_mm3=extra[:, 0] * voxel_mm3,
        bulge_depth=deepest,
        bulge_centre=centre,
        linearity=(value[:, 0] - value[:, 1]) / first,
        planarity=(value[:, 1] - value[:, 2]) / first,
        offset=np.linalg.norm(across, axis=1),
    )


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
