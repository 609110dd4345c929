"""Mending lumen masks: cut vessels are joined, neighbours are not, sacs stay, crumbs go."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from skimage import measure
from synthetic_trees import SACS, TREE, Capsule, cube, draw

from aneurysm.vessels.repair import VesselRules, Violations, repair

GRID = cube(64, 0.75)  # 48 mm
RULES = VesselRules()


def pieces(mask: np.ndarray) -> int:
    return int(np.asarray(measure.label(mask, connectivity=3)).max())


def cut(mask: np.ndarray, middle_mm: float, width_mm: float, axis: int = 0) -> np.ndarray:
    """Without the slices within half a width of a place along an array axis."""
    result = mask.copy()
    at = np.arange(mask.shape[axis]) * 0.75
    gone = [slice(None)] * 3
    gone[axis] = np.abs(at - middle_mm) <= width_mm / 2
    result[tuple(gone)] = False
    return result


def tube(first: tuple, last: tuple, radius: float) -> Capsule:
    return (first, last, radius, radius)


@pytest.mark.parametrize("radius", [0.8, 1.5, 2.5])
@pytest.mark.parametrize("direction", [(0, 0, 1), (0.5, 0, 1), (0.4, 0.6, 1)])
def test_a_cut_vessel_is_joined_with_its_own_width(radius, direction):
    along = 17 * np.array(direction) / np.linalg.norm(direction)
    middle = np.array([24.0, 24.0, 24.0])
    whole = draw(GRID, [tube(middle - along, middle + along, radius)])
    broken = cut(whole, 24, 1.6)
    assert pieces(broken) == 2
    mended = repair(broken, GRID, RULES)
    assert pieces(mended.mask) == 1 and mended.bridged == 1
    assert mended.before == Violations(2, 0, 0, 1) and mended.after == Violations(1, 0, 0, 0)
    new, lost = mended.mask & ~broken, whole & ~broken
    assert (new & lost).sum() >= 0.5 * lost.sum()
    assert (new & ~whole).sum() <= 0.6 * lost.sum() + 20
    assert mended.added_mm3 == pytest.approx(new.sum() * GRID.voxel_mm3)


def test_a_branch_torn_off_its_parent_is_joined_to_its_flank():
    parent = draw(GRID, [tube((24, 24, 5), (24, 24, 43), 2.0)])
    branch = draw(GRID, [tube((28.4, 24, 24), (44, 24, 30), 1.0)])
    torn = parent | branch
    assert pieces(torn) == 2
    mended = repair(torn, GRID, RULES)
    assert mended.bridged == 1 and pieces(mended.mask) == 1


def test_a_tree_that_was_cut_in_several_places_is_whole_again():
    grid = cube(96, 0.75)
    tree = draw(grid, TREE)
    broken = cut(cut(tree, 18, 1.6), 45, 1.6)
    assert pieces(broken) == 4
    mended = repair(broken, grid, RULES)
    assert (mended.bridged, pieces(mended.mask)) == (3, 1)


def test_a_cut_ring_is_closed():
    angles = np.linspace(0, 2 * np.pi, 60)
    points = np.stack([24 + 12 * np.cos(angles), 24 + 12 * np.sin(angles), np.full(60, 24.0)], 1)
    ring = draw(GRID, [tube(a, b, 1.5) for a, b in pairwise(points)])
    open_ = ring.copy()
    open_[:, 31:34, 24:] = False
    assert measure.euler_number(ring, connectivity=3) == 0
    assert pieces(open_) == 1 and measure.euler_number(open_, connectivity=3) == 1
    mended = repair(open_, GRID, RULES)
    assert mended.bridged == 1 and measure.euler_number(mended.mask, connectivity=3) == 0


@pytest.mark.parametrize("space", [3.0, 3.75, 4.5, 6.0])
@pytest.mark.parametrize("shift", [0.0, 4.0, 9.0])
def test_parallel_vessels_are_never_joined(space, shift):
    """Two vessels of radius 1 mm side by side, one of which ends along the other."""
    near = draw(GRID, [tube((24, 20, 4), (24, 20, 44), 1.0)])
    ends = draw(GRID, [tube((24, 20 + space, 4), (24, 20 + space, 30 - shift), 1.0)])
    assert pieces(near | ends) == 2
    mended = repair(near | ends, GRID, replace(RULES, gap_mm=5.0))
    assert mended.bridged == 0 and pieces(mended.mask) == 2


def test_kissing_vessels_of_opposite_direction_stay_apart():
    first = draw(GRID, [tube((24, 20, 4), (24, 20, 26), 1.2)])
    second = draw(GRID, [tube((24, 24, 22), (24, 24, 44), 1.2)])  # begins beside where the first ends
    assert pieces(first | second) == 2
    assert repair(first | second, GRID, replace(RULES, gap_mm=5.0)).bridged == 0


def test_a_gap_too_wide_is_left_and_counted_nowhere():
    broken = cut(draw(GRID, [tube((24, 24, 4), (24, 24, 44), 1.5)]), 24, 8.0)
    mended = repair(broken, GRID, RULES)
    assert mended.bridged == 0 and mended.before.gaps == 0 and pieces(mended.mask) == 2


def test_the_network_has_a_say_in_bridges():
    whole = draw(GRID, [tube((24, 24, 4), (24, 24, 44), 1.5)])
    broken = cut(whole, 24, 1.6)
    doubt = np.where(broken, 0.9, np.where(whole, 0.1, 0.0)).astype(np.float32)
    assert repair(broken, GRID, replace(RULES, gap_probability=0.05), doubt).bridged == 1
    assert repair(broken, GRID, replace(RULES, gap_probability=0.2), doubt).bridged == 0


def test_a_sac_beside_its_vessel_is_joined_and_a_crumb_is_not():
    vessel = draw(GRID, [tube((24, 24, 4), (24, 24, 44), 1.5)])
    sac = draw(GRID, [tube((28.8, 24, 24), (28.8, 24, 24), 1.9)])  # 1.4 mm of nothing between them
    away = draw(GRID, [tube((40, 24, 24), (40, 24, 24), 1.4)])
    rod = draw(GRID, [tube((20.0, 22, 30), (20.0, 22, 33.5), 0.5)])  # as small, but long
    mask = vessel | sac | away | rod
    assert pieces(mask) == 4
    rules = replace(RULES, smallest_mm3=60.0)
    mended = repair(mask, GRID, rules)
    assert pieces(mended.mask) == 1 and mended.mask[sac].all()
    assert not mended.mask[away].any() and not mended.mask[rod].any()
    assert (mended.joined, mended.dropped, mended.before.fragments) == (1, 2, 3)
    alone = repair(mask, GRID, replace(rules, sac_mm=0.0))
    assert not alone.mask[sac].any() and alone.joined == 0


def test_faint_pieces_come_back_only_where_they_are_tied_to_the_mask():
    vessel = draw(GRID, [tube((24, 24, 4), (24, 24, 26), 1.5)])
    beyond = draw(GRID, [tube((24, 24, 30.2), (24, 24, 36), 1.2)])  # its own vessel after a break
    sac = draw(GRID, [tube((28.8, 24, 15), (28.8, 24, 15), 1.9)])
    bone = draw(GRID, [tube((14, 24, 15), (14, 24, 15), 3.0)])  # round, large, and away
    beside = draw(GRID, [tube((24, 28, 6), (24, 28, 22), 0.9)])  # along the vessel: a vein
    faint = vessel | beyond | sac | bone | beside
    mended = repair(vessel, GRID, RULES, faint=faint)
    assert mended.mask[sac].all() and mended.mask[beyond].all()
    assert not mended.mask[bone].any() and not mended.mask[beside].any()
    assert pieces(mended.mask) == 1
    assert (mended.bridged, mended.joined, mended.rescued, mended.dropped) == (1, 1, 2, 0)
    assert mended.before.pieces == 1 and mended.before.fragments == 0
    np.testing.assert_array_equal(repair(vessel, GRID, RULES).mask, vessel)
    off = replace(RULES, gap_mm=0.0, sac_mm=0.0)
    np.testing.assert_array_equal(repair(vessel, GRID, off, faint=faint).mask, vessel)


def test_holes_are_filled_and_a_bay_at_the_rim_is_no_hole():
    solid = draw(GRID, [tube((24, 24, 0), (24, 24, 44), 4.0)])
    hollow = solid.copy()
    hollow[30:33, 31:33, 31:33] = False
    hollow[0, 31, 31] = False
    mended = repair(hollow, GRID, RULES)
    assert (mended.before.holes, mended.filled, mended.after.holes) == (1, 1, 0)
    assert mended.mask[30:33, 31:33, 31:33].all() and not mended.mask[0, 31, 31]


def test_rules_that_are_off_leave_the_mask_alone():
    grid = cube(96, 0.75)
    mask = cut(draw(grid, [*TREE, SACS["sidewall"]]), 45, 1.6)
    off = VesselRules(0, 0, 0, 35, 0, 0, 0)
    mended = repair(mask, grid, off)
    np.testing.assert_array_equal(mended.mask, mask)
    assert not any(mended.row()[name] for name in ("bridged", "joined", "dropped", "filled", "added_mm3"))


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_flips_mend_alike(axes):
    grid = cube(96, 0.75)
    broken = cut(cut(draw(grid, [*TREE, SACS["sidewall"]]), 18, 1.6), 45, 1.6)
    usual, turned = repair(broken, grid, RULES), repair(np.flip(broken, axes), grid, RULES)
    assert usual.before == turned.before and usual.after == turned.after
    back = np.flip(turned.mask, axes)
    new = (usual.mask | back) & ~broken
    assert (usual.mask ^ back).sum() <= 0.25 * new.sum()  # thinning has a parity, so ends move by a voxel


def test_empty_and_single_voxel_masks():
    nothing = repair(np.zeros(GRID.shape, bool), GRID, RULES)
    assert not nothing.mask.any() and nothing.before == Violations()
    dot = np.zeros(GRID.shape, bool)
    dot[5, 5, 5] = True
    assert repair(dot, GRID, RULES).dropped == 1
    assert repair(dot, GRID, VesselRules(smallest_mm3=0.0)).mask.sum() == 1


def test_wrong_input():
    with pytest.raises(ValueError, match="negative"):
        VesselRules(gap_mm=-1)
    with pytest.raises(ValueError, match="must stay below 40"):
        VesselRules(gap_angle_deg=45)
    with pytest.raises(ValueError, match="does not lie"):
        repair(np.zeros((2, 2, 2)), GRID, RULES)
    with pytest.raises(ValueError, match="does not lie"):
        repair(np.zeros(GRID.shape), GRID, RULES, np.zeros((2, 2, 2)))
