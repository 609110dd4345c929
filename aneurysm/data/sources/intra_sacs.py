"""Where in a voxelised tree the aneurysms of IntrA are, and what the vessel would look like without one.

The trees come from flow-sensitive MR angiography: where blood swirls slowly the surface has caves, and many a
sac is hollow or missing. The annotated segments were cleaned by hand. So the sac's wall is taken from the
segment: its points with their outward normals say what is inside.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid
from aneurysm.data.sources.intra_meshes import ANEURYSM, Segment, Tree

_SAME_MM = 3.0  # segments with centres closer than this show one aneurysm (AN42-1, -2 and -3)
_STUMP_MM = 0.8  # smoothing of the vessel wall where a sac was cut off
_BOX_MM = 1.0  # around the points of a segment, where its inside is looked for
_REACH_MM = 8.0  # no wall is farther from the middle of a sac
_POINTS_MM = 0.6  # about the distance of neighbouring points on a segment


def distinct_lesions(tree: Tree) -> list[Segment]:
    """The aneurysms whose place in the tree is known, each once."""
    lesions: list[Segment] = []
    for segment in tree.segments:
        new = all(np.linalg.norm(segment.centre_mm - s.centre_mm) > _SAME_MM for s in lesions)
        if segment.aligned and new:
            lesions.append(segment)
    return lesions


def add_sac(inside: np.ndarray, grid: Grid, segment: Segment) -> np.ndarray:
    """Fill an aneurysm into the lumen of its tree and return where it is.

    A sub-voxel belongs to the sac when the segment's point nearest to it lies on the aneurysm and has it on
    its inner side. When the tree has no vessel there to carry the sac, the segment's vessel is filled in too.

    Args:
        inside: bool (d, h, w), lumen; changed in place.
        grid: of `inside`, with voxels smaller than the distance of the segment's points.

    Returns:
        bool (d, h, w), the sac.
    """
    sac = np.zeros(inside.shape, bool)
    box = _box(segment.sac_points, grid)
    where, label = _below_wall(segment, grid, box)
    sac[tuple(where[label == ANEURYSM].T)] = True
    carried = segment.sac_in_tree and bool((ndimage.binary_dilation(sac[box]) & inside[box]).any())
    inside |= sac
    if not carried:
        where, _ = _below_wall(segment, grid, _box(segment.points, grid))
        inside[tuple(where.T)] = True
    return sac


def _below_wall(
    segment: Segment, grid: Grid, box: tuple[slice, slice, slice]
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (n, 3) of a box below a segment's wall, and the label (n,) of the nearest wall."""
    axes = [np.arange(s.start, s.stop) for s in box]
    where = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    position = grid.to_mm(where)
    distance, nearest = KDTree(segment.points).query(position, distance_upper_bound=_REACH_MM)
    distance = np.asarray(distance)
    found = np.isfinite(distance)
    where, distance, index = where[found], distance[found], np.asarray(nearest)[found]
    down = segment.points[index] - position[found]
    depth = np.einsum("ij,ij->i", down, segment.normals[index])  # mm
    # Beyond an open end the way to the wall runs along it; inside it runs across.
    within = (depth > 0) & ((distance < _POINTS_MM) | (depth > 0.5 * distance))
    return where[within], segment.label[index[within]]


def fill_caves(inside: np.ndarray) -> np.ndarray:
    """The lumen without closed hollows; what is open to the border of the array stays as it is."""
    labels = pieces(~inside)
    open_air = np.zeros(labels.max() + 1, bool)
    for axis in range(3):
        for side in (0, -1):
            open_air[np.unique(labels.take(side, axis))] = True
    open_air[0] = False
    return ~open_air[labels]


def drop_crumbs(inside: np.ndarray, smallest: float) -> np.ndarray:
    """The lumen without pieces of fewer voxels than `smallest`."""
    labels = pieces(inside)
    keep = np.bincount(labels.ravel()) >= smallest
    keep[0] = False
    return keep[labels]


def without_sac(inside: np.ndarray, sac: np.ndarray, grid: Grid) -> np.ndarray | None:
    """The lumen with a sac cut off at its neck and the stump smoothed.

    Args:
        inside, sac: bool (d, h, w); the sac is part of the lumen.
        grid: of both.

    Returns:
        bool (d, h, w), or None when the vessel falls apart, as it does where the sac is a stretch of the
        vessel (fusiform) or carries a branch.
    """
    left = inside & ~sac
    reach = np.ceil(3 * _STUMP_MM / grid.spacing).astype(int)
    d, h, w = (
        slice(max(0, int(np.flatnonzero(hit)[0]) - r), int(np.flatnonzero(hit)[-1]) + 1 + r)
        for hit, r in zip((sac.any((1, 2)), sac.any((0, 2)), sac.any((0, 1))), reach, strict=True)
    )
    near = (d, h, w)
    # Only voxels beside the cut change: thin vessels elsewhere in the box would not survive smoothing.
    to_cut = np.asarray(ndimage.distance_transform_edt(~sac[near], sampling=grid.spacing))
    zone = to_cut <= 2 * _STUMP_MM
    smooth = ndimage.gaussian_filter(left[near].astype(np.float32), _STUMP_MM / grid.spacing) > 0.5
    left[near] = np.where(zone, smooth & left[near], left[near])
    before = np.bincount(pieces(inside).ravel())[1:]
    after = np.bincount(pieces(left).ravel())[1:]
    if not len(after) or after.max() < 0.97 * (before.max() - sac.sum()):
        return None
    return left


def pieces(mask: np.ndarray) -> np.ndarray:
    """Number (int32, from 1) of the face-connected piece that every voxel of a mask belongs to."""
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    return labels


def _box(points: np.ndarray, grid: Grid) -> tuple[slice, slice, slice]:
    """Index box (d, h, w) around points, cut to the grid."""
    corners = grid.to_index(np.stack([points.min(0) - _BOX_MM, points.max(0) + _BOX_MM]))
    low = np.clip(np.floor(corners.min(0)), 0, grid.shape).astype(int)
    high = np.clip(np.ceil(corners.max(0)) + 1, 0, grid.shape).astype(int)
    d, h, w = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return d, h, w
