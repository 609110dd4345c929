"""How deep every voxel lies in its vessel: the exact Euclidean distance to the outside, on the voxel list.

The squared distance is a minimum along one axis after the other (T. Saito and J. Toriwaki, Pattern
Recognition 27 (1994)). Along an axis every voxel walks from neighbour to neighbour for as long as a nearer
outside is possible, which on vessels is a few voxels: cost is the number of voxels times their mean radius.
"""

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid
from aneurysm.vessels.voxels import STEPS, Voxels


def depth(voxels: Voxels, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each voxel to the nearest voxel outside the mask, (n,) float64.

    The world beyond the volume is unknown, not outside: a vessel that leaves the volume does not taper there.

    Args:
        voxels: of the mask.
        spacing: voxel size along (d, h, w) in mm.
    """
    if not len(voxels):
        return np.zeros(0)
    spacing = np.asarray(spacing, float)
    index, near = voxels.index, voxels.neighbours
    start, stop = voxels.runs
    many = stop - start + 1
    place = np.arange(len(voxels))
    left = (place - np.repeat(start, many) + 1.0) * spacing[2]
    right = (np.repeat(stop, many) - place + 1.0) * spacing[2]
    left[np.repeat(index[start, 2] == 0, many)] = np.inf
    right[np.repeat(index[stop, 2] == voxels.shape[2] - 1, many)] = np.inf
    square = np.minimum(left, right) ** 2
    for axis, steps in ((1, (10, 15)), (0, (4, 21))):  # columns of the table: one step along h, along d
        square = _along(square, near[:, steps], index[:, axis], voxels.shape[axis], float(spacing[axis]))
    if not np.isfinite(square).all():  # the mask fills the volume: nothing outside is known
        square[:] = (np.min(np.array(voxels.shape) * spacing) / 2) ** 2
    return np.sqrt(square)


def _along(square: np.ndarray, beside: np.ndarray, at: np.ndarray, size: int, step_mm: float) -> np.ndarray:
    """The least of `square` k steps away plus (k step_mm)^2, over all k along one axis."""
    count = len(square)
    ahead = np.concatenate([square, [0.0, np.inf]])  # outside the mask; outside the volume
    result = square.copy()
    for side, rim in ((0, 0), (1, size - 1)):
        following = np.append(beside[:, side], (count, count + 1)).astype(np.int32)
        following[:count][at == rim] = count + 1
        walker, place = np.arange(count, dtype=np.int32), following[:count]
        k = 1
        while len(walker):
            result[walker] = np.minimum(result[walker], ahead[place] + (k * step_mm) ** 2)
            k += 1
            further = (place < count) & ((k * step_mm) ** 2 < result[walker])
            walker, place = walker[further], following[place[further]]
    return result


class Wall:
    """Distance from any point inside a mask to the nearest voxel centre outside it.

    Args:
        voxels: of the mask.
        grid: where they lie.
    """

    def __init__(self, voxels: Voxels, grid: Grid) -> None:
        near, index = voxels.neighbours, voxels.index
        parts = [np.zeros((0, 3), np.int32)]
        for column in np.flatnonzero(np.abs(STEPS).sum(1) == 1):
            beside = index[near[:, column] == len(voxels)] + STEPS[column].astype(np.int32)
            parts.append(beside[((beside >= 0) & (beside < grid.shape)).all(1)])
        outside = np.concatenate(parts)  # some more than once, which costs less than to look for them
        self.unknown = float(np.min(np.array(grid.shape) * grid.spacing)) / 2
        self.tree = None
        if len(outside):
            self.tree = KDTree(grid.to_mm(outside), balanced_tree=False, compact_nodes=False)

    def distance(self, mm: np.ndarray) -> np.ndarray:
        """Of points (m, 3) RAS mm, (m,) in mm."""
        if self.tree is None:
            return np.full(len(mm), self.unknown)
        return np.asarray(self.tree.query(mm)[0])
