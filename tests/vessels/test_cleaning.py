"""What the rules for crumbs and cavities do when nothing else is mended, and the box around a mask."""

import numpy as np
from synthetic_trees import canonical

from aneurysm.vessels.repair import VesselRules, repair
from aneurysm.vessels.voxels import bounding_box


def rules(smallest_mm3: float, hole_mm3: float) -> VesselRules:
    return VesselRules(smallest_mm3, hole_mm3, gap_mm=0, sac_mm=0)


def test_keeps_large_pieces_and_fills_cavities_but_not_rings():
    grid = canonical((30, 40, 50), (1.0, 0.5, 0.5))  # 0.25 mm^3 per voxel
    mask = np.zeros(grid.shape, bool)
    mask[5:15, 5:25, 5:25] = True
    mask[9, 12:14, 12:14] = False  # a pinhole of 1 mm^3
    mask[8:12, 5:25, 18:20] = False  # a tunnel: not enclosed, so it must stay open
    mask[25, 35, 45:49] = True  # a speck of 1 mm^3
    cleaned = repair(mask, grid, rules(5.0, 2.0)).mask
    assert cleaned[9, 12:14, 12:14].all()
    assert not cleaned[8:12, 5:25, 18:20].any()
    assert not cleaned[25].any()
    assert cleaned.sum() == mask.sum() - 4 + 4


def test_large_cavity_stays_and_the_border_is_no_cavity():
    grid = canonical((20, 20, 20), (1.0, 1.0, 1.0))
    mask = np.ones(grid.shape, bool)
    mask[5:10, 5:10, 5:10] = False
    mask[0, 0, 0] = False
    cleaned = repair(mask, grid, rules(20.0, 50.0))
    assert np.array_equal(cleaned.mask, mask)
    assert (cleaned.before.holes, cleaned.after.holes) == (1, 1)


def test_bounding_box_is_tight():
    mask = np.zeros((8, 9, 10))
    mask[2, 3:5, 6] = mask[4, 3, 9] = 1
    assert bounding_box(mask) == (slice(2, 5), slice(3, 5), slice(6, 10))
