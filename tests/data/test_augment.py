"""Augmentation: replayable, labels follow left and right, geometry follows the grid."""

import dataclasses

import numpy as np
import pytest

from aneurysm.data.augment import Augmentation, augment_case, augment_patch, change_intensity, move
from aneurysm.data.labels import LOCATIONS, VESSEL_LABEL
from aneurysm.data.prepared import PreparedCase
from aneurysm.data.scan import Grid, Lesion

OFF = Augmentation(
    mirror_chance=0, affine_chance=0, gamma_chance=0, intensity_chance=0, blur_chance=0,
    low_resolution_chance=0, bias_chance=0, noise_chance=0,
)  # fmt: skip
ALL = Augmentation(
    mirror_chance=0.5, flip_chance=0.5, affine_chance=1, gamma_chance=1, intensity_chance=1, blur_chance=1,
    low_resolution_chance=1, bias_chance=1, noise_chance=1,
)  # fmt: skip
LEFT, RIGHT = (LOCATIONS.index(f"{side} Middle Cerebral Artery") for side in ("Left", "Right"))


@pytest.fixture
def case() -> PreparedCase:
    """A left MCA aneurysm as a bright ball in the left half (low w) of a patch."""
    affine = np.array([[0, 0, 0.8, -40], [0, 0.8, 0, 5], [0.8, 0, 0, 9], [0, 0, 0, 1.0]])
    grid = Grid((32, 36, 40), affine)
    mm = grid.to_mm(np.moveaxis(np.indices(grid.shape), 0, -1))
    centre = grid.to_mm([14, 20, 12])
    ball = np.linalg.norm(mm - centre, axis=-1) < 3.5
    locations = np.zeros(len(LOCATIONS), np.float32)
    locations[LEFT] = 1
    rng = np.random.default_rng(0)
    image = (ball * 4.0 + rng.normal(0, 0.1, grid.shape)).astype(np.float32)
    return PreparedCase(
        "s", "p", "MRA", image, grid, (ball * VESSEL_LABEL[LEFT]).astype(np.uint8), ball.astype(np.uint8),
        (Lesion(centre, 3.5, LEFT),), 50.0, "F", True, locations, grid, -1.0,
    )  # fmt: skip


def test_mirror_swaps_left_and_right_everywhere(case):
    changed, plan = augment_case(case, np.random.default_rng(0), dataclasses.replace(OFF, mirror_chance=1))
    assert plan.mirror
    np.testing.assert_array_equal(changed.image, case.image[..., ::-1])
    assert changed.locations[RIGHT] == 1 and changed.locations[LEFT] == 0
    assert changed.lesions[0].location == RIGHT
    assert set(np.unique(changed.vessel)) == {0, VESSEL_LABEL[RIGHT]}
    assert set(np.unique(changed.aneurysm)) == {0, 1}  # lesion numbers have no side
    np.testing.assert_array_equal(changed.aneurysm, case.aneurysm[..., ::-1])
    twice, _ = augment_case(changed, np.random.default_rng(0), dataclasses.replace(OFF, mirror_chance=1))
    np.testing.assert_array_equal(twice.vessel, case.vessel)
    np.testing.assert_array_equal(twice.locations, case.locations)
    assert twice.grid.same_as(case.grid)


@pytest.mark.parametrize("seed", range(6))
def test_the_grid_still_finds_the_lesion(case, seed):
    strong = dataclasses.replace(ALL, degrees=25, zoom=0.2)
    changed, _ = augment_case(case, np.random.default_rng(seed), strong)
    found = np.argwhere(changed.aneurysm).mean(0)
    np.testing.assert_allclose(changed.grid.to_index(case.lesions[0].centre_mm), found, atol=0.5)
    np.testing.assert_allclose(np.argwhere(changed.image > 2).mean(0), found, atol=1.2)
    volume = changed.aneurysm.sum() * changed.grid.voxel_mm3
    np.testing.assert_allclose(volume, case.aneurysm.sum() * case.grid.voxel_mm3, rtol=0.15)


def test_same_state_same_patch_and_other_state_other_patch(case):
    first, plan = augment_case(case, np.random.default_rng(3), ALL)
    np.random.seed(0)  # a global generator must play no part
    again, plan_again = augment_case(case, np.random.default_rng(3), ALL)
    assert plan == plan_again
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(
        first.image, change_intensity(move(case.image, plan, 1, case.background), plan)
    )
    other, _ = augment_case(case, np.random.default_rng(4), ALL)
    assert np.abs(other.image - first.image).max() > 0.1


def test_nothing_switched_on_changes_nothing(case):
    image, (mask,), plan = augment_patch(case.image, [case.vessel], np.random.default_rng(0), OFF)
    np.testing.assert_array_equal(image, case.image)
    np.testing.assert_array_equal(mask, case.vessel)
    assert not plan.mirror and not plan.moves


@pytest.mark.parametrize("part", ["gamma", "intensity", "blur", "low_resolution", "bias", "noise"])
def test_each_intensity_change_alone(case, part):
    only = dataclasses.replace(OFF, **{f"{part}_chance": 1.0})
    image, (mask,), plan = augment_patch(case.image, [case.aneurysm], np.random.default_rng(1), only, "MRA")
    assert image.dtype == np.float32 and np.isfinite(image).all() and image.shape == case.image.shape
    assert not np.array_equal(image, case.image)
    np.testing.assert_array_equal(mask, case.aneurysm)
    # The aneurysm is still the brightest thing.
    assert image[case.aneurysm == 1].mean() > image[case.aneurysm == 0].mean() + 1
    if part == "bias":
        untouched, _, _ = augment_patch(case.image, [], np.random.default_rng(1), only, "CTA")
        np.testing.assert_array_equal(untouched, case.image)  # CT has no coils
        assert plan.bias is not None


def test_chances_are_kept():
    plans = [Augmentation().draw(np.random.default_rng(i)) for i in range(600)]
    assert 0.42 < np.mean([p.mirror for p in plans]) < 0.58
    assert not any(p.flip_up or p.flip_front for p in plans)
    assert 0.13 < np.mean([p.moves for p in plans]) < 0.27
    noise = [p.noise for p in plans if p.noise is not None]
    assert 0.2 < len(noise) / 600 < 0.4 and min(noise) >= 0 and max(noise) <= 0.1
