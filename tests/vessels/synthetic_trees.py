"""Synthetic vessel trees for the tests: unions of capsules with changing radius."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Analytic:
    """Capsules with what a right graph of them has."""

    capsules: list[Capsule]
    junctions: int
    ends: int
    rings: int
    meeting: list[np.ndarray]  # where axes meet, RAS mm


SPACINGS = [(0.5, 0.5, 0.5), (1.2, 0.4, 0.4), (0.4, 0.4, 1.2), (0.7, 0.7, 0.7)]
ANALYTIC = ["tube", "ring", "fork", "side branch", "cross", "tree", "arc", "fenestration"]


def analytic_tree(kind: str, rng: np.random.Generator, spacing: Sequence[float]) -> Analytic:
    """A vessel or tree of one kind in a random direction, wide enough for its voxels."""
    least = max(1.6 * max(spacing), 0.9)
    wide = rng.uniform(least, least + 1.4)
    along = _unit(rng.normal(size=3))
    side = _unit(np.cross(along, rng.normal(size=3)))
    at = rng.uniform(-0.6, 0.6, 3)

    def towards(degrees: float, sign: float = 1.0) -> np.ndarray:
        return np.cos(np.radians(degrees)) * along + sign * np.sin(np.radians(degrees)) * side

    if kind == "tube":
        return Analytic([(at - 11 * along, at + 11 * along, wide, 0.8 * wide)], 0, 2, 0, [])
    if kind in ("ring", "arc"):
        turn = np.linspace(0, 2 * np.pi if kind == "ring" else 3.0, 40)[:, None]
        points = at + 11 * (np.cos(turn) * along + np.sin(turn) * side)
        parts = [(a, b, wide, wide) for a, b in itertools.pairwise(points)]
        return Analytic(parts, 0, 0 if kind == "ring" else 2, int(kind == "ring"), [])
    if kind == "cross":
        other = towards(rng.uniform(65, 90))
        parts = [(at - 14 * d, at + 14 * d, wide, wide) for d in (along, other)]
        return Analytic(parts, 1, 4, 0, [at])
    if kind == "side branch":
        thin = max(0.8 * least, 0.6 * wide)
        tip = at + towards(rng.uniform(55, 90)) * (wide + 10)
        parts = [(at - 14 * along, at + 14 * along, wide, wide), (at, tip, thin, thin)]
        return Analytic(parts, 1, 3, 0, [at])
    if kind == "fenestration":  # a vessel that divides and joins again
        half, thin = 8 + 2 * wide, max(0.8 * least, 0.7 * wide)
        tails = [(at + s * half * along, at + s * (half + 10) * along, wide, wide) for s in (-1, 1)]
        turn = np.linspace(-np.pi / 2, np.pi / 2, 24)[:, None]
        for sign in (1, -1):
            bow = sign * (wide + 2.2 * thin) * np.cos(turn) * side
            points = at + half * np.sin(turn) * along + bow
            tails += [(a, b, thin, thin) for a, b in itertools.pairwise(points)]
        return Analytic(tails, 2, 2, 1, [at - half * along, at + half * along])
    parts = [(at - 13 * along, at, wide, wide)]
    forks = [at]
    for sign in (1.0, -1.0):
        way = towards(rng.uniform(30, 60), sign)
        tip, thin = at + max(13, 5 * wide) * way, 0.8 * wide
        parts.append((at, tip, thin, thin))
        if kind == "tree":
            forks.append(tip)
            normal = _unit(np.cross(along, side) - (np.cross(along, side) @ way) * way)
            for turn in (0.8, -0.8):
                further = _unit(way + turn * normal)
                parts.append((tip, tip + max(10, 5 * thin) * further, 0.8 * thin, 0.8 * thin))
    return Analytic(parts, len(forks), len(forks) + 2, 0, forks)


def fork_with_dome(rng: np.random.Generator, spacing: Sequence[float]) -> tuple[Analytic, np.ndarray, float]:
    """A fork with a sac that sits on it in the direction of the parent, the sac's centre (3,) and radius."""
    fork = analytic_tree("fork", rng, spacing)
    first, last, wide, _ = fork.capsules[0]
    radius = float(rng.uniform(1.1, 1.8)) * wide
    centre = np.asarray(last) + 0.9 * radius * _unit(np.subtract(last, first))
    return replace(fork, capsules=[*fork.capsules, (centre, centre, radius, radius)]), centre, radius


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def fitted(capsules: Sequence[Capsule], spacing: Sequence[float]) -> tuple[np.ndarray, Grid]:
    """Mask of the capsules on a grid that holds them all."""
    points = np.array([p for c in capsules for p in c[:2]], float)
    margin = max(max(c[2:]) for c in capsules) + 3 * max(spacing)
    low, high = points.min(0) - margin, points.max(0) + margin
    d, h, w = (int(n) for n in np.ceil((high - low)[::-1] / np.array(spacing)))
    grid = canonical((d, h, w), spacing)
    affine = grid.affine.copy()
    affine[:3, 3] = low
    grid = Grid((d, h, w), affine)
    return draw(grid, capsules), grid


def total_length(tree: Analytic) -> float:
    """Of all axes, in mm."""
    return float(sum(np.linalg.norm(np.subtract(c[1], c[0])) for c in tree.capsules))


def axis_distance(tree: Analytic, mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From points (n, 3) to the nearest axis, and the radius there: (n,) each, mm."""
    gap, radius = np.full(len(mm), np.inf), np.zeros(len(mm))
    for first, last, start, end in tree.capsules:
        a, b = np.array(first, float), np.array(last, float)
        along = np.clip((mm - a) @ (b - a) / max(float((b - a) @ (b - a)), 1e-9), 0, 1)
        found = np.linalg.norm(mm - a - along[:, None] * (b - a), axis=1)
        nearer = found < gap
        gap[nearer], radius[nearer] = found[nearer], (start + (end - start) * along)[nearer]
    return gap, radius
