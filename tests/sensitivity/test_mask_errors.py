"""Graded errors of lumen masks: as large as asked for, nested, deterministic."""

import numpy as np
import pytest
from scipy import ndimage
from skimage import measure

from aneurysm.data.scan import Grid
from aneurysm.sensitivity.errors import GRADES, MaskError, altered
from aneurysm.vessels.graph import build_graph

GRID = Grid((60, 60, 60), np.diag([0.75, 0.75, 0.75, 1.0])[[2, 1, 0, 3]])


def tree() -> tuple[np.ndarray, np.ndarray]:
    """A trunk with four branches, and a probability that falls from its axis to its surface."""
    mask = np.zeros(GRID.shape, bool)
    mask[4:56, 28:33, 28:33] = True
    mask[14:17, 28:31, 31:54] = True
    mask[26:29, 6:30, 29:32] = True
    mask[38:41, 30:54, 29:32] = True
    mask[47:50, 29:32, 6:30] = True
    rng = np.random.default_rng(0)
    depth = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    return mask, (1 / (1 + np.exp(-depth + rng.normal(0, 0.2, mask.shape)))).astype(np.float32)


MASK, PROBABILITY = tree()


def made(kind: str, level: float, seed: int = 0, name: str = "scan") -> np.ndarray:
    return MaskError(kind, level)(MASK, PROBABILITY, GRID, name, seed)


def test_no_error_changes_nothing_and_leaves_the_input_alone():
    before = MASK.copy()
    np.testing.assert_array_equal(made("none", 0), MASK)
    for kind, levels in GRADES.items():
        assert not np.array_equal(made(kind, levels[0]), MASK), kind
    np.testing.assert_array_equal(MASK, before)


@pytest.mark.parametrize("kind", ["erode", "drop"])
def test_what_is_taken_out_was_there_and_grows_with_the_level(kind):
    masks = [made(kind, level) for level in GRADES[kind]]
    assert all(not (mask & ~MASK).any() for mask in masks)
    sizes = [int(mask.sum()) for mask in masks]
    assert MASK.sum() > sizes[0] and sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


@pytest.mark.parametrize("kind", ["dilate", "blobs"])
def test_what_is_put_in_was_not_there_and_grows_with_the_level(kind):
    masks = [made(kind, level) for level in GRADES[kind]]
    assert all(not (MASK & ~mask).any() for mask in masks)
    sizes = [int(mask.sum()) for mask in masks]
    assert MASK.sum() < sizes[0] < sizes[-1] and sizes == sorted(sizes)


def test_layers_are_those_of_morphology_and_their_parts_the_unlikeliest_voxels():
    np.testing.assert_array_equal(made("erode", 1.0), ndimage.binary_erosion(MASK, border_value=1))
    np.testing.assert_array_equal(made("erode", 2.0), ndimage.binary_erosion(MASK, iterations=2))
    np.testing.assert_array_equal(made("dilate", 1.0), ndimage.binary_dilation(MASK))
    layer = MASK & ~made("erode", 1.0)
    half = MASK & ~made("erode", 0.5)
    assert half.sum() == round(0.5 * layer.sum())
    assert PROBABILITY[half].max() <= PROBABILITY[layer & ~half].min()
    shell = made("dilate", 1.0) & ~MASK
    first = made("dilate", 0.25) & ~MASK
    assert PROBABILITY[first].min() >= PROBABILITY[shell & ~first].max()


def test_a_vessel_that_leaves_the_volume_is_not_peeled_there():
    mask = np.zeros(GRID.shape, bool)
    mask[:, 20:27, 20:27] = True
    assert MaskError("erode", 1)(mask, PROBABILITY, GRID, "scan")[[0, -1], 23, 23].all()


def test_branches_go_whole_and_as_much_as_asked():
    graph = build_graph(MASK, GRID)
    for share in (0.2, 0.4):
        lost = MASK & ~made("drop", share)
        left = build_graph(made("drop", share), GRID)
        gone = 1 - left.edge_length.sum() / graph.edge_length.sum()
        assert abs(gone - share) < 0.13
        # A branch is gone in one piece, not in crumbs.
        sizes = np.bincount(np.asarray(measure.label(lost, connectivity=3)).ravel())[1:]
        assert len(sizes) <= 4 and sizes.max() > 50
    np.testing.assert_array_equal(made("drop", 1.0) & ~MASK, np.zeros_like(MASK))


def test_blobs_are_balls_away_from_the_vessels():
    added = made("blobs", 5) & ~MASK
    label = np.asarray(measure.label(added, connectivity=3))
    assert 1 <= label.max() <= 5
    away = ndimage.distance_transform_edt(~MASK, sampling=GRID.spacing)
    assert away[added].min() >= 4.0 - 0.75
    assert added.sum() * GRID.voxel_mm3 >= 0.7 * 5 * 4 / 3 * np.pi * 1.5**3 * 0.8


def test_errors_depend_on_seed_and_scan_and_on_nothing_else():
    for kind, level in (("drop", 0.4), ("blobs", 10)):
        np.testing.assert_array_equal(made(kind, level), made(kind, level))
        assert not np.array_equal(made(kind, level), made(kind, level, seed=1))
        assert not np.array_equal(made(kind, level), made(kind, level, name="another"))


def test_probabilities_follow_the_mask():
    mask = made("dilate", 0.5) & (made("erode", 0.5) | ~MASK)
    before = PROBABILITY >= 0.5
    changed = altered(PROBABILITY, before, mask, 0.5)
    assert (changed[before & ~mask] == 0).all()
    assert (changed[mask & ~before] >= 0.75).all()
    same = before == mask
    np.testing.assert_array_equal(changed[same], PROBABILITY[same])


def test_empty_masks_and_wrong_errors():
    nothing = np.zeros(GRID.shape, bool)
    for kind, levels in GRADES.items():
        assert not MaskError(kind, levels[-1])(nothing, PROBABILITY, GRID, "scan").any()
    with pytest.raises(ValueError, match="no mask error"):
        MaskError("shear", 1)
    for kind, level in (("drop", 1.5), ("erode", -1)):
        with pytest.raises(ValueError, match="no amount"):
            MaskError(kind, level)
