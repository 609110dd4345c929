"""The region of interest: where it is put, when it is doubtful, and what the coarse net learns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid, Lesion
from aneurysm.stages.coarse import coarse_net, train_coarse
from aneurysm.stages.roi import (
    Roi,
    RoiSettings,
    coarse_image,
    coarse_target,
    find_roi,
    is_large,
    locate,
    share_of_lesions,
    within,
)
from aneurysm.stages.windows import Box, Region

SETTINGS = RoiSettings(3.0, (60.0, 60.0, 90.0), 0.5, 0.6, "whole", exact=False)


def grid_of(shape: tuple[int, int, int], spacing: float, low: float = 0.0) -> Grid:
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = spacing
    affine[:3, 3], affine[3, 3] = low, 1
    return Grid(shape, affine)


FINE, COARSE = grid_of((180, 200, 170), 1.0), grid_of((60, 67, 57), 3.0, 1.0)


def blob(*boxes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> np.ndarray:
    """Sure voxels in boxes given by start and stop on the coarse grid."""
    probability = np.full(COARSE.shape, 0.01, np.float32)
    for start, stop in boxes:
        probability[Box(start, stop).slices] = 0.9
    return probability


def test_the_region_lies_around_the_arteries():
    roi = locate(blob(((20, 25, 15), (32, 35, 35))), COARSE, FINE, SETTINGS)
    assert roi.box is not None and "100%" in roi.note
    np.testing.assert_allclose(roi.box.start, (48, 60, 30), atol=1)
    np.testing.assert_allclose(roi.box.stop, (108, 120, 120), atol=1)


def test_what_is_larger_is_cut_to_the_fullest_part():
    # A trunk 15 mm wide through the whole height under a circle of 90 mm: the box keeps the circle.
    trunk, circle = ((0, 28, 26), (44, 33, 31)), ((34, 22, 14), (44, 42, 44))
    roi = locate(blob(trunk, circle), COARSE, FINE, SETTINGS)
    assert roi.box is not None
    assert max(roi.box.size) <= 91 and roi.box.size[0] <= 61
    assert roi.box.start[0] <= 34 * 3 and roi.box.stop[0] >= 44 * 3


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([], "hardly any artery"),
        ([((5, 5, 5), (17, 17, 17)), ((45, 50, 40), (57, 62, 52))], "only 50% of the arteries"),
        ([((20, 25, 25), (32, 35, 32))], "21 mm wide"),
        ([((54, 25, 15), (60, 35, 35))], "at the border"),
    ],
)
def test_a_doubtful_region_falls_back_to_the_whole_scan_and_says_why(boxes, reason):
    roi = locate(blob(*boxes), COARSE, FINE, SETTINGS)
    assert roi.region is None and reason in roi.note
    taken = locate(blob(*boxes), COARSE, FINE, replace(SETTINGS, fallback="region"))
    if boxes:
        assert taken.box is not None and reason in taken.note and "doubtful" in taken.note
        taken.box.check_inside(FINE.shape)
    else:
        assert taken.region is None


def test_a_mirrored_scan_has_the_mirrored_region():
    probability = blob(((20, 25, 10), (32, 35, 30)))
    plain = locate(probability, COARSE, FINE, SETTINGS).box
    middle = grid_of(COARSE.shape, 3.0, 1.0)
    mirrored = locate(probability[:, :, ::-1], middle, FINE, SETTINGS).box
    assert plain is not None and mirrored is not None
    assert plain.start[:2] == mirrored.start[:2] and plain.stop[:2] == mirrored.stop[:2]
    # The coarse grid ends at 171 mm, the fine one at 170.
    assert abs((171 - plain.stop[2]) - mirrored.start[2]) <= 1


def test_it_is_kept_as_json():
    for roi in (Roi(None, "why"), Roi(Region(Box((1, 2, 3), (4, 5, 6)), True), "where")):
        assert Roi.from_plain(json.loads(json.dumps(roi.plain()))) == roi


@pytest.mark.parametrize(
    "wrong",
    [
        {"size_mm": (60, 60)},
        {"min_probability": 0.0},
        {"fallback": "none"},
        {"spacing_mm": 0},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError):
        replace(SETTINGS, **wrong)


def head(rng: np.random.Generator, uid: str) -> PreparedCase:
    """Noise with bright tubes, a ring and a line, somewhere in it; 1.5 mm voxels."""
    shape = (70, 76, 72)
    image = rng.normal(0, 0.4, shape).astype(np.float32)
    centre = np.array([30, 38, 36]) + rng.integers(-6, 7, 3)
    z, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    ring = np.abs(np.hypot(y - centre[1], x - centre[2]) - 10) + np.abs(z - centre[0]) < 2
    line = (np.abs(y - centre[1]) < 1.5) & (np.abs(z - centre[0]) < 1.5) & (np.abs(x - centre[2]) < 18)
    vessel = ring | line
    image[vessel] += 3
    grid = grid_of(shape, 1.5)
    sac = np.zeros(shape, np.uint8)
    sac[tuple(slice(c, c + 3) for c in centre)] = 1
    lesion = Lesion(grid.to_mm(centre + 1.0), 2.0)
    return PreparedCase(
        uid, uid, "MRA", image, grid, vessel.astype(np.uint8), sac, (lesion,), None, None, True,
        np.full(13, np.nan, np.float32), grid, 0.0,
    )  # fmt: skip


SMALL = RoiSettings(3.0, (40.0, 50.0, 65.0), 0.5, 0.6, "whole", exact=False)


def test_a_coarse_net_learns_to_find_the_region_and_is_reproducible():
    rng = np.random.default_rng(0)
    cases = [head(rng, str(i)) for i in range(6)]
    pairs = []
    for case in cases[:4]:
        image, grid = coarse_image(case, SMALL)
        assert image.shape == grid.shape == (35, 38, 36)
        pairs.append((image, coarse_target(case, grid)))
    net = train_coarse(pairs, steps=30, seed=1)
    for case in cases[4:]:
        roi = find_roi([net], case, SMALL)
        assert roi.box is not None, roi.note
        assert share_of_lesions(case, roi.box) == 1
        assert within(case, roi.box).vessel.sum() > 0.9 * case.vessel.sum()
    first, again = train_coarse(pairs[:2], 3, 5).state_dict(), train_coarse(pairs[:2], 3, 5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_small_scans_and_missing_nets_are_looked_at_whole():
    case = head(np.random.default_rng(1), "a")
    assert is_large(case.grid, SMALL) and not is_large(case.grid, replace(SMALL, size_mm=(90, 90, 120)))
    assert "hardly larger" in find_roi([coarse_net()], case, replace(SMALL, size_mm=(90, 90, 120))).note
    none = find_roi([], case, SMALL)
    assert none.region is None and "no coarse net" in none.note
    assert share_of_lesions(case, None) == 1 and within(case, None) is case


def test_what_lies_outside_is_not_annotated_and_counts_as_lost():
    case = head(np.random.default_rng(2), "a")
    corner = Box((0, 0, 0), (20, 20, 20))
    inside = within(case, corner)
    assert inside.vessel is not None and not inside.vessel.any() and inside.image is case.image
    assert share_of_lesions(case, corner) == 0
    unlabelled = replace(case, vessel=None, aneurysm=None, lesions=())
    assert within(unlabelled, corner).vessel is None
    assert np.isnan(share_of_lesions(unlabelled, corner))
    with pytest.raises(ValueError, match="not annotated"):
        coarse_target(unlabelled, case.grid)
