"""Synthetic vessel trees for the tests: unions of capsules with changing radius."""

from collections.abc import Sequence

import numpy as np

from aneurysm.data.scan import Grid

Point = Sequence[float] | np.ndarray
Capsule = tuple[Point, Point, float, float]  # ends (x, y, z) in mm, radii in mm

# A parent that splits in two; all in a cube of 72 mm.
TREE: list[Capsule] = [
    ((36, 36, 5), (36, 36, 30), 3.0, 2.6),
    ((36, 36, 30), (36, 15, 55), 2.2, 1.5),
    ((36, 36, 30), (36, 57, 55), 2.0, 1.4),
]
SACS: dict[str, Capsule] = {
    "bifurcation": ((36, 36, 34), (36, 36, 34), 3.75, 3.75),
    "sidewall": ((36, 40.5, 20), (36, 40.5, 20), 3.0, 3.0),
    "small sidewall": ((36, 39.7, 20), (36, 39.7, 20), 2.0, 2.0),
    "sidewall on a branch": ((38.7, 22, 46), (38.7, 22, 46), 2.25, 2.25),
}


def canonical(shape: tuple[int, int, int], spacing: Sequence[float], origin: float = 0.0) -> Grid:
    """Grid of a canonical scan: (d, h, w) along (z, y, x)."""
    affine = np.eye(4)
    affine[:3, :3] = [[0, 0, spacing[2]], [0, spacing[1], 0], [spacing[0], 0, 0]]
    affine[:3, 3] = origin
    return Grid(shape, affine)


def cube(size: int = 96, spacing: float = 0.75) -> Grid:
    return canonical((size, size, size), (spacing, spacing, spacing))


def draw(grid: Grid, capsules: Sequence[Capsule]) -> np.ndarray:
    """Mask of the voxels whose centre lies in a capsule."""
    mask = np.zeros(grid.shape, bool)
    for first, last, start, end in capsules:
        a, b = np.array(first, float), np.array(last, float)
        corners = grid.to_index(np.stack([a, b]))
        reach = max(start, end) / grid.spacing + 1
        low = np.maximum(np.floor(corners.min(0) - reach), 0).astype(int)
        high = np.minimum(np.ceil(corners.max(0) + reach) + 1, grid.shape).astype(int)
        box = tuple(slice(i, j) for i, j in zip(low, high, strict=True))
        points = grid.to_mm(np.stack(np.mgrid[box], axis=-1))
        along = np.clip((points - a) @ (b - a) / max(float((b - a) @ (b - a)), 1e-9), 0, 1)
        gap = np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1)
        mask[box] |= gap < start + (end - start) * along
    return mask


def random_tree(rng: np.random.Generator, sac: bool) -> tuple[list[Capsule], np.ndarray, float]:
    """A jittered TREE, with a sac at a random place: capsules, sac centre (3,) and sac radius."""
    split = np.array([36, 36, 32]) + rng.uniform(-3, 3, 3)
    root = np.array([36, 36, 8]) + rng.uniform(-4, 4, 3)
    tips = [np.array([36, 17, 56]) + rng.uniform(-5, 5, 3), np.array([36, 55, 56]) + rng.uniform(-5, 5, 3)]
    wide = rng.uniform(1.8, 2.8)
    thin = wide * rng.uniform(0.65, 0.8)
    tree: list[Capsule] = [(root, split, wide, wide * 0.9)]
    tree += [(split, tip, thin, thin * 0.8) for tip in tips]
    if not sac:
        return tree, np.full(3, np.nan), 0.0
    radius = float(rng.uniform(1.8, 3.5))
    first, last, start, end = tree[int(rng.integers(3))]
    at = rng.uniform(0.25, 0.75)
    axis = (np.array(last) - first) / np.linalg.norm(np.array(last) - first)
    outward = np.cross(axis, rng.normal(size=3))
    outward /= np.linalg.norm(outward)
    width = start + (end - start) * at
    centre = first + at * (np.array(last) - first) + outward * (width + 0.6 * radius)
    return [*tree, (centre, centre, radius, radius)], centre, radius
