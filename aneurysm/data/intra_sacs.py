"""Where in a voxelised tree the aneurysms of IntrA are, and what the vessel would look like without one."""

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from aneurysm.data.intra_meshes import ANEURYSM, Segment, Tree
from aneurysm.data.scan import Grid

_SAME_MM = 3.0  # segments with centres closer than this show one aneurysm (AN42-1, -2 and -3)
_STUMP_MM = 0.8  # smoothing of the vessel wall where a sac was cut off
_REGION_MM = 1.0  # sac voxels lie inside the box of the sac's surface points, widened by this


def distinct_lesions(tree: Tree) -> list[Segment]:
    """The aneurysms whose place in the tree is known, each once."""
    lesions: list[Segment] = []
    for segment in tree.segments:
        new = all(np.linalg.norm(segment.centre_mm - s.centre_mm) > _SAME_MM for s in lesions)
        if segment.aligned and new:
            lesions.append(segment)
    return lesions


def mark_sac(inside: np.ndarray, grid: Grid, tree: Tree, segment: Segment) -> np.ndarray:
    """Lumen sub-voxels that belong to the aneurysm of a segment.

    A sub-voxel belongs to the sac when the surface point nearest to it does. Surface points are those of the
    segment with their labels and, so that a vessel passing by is not taken for the sac, those of the tree
    outside the segment.

    Args:
        inside: bool (d, h, w), lumen.
        grid: of `inside`.

    Returns:
        bool (d, h, w), the largest connected piece.
    """
    sac = np.zeros(inside.shape, bool)
    box = sac_box(segment, grid)
    where = np.argwhere(inside[box]) + [s.start for s in box]
    if not len(where):
        return sac
    low, high = segment.points.min(0) - 10, segment.points.max(0) + 10
    around = tree.vertices[((tree.vertices > low) & (tree.vertices < high)).all(1)]
    reach = max(1.0, 2 * segment.misfit_mm)  # some segments were remeshed and lie beside the tree's surface
    outside = around[cKDTree(segment.points).query(around)[0] > reach]
    points = np.concatenate([segment.points, outside])
    is_sac = np.concatenate([segment.label == ANEURYSM, np.zeros(len(outside), bool)])
    nearest = cKDTree(points).query(grid.to_mm(where))[1]
    sac[tuple(where[is_sac[nearest]].T)] = True
    return _largest(sac, box)


def sac_box(segment: Segment, grid: Grid) -> tuple[slice, slice, slice]:
    """Index box (d, h, w) around the surface points of a sac, cut to the grid."""
    points = segment.sac_points
    corners = grid.to_index(np.stack([points.min(0) - _REGION_MM, points.max(0) + _REGION_MM]))
    low = np.clip(np.floor(corners.min(0)), 0, grid.shape).astype(int)
    high = np.clip(np.ceil(corners.max(0)) + 1, 0, grid.shape).astype(int)
    d, h, w = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return d, h, w


def without_sac(inside: np.ndarray, sac: np.ndarray, grid: Grid) -> np.ndarray | None:
    """The lumen with a sac cut off at its neck and the stump smoothed.

    Args:
        inside, sac: bool (d, h, w); the sac is part of the lumen.
        grid: of both.

    Returns:
        bool (d, h, w), or None when the vessel falls apart, as it does where the sac is a stretch of the vessel
        (fusiform) or carries a branch.
    """
    left = inside & ~sac
    reach = np.ceil(3 * _STUMP_MM / grid.spacing).astype(int)
    d, h, w = (
        slice(max(0, int(np.flatnonzero(hit)[0]) - r), int(np.flatnonzero(hit)[-1]) + 1 + r)
        for hit, r in zip((sac.any((1, 2)), sac.any((0, 2)), sac.any((0, 1))), reach, strict=True)
    )
    near = (d, h, w)
    # Only voxels beside the cut change: thin vessels elsewhere in the box would not survive smoothing.
    zone = ndimage.distance_transform_edt(~sac[near], sampling=tuple(grid.spacing)) <= 2 * _STUMP_MM
    smooth = ndimage.gaussian_filter(left[near].astype(np.float32), _STUMP_MM / grid.spacing) > 0.5
    left[near] = np.where(zone, smooth & left[near], left[near])
    before = np.bincount(ndimage.label(inside)[0].ravel())[1:]
    labels, _ = ndimage.label(left)
    after = np.bincount(labels.ravel())[1:]
    if not len(after) or after.max() < 0.97 * (before.max() - sac.sum()):
        return None
    return left


def _largest(mask: np.ndarray, box: tuple[slice, slice, slice]) -> np.ndarray:
    """The largest face-connected piece of a mask that is empty outside a box."""
    labels, count = ndimage.label(mask[box])
    if count > 1:
        mask[box] = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    return mask
