"""Turn a raw vessel mask into one that is worth thinning: no specks, no pinholes."""

import numpy as np

from aneurysm.data.scan import Grid
from aneurysm.vessels.pieces import filled, pieces
from aneurysm.vessels.voxels import Voxels


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
    return clean_voxels(Voxels.of(mask), grid, smallest_mm3, hole_mm3).to_volume()


def clean_voxels(voxels: Voxels, grid: Grid, smallest_mm3: float = 20.0, hole_mm3: float = 10.0) -> Voxels:
    """As `clean_mask`, from and to the list of voxels: no volume is made."""
    _, piece = pieces(voxels)
    large = np.bincount(piece) * grid.voxel_mm3 >= smallest_mm3
    kept = voxels if large.all() else voxels.only(large[piece])
    return filled(kept, int(hole_mm3 / grid.voxel_mm3 + 1e-6))


def check_on_grid(mask: np.ndarray | Voxels, grid: Grid) -> None:
    """Refuse a volume that has another shape than its grid.

    Raises:
        ValueError: the shapes differ.
    """
    shape = mask.shape if isinstance(mask, Voxels) else np.shape(mask)
    if shape != grid.shape:
        raise ValueError(
            f"A mask of shape {shape} does not lie on a grid of shape {grid.shape}. "
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
