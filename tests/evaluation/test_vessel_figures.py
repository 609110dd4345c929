"""Figures of lumen masks against shapes whose answer is known, and against MONAI's."""

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from scipy import ndimage

from aneurysm.data.scan import Grid, Lesion
from aneurysm.evaluation.vessels import betti_numbers, hausdorff_95, vessel_figures


def grid_of(shape: tuple[int, int, int], spacing: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> Grid:
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = spacing
    affine[3, 3] = 1
    return Grid(shape, affine)


def tube(grid: Grid, centre: tuple[float, float], radius: float, low: float, high: float) -> np.ndarray:
    """Voxels of a tube along z; centre (x, y) and ends in mm."""
    place = grid.to_mm(np.stack(np.mgrid[tuple(slice(n) for n in grid.shape)], -1))
    across = np.hypot(place[..., 0] - centre[0], place[..., 1] - centre[1])
    return (across <= radius) & (place[..., 2] >= low) & (place[..., 2] <= high)


def ball(grid: Grid, centre: tuple[float, float, float], radius: float) -> np.ndarray:
    place = grid.to_mm(np.stack(np.mgrid[tuple(slice(n) for n in grid.shape)], -1))
    return np.linalg.norm(place - np.array(centre), axis=-1) <= radius


GRID = grid_of((60, 50, 50))


def test_a_perfect_mask():
    truth = tube(GRID, (12, 12), 1.5, 3, 27)
    figures = vessel_figures(truth, truth, GRID)
    assert (figures.recall, figures.precision, figures.dice, figures.cldice) == (1, 1, 1, 1)
    assert (figures.betti0_error, figures.betti1_error, figures.hd95_mm) == (0, 0, 0)
    assert figures.aneurysms == 0 and figures.row()["recall_1_25_to_2mm"] == 1


def test_betti_numbers_of_known_shapes():
    torus = np.zeros((12, 20, 20), bool)
    torus[5:8, 4:16, 4:16] = True
    torus[5:8, 8:12, 8:12] = False
    shell = np.zeros((12, 20, 20), bool)
    shell[2:9, 2:9, 2:9] = True
    shell[5, 5, 5] = False
    assert betti_numbers(torus) == (1, 1, 0)
    assert betti_numbers(shell) == (1, 0, 1)
    two = np.zeros((24, 20, 20), bool)
    two[:12], two[12:] = torus, shell
    assert betti_numbers(two) == (2, 1, 1)
    touching_rim = np.ones((4, 4, 4), bool)
    touching_rim[1:3, 1:3] = False
    assert betti_numbers(touching_rim) == (1, 1, 0)  # outside the volume is background
    assert betti_numbers(np.zeros((3, 3, 3), bool)) == (0, 0, 0)


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.2, 0.4, 0.6)])
def test_hd95_is_that_of_monai(spacing):
    rng = np.random.default_rng(0)
    masks = [ndimage.gaussian_filter(rng.normal(size=(30, 32, 34)), 2.0) > 0.06 for _ in range(2)]
    for mask in masks:
        mask[[0, 1, -1, -2]] = False
        mask[:, [0, 1, -1, -2]] = False
        mask[:, :, [0, 1, -1, -2]] = False
    theirs = compute_hausdorff_distance(
        *(torch.from_numpy(m)[None, None].float() for m in masks),
        include_background=True,
        percentile=95,
        spacing=spacing,
    )
    assert hausdorff_95(masks[0], masks[1], np.array(spacing)) == pytest.approx(float(theirs), rel=1e-5)


def test_recall_by_radius_tells_thin_from_thick():
    thin, middle = tube(GRID, (5, 5), 0.6, 3, 27), tube(GRID, (12, 5), 1.0, 3, 27)
    wide, wider = tube(GRID, (5, 15), 1.6, 3, 27), tube(GRID, (15, 15), 3.0, 3, 27)
    truth = thin | middle | wide | wider
    row = vessel_figures(middle | wider, truth, GRID).row()
    assert row["recall_below_0_75mm"] == 0 and row["recall_1_25_to_2mm"] == 0
    assert row["recall_0_75_to_1_25mm"] == 1 and row["recall_from_2mm"] == 1
    without_thin = vessel_figures(wide, wide, GRID).row()
    assert np.isnan(without_thin["recall_below_0_75mm"])


def test_a_sac_is_no_wide_vessel():
    vessel, sac = tube(GRID, (12, 12), 1.0, 3, 27), ball(GRID, (15, 12, 15), 2.5)
    labels = (sac & ~vessel).astype(np.uint8)
    row = vessel_figures(vessel, vessel | sac, GRID, sacs=labels).row()
    assert np.isnan(row["recall_from_2mm"]) or row["recall_from_2mm"] == 1
    assert row["recall_0_75_to_1_25mm"] == 1 and row["recall"] < 1


def test_aneurysms_in_the_mask_by_both_definitions():
    vessel = tube(GRID, (12, 12), 1.0, 3, 27)
    centres = [(15.0, 12.0, 8.0), (15.0, 12.0, 15.0), (9.0, 12.0, 22.0)]
    labels = np.zeros(GRID.shape, np.uint8)
    for k, centre in enumerate(centres, start=1):
        labels[ball(GRID, centre, 2.0)] = k
    lesions = [Lesion(np.array(c), 2.0) for c in centres]
    half_of_second = ball(GRID, centres[1], 2.0) & ~ball(GRID, centres[1], 0.6)  # a shell: all but the middle
    core_of_third = ball(GRID, centres[2], 1.0)
    mask = vessel | ball(GRID, centres[0], 2.0) | half_of_second | core_of_third
    figures = vessel_figures(mask, vessel | (labels > 0), GRID, lesions, labels)
    assert (figures.aneurysms, figures.aneurysms_centre, figures.aneurysms_half) == (3, 2, 2)
    # Without drawn sacs the balls of the lesions stand for them.
    by_ball = vessel_figures(mask, None, GRID, lesions)
    assert (by_ball.aneurysms, by_ball.aneurysms_centre, by_ball.aneurysms_half) == (3, 2, 2)
    assert np.isnan(by_ball.dice) and np.isnan(by_ball.row()["recall_from_2mm"])
    outside = [Lesion(np.array([-30.0, 0, 0]), 2.0)]
    assert vessel_figures(mask, None, GRID, outside).aneurysms == 0


def test_gaps_and_bridges_show_in_topology_not_in_dice():
    truth = tube(GRID, (12, 12), 1.5, 3, 27)
    cut = truth.copy()
    cut[30] = False
    figures = vessel_figures(cut, truth, GRID)
    assert figures.dice > 0.98 and figures.betti0_error == 1 and figures.cldice < 1
    other = tube(GRID, (12, 18), 1.5, 3, 27)
    ladder = truth | other
    for z in (20, 40):
        ladder[z, 24:36, 24] = True
    assert vessel_figures(ladder, truth | other, GRID).betti1_error == 1


def test_what_has_no_value_is_nan():
    empty, truth = np.zeros(GRID.shape, bool), tube(GRID, (12, 12), 1.5, 3, 27)
    nothing = vessel_figures(empty, truth, GRID)
    assert nothing.recall == 0 and np.isnan(nothing.precision) and np.isnan(nothing.hd95_mm)
    assert nothing.cldice == 0 and nothing.betti0_error == 1
    neither = vessel_figures(empty, empty, GRID)
    assert np.isnan(neither.recall) and np.isnan(neither.dice) and np.isnan(neither.cldice)
    with pytest.raises(ValueError, match="does not lie"):
        vessel_figures(empty, truth[:-1], GRID)


def test_flips_and_axis_orders_change_nothing():
    truth = tube(GRID, (12, 12), 1.4, 3, 27) | tube(GRID, (6, 18), 0.7, 3, 20)
    rng = np.random.default_rng(1)
    found = truth & (ndimage.gaussian_filter(rng.normal(size=GRID.shape), 2) > -0.1)
    usual = vessel_figures(found, truth, GRID).row()
    turned = vessel_figures(
        found[::-1, :, ::-1].transpose(1, 2, 0),
        truth[::-1, :, ::-1].transpose(1, 2, 0),
        grid_of((50, 50, 60)),
    ).row()
    for name in ("recall", "precision", "dice", "betti0_error", "betti1_error", "hd95_mm"):
        assert usual[name] == pytest.approx(turned[name]), name
    assert usual["cldice"] == pytest.approx(turned["cldice"], abs=0.05)
