"""Vessels by name: from probabilities of the 13 arteries to labels, and from a place to the artery there.

Label volumes are numbered as RSNA's `_cowseg.nii` files and prepared masks are (`labels.VESSEL_LABEL`); what
is asked of them is answered as an index into `labels.LOCATIONS`.
"""

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.labels import LOCATIONS, VESSEL_LABEL
from aneurysm.data.scan import Grid
from aneurysm.vessels.voxels import check_on_grid

NO_ARTERY = -1
# Lumen probability from which a voxel has a name. Below the thresholds of lumen masks there are no vessels to
# name; a voxel of a mask that reaches lower takes the name of the nearest one that has one.
NAMED_FROM = 0.2


def named_arteries(lumen: np.ndarray, arteries: np.ndarray) -> np.ndarray:
    """The likeliest artery of every voxel that may be lumen, (d, h, w) uint8 vessel labels, 0 elsewhere.

    Args:
        lumen: (d, h, w) probability of lumen.
        arteries: (13, d, h, w) probability of each artery, in the order of LOCATIONS.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if arteries.shape != (len(LOCATIONS), *lumen.shape):
        raise ValueError(
            f"Arteries {arteries.shape} do not fit a lumen of {lumen.shape}: one volume for each of the "
            f"{len(LOCATIONS)} locations."
        )
    return np.where(lumen >= NAMED_FROM, np.array(VESSEL_LABEL, np.uint8)[arteries.argmax(0)], 0).astype(
        np.uint8
    )


def location_of_label(labels: np.ndarray) -> np.ndarray:
    """Index into LOCATIONS of vessel labels (any shape), NO_ARTERY for 0 and for vessels without a name."""
    table = np.full(256, NO_ARTERY)
    table[list(VESSEL_LABEL)] = np.arange(len(LOCATIONS))
    return table[labels]


def artery_at(labels: np.ndarray, grid: Grid, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The named artery nearest to each point.

    Args:
        labels: (d, h, w) uint8 vessel labels; vessels without a name do not count.
        grid: of the labels.
        points_mm: (n, 3) RAS mm.

    Returns:
        (n,) index into LOCATIONS, NO_ARTERY where the volume has no artery at all, and
        (n,) distance to its nearest voxel centre in mm, infinite there.

    Raises:
        ValueError: the labels do not lie on the grid.
    """
    check_on_grid(labels, grid)
    points = np.asarray(points_mm, float).reshape(-1, 3)
    location = location_of_label(labels)
    voxels = np.argwhere(location != NO_ARTERY)
    if not len(voxels) or not len(points):
        return np.full(len(points), NO_ARTERY), np.full(len(points), np.inf)
    distance, nearest = KDTree(grid.to_mm(voxels)).query(points)
    return location[tuple(voxels[nearest].T)], np.asarray(distance)
