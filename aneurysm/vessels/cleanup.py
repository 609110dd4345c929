"""Turn a raw vessel mask into one that is worth thinning: no specks, no pinholes."""

import numpy as np
from skimage import measure

from aneurysm.data.scan import Grid


def clean_mask(
    mask: np.ndarray, grid: Grid, smallest_mm3: float = 20.0, hole_mm3: float = 10.0
) -> np.ndarray:
    """Keep the vessel pieces that are large enough and close the small cavities inside them.

    Args:
        mask: (d, h, w), non-zero inside a vessel.
        grid: where the voxels of `mask` lie.
        smallest_mm3: 26-connected pieces below this volume are dropped.
        hole_mm3: enclosed cavities up to this volume are filled; a cavity would otherwise turn the
            skeleton around it into a shell.

    Returns:
        (d, h, w) bool.

    Raises:
        ValueError: the mask does not lie on the grid.
    """
    check_on_grid(mask, grid)
    foreground = np.asarray(mask) != 0
    cleaned = np.zeros(grid.shape, bool)
    if not foreground.any():
        return cleaned
    box = bounding_box(foreground)
    pieces = np.asarray(measure.label(foreground[box], connectivity=3))
    keep = np.bincount(pieces.ravel()) * grid.voxel_mm3 >= smallest_mm3
    keep[0] = False
    kept = np.pad(keep[pieces], 1)  # the rim joins all outside background into one piece
    gaps = np.asarray(measure.label(~kept, connectivity=1))  # the counterpart of a 26-connected foreground
    sizes = np.bincount(gaps.ravel()) * grid.voxel_mm3
    small = sizes <= hole_mm3
    small[[0, gaps[0, 0, 0]]] = False
    cleaned[box] = (kept | small[gaps])[1:-1, 1:-1, 1:-1]
    return cleaned


def check_on_grid(mask: np.ndarray, grid: Grid) -> None:
    """Refuse a volume that has another shape than its grid.

    Raises:
        ValueError: the shapes differ.
    """
    if np.shape(mask) != grid.shape:
        raise ValueError(
            f"A mask of shape {np.shape(mask)} does not lie on a grid of shape {grid.shape}. "
            "Resample it onto that grid first."
        )


def bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """Smallest box (slices along d, h, w) that holds every non-zero voxel of a mask that has some."""
    spans = []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        filled = np.flatnonzero(np.any(mask, axis=other))
        spans.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return spans[0], spans[1], spans[2]
