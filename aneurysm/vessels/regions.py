"""The artery that a place lies on, from a volume of artery labels."""

import numpy as np

from aneurysm.data.labels import LOCATIONS, VESSEL_LABEL
from aneurysm.data.scan import Grid
from aneurysm.vessels.cleanup import check_on_grid
from aneurysm.vessels.local_shape import ball_steps

_NAMES: dict[int, str] = dict(zip(VESSEL_LABEL, LOCATIONS, strict=True))


def region_of(centre_mm: np.ndarray, arteries: np.ndarray, grid: Grid, reach_mm: float = 6.0) -> str:
    """Name (one of LOCATIONS) of the named artery nearest to a point, empty when none is within reach.

    Args:
        centre_mm: (3,) RAS.
        arteries: (d, h, w) labels as in `data.labels.VESSEL_LABEL`; others do not count.
        grid: where `arteries` lies.
        reach_mm: how far the artery may be.

    Raises:
        ValueError: the volume does not lie on the grid.
    """
    check_on_grid(arteries, grid)
    steps, mm = ball_steps(grid, reach_mm)
    index = np.rint(grid.to_index(np.asarray(centre_mm, float))).astype(int) + steps
    on_grid = np.all((index >= 0) & (index < grid.shape), axis=1)
    labels = arteries[tuple(index[on_grid].T)]
    named = np.isin(labels, VESSEL_LABEL)
    if not named.any():
        return ""
    gap = np.linalg.norm(mm[on_grid][named], axis=1)
    return _NAMES[int(labels[named][np.argmin(gap)])]
