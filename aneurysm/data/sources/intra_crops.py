"""Which box of a whole arterial tree becomes a scan."""

import numpy as np
from scipy import ndimage

from aneurysm.data.scan import Grid
from aneurysm.data.sources.intra_meshes import Segment, Tree

_MARGIN_MM = 6.0  # between a sac and the border of its scan
_APART_MM = 5.0  # between a sac and the border of a scan that is to hold none
_FEWEST_POINTS = 0.4  # of the surface points that the scan with the aneurysm shows


def willis_centre(tree: Tree) -> np.ndarray:
    """About the middle of the circle of Willis in RAS mm, to some 8 mm, from the shape of the tree alone.

    Near the midline most of the arterial wall lies where siphons, M1 and A1 run: the level of the largest
        wall area
    within 28 mm of the midplane is taken, raised to the circle, and the area's mean in front-back direction.
    """
    corners = tree.vertices[tree.faces]  # (f, 3, 3)
    middle = corners.mean(1)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    midplane = (tree.vertices[:, 0].min() + tree.vertices[:, 0].max()) / 2
    central = np.abs(middle[:, 0] - midplane) < 28
    middle, area = middle[central], area[central]
    edges = np.arange(middle[:, 2].min() - 0.5, middle[:, 2].max() + 1.5)
    profile = ndimage.gaussian_filter1d(np.histogram(middle[:, 2], edges, weights=area)[0], 3.0)
    level = edges[profile.argmax()] + 0.5
    near = np.abs(middle[:, 2] - level) < 6
    return np.array([midplane, np.average(middle[near, 1], weights=area[near]), level + 3])


def crop(centre_mm: np.ndarray, size: int, spacing_mm: float) -> Grid:
    """A canonical cubic grid of size^3 voxels around a point (RAS mm)."""
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = spacing_mm
    # Thousandths of a millimetre survive every file format.
    affine[:3, 3] = np.round(centre_mm - (size - 1) / 2 * spacing_mm, 3)
    affine[3, 3] = 1
    return Grid((size, size, size), affine)


def crop_with(
    target: Segment,
    lesions: list[Segment],
    tree: Tree,
    size: int,
    spacing_mm: float,
    rng: np.random.Generator,
) -> Grid:
    """A box that shows one aneurysm whole, somewhere in it, much of the tree, and cuts no other aneurysm.

    Raises:
        ValueError: the aneurysm with its margin is larger than the box.
    """
    half = size * spacing_mm / 2
    points = target.sac_points
    low, high = points.max(0) + _MARGIN_MM - half, points.min(0) - _MARGIN_MM + half
    if (low > high).any():
        need = float((np.ptp(points, axis=0) + 2 * _MARGIN_MM).max())
        raise ValueError(
            f"{target.name}: the aneurysm with its margin needs {need:.0f} mm but a scan shows "
            f"{2 * half:.0f} mm. Raise size to {int(np.ceil(need / spacing_mm))}."
        )
    centres = rng.uniform(low, high, (12, 3))
    whole = [c for c in centres if not any(_cuts(c, half, s) for s in lesions)]
    centres = sorted(whole or centres, key=lambda c: -_points_in(c, half, tree))
    return crop(centres[rng.integers((len(centres) + 1) // 2)], size, spacing_mm)


def crop_without(
    lesions: list[Segment], tree: Tree, size: int, spacing_mm: float, rng: np.random.Generator, like: Grid
) -> Grid | None:
    """A box of the tree without any aneurysm, or None when every box with enough vessel shows one."""
    half = size * spacing_mm / 2
    seeds = tree.vertices[rng.integers(len(tree.vertices), size=60)]
    centres = seeds + rng.uniform(-0.5, 0.5, seeds.shape) * half
    free = [c for c in centres if not any(_touches(c, half + _APART_MM, s) for s in lesions)]
    enough = _FEWEST_POINTS * _points_in(like.centre_mm, half, tree)
    counts = [_points_in(c, half, tree) for c in free]
    if not counts or max(counts) < enough:
        return None
    return crop(free[int(np.argmax(counts))], size, spacing_mm)


def _points_in(centre: np.ndarray, half: float, tree: Tree) -> int:
    return int((np.abs(tree.vertices - centre) < half).all(1).sum())


def _touches(centre: np.ndarray, half: float, lesion: Segment) -> bool:
    points = lesion.sac_points
    return bool((points.max(0) > centre - half).all() and (points.min(0) < centre + half).all())


def _cuts(centre: np.ndarray, half: float, lesion: Segment) -> bool:
    points, inner = lesion.sac_points, half - 1.0
    inside = (points.min(0) > centre - inner).all() and (points.max(0) < centre + inner).all()
    return _touches(centre, half, lesion) and not inside
