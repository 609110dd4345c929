"""Augmentation: replayable, labels follow left and right, geometry follows the grid."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aneurysm.data.augment import (
    Augmentation,
    augment_case,
    augment_patch,
    change_intensity,
    ghosted,
    move,
)
from aneurysm.data.labels import LOCATIONS, MIRRORED_LOCATION, VESSEL_LABEL
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid, Lesion

OFF = Augmentation(
    mirror_chance=0, affine_chance=0, gamma_chance=0, intensity_chance=0, blur_chance=0,
    low_resolution_chance=0, bias_chance=0, noise_chance=0,
)  # fmt: skip
ALL = Augmentation(
    mirror_chance=0.5, flip_chance=0.5, affine_chance=1, gamma_chance=1, intensity_chance=1, blur_chance=1,
    low_resolution_chance=1, bias_chance=1, noise_chance=1, ghost_chance=1, ringing_chance=1, spike_chance=1,
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


@pytest.mark.parametrize(
    "part", ["gamma", "intensity", "blur", "low_resolution", "bias", "noise", "ghost", "ringing", "spike"]
)
def test_each_intensity_change_alone(case, part):
    only = dataclasses.replace(OFF, **{f"{part}_chance": 1.0})
    image, (mask,), plan = augment_patch(case.image, [case.aneurysm], np.random.default_rng(1), only, "MRA")
    assert image.dtype == np.float32 and np.isfinite(image).all() and image.shape == case.image.shape
    assert not np.array_equal(image, case.image)
    np.testing.assert_array_equal(mask, case.aneurysm)
    # The aneurysm is still the brightest thing.
    assert image[case.aneurysm == 1].mean() > image[case.aneurysm == 0].mean() + 1
    if part in ("bias", "ghost", "ringing", "spike"):
        untouched, _, _ = augment_patch(case.image, [], np.random.default_rng(1), only, "CTA")
        np.testing.assert_array_equal(untouched, case.image)  # CT has no coils
        assert getattr(plan, part) is not None


def test_chances_are_kept():
    plans = [Augmentation().draw(np.random.default_rng(i)) for i in range(600)]
    assert 0.42 < np.mean([p.mirror for p in plans]) < 0.58
    assert not any(p.flip_up or p.flip_front for p in plans)
    assert 0.13 < np.mean([p.moves for p in plans]) < 0.27
    noise = [p.noise for p in plans if p.noise is not None]
    assert 0.2 < len(noise) / 600 < 0.4 and min(noise) >= 0 and max(noise) <= 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_a_mirrored_patch_is_the_mirrored_patient(seed):
    """Each voxel's label names the artery on the other side, whatever the labels are."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(3, 9, 3))
    grid = Grid(shape, np.array([[0, 0, 0.8, -4], [0, 0.8, 0, 5], [0.8, 0, 0, 9], [0, 0, 0, 1.0]]))
    vessel = rng.integers(0, 15, shape).astype(np.uint8)
    aneurysm = rng.integers(0, 4, shape).astype(np.uint8)
    locations = rng.choice([0, 1, np.nan], len(LOCATIONS)).astype(np.float32)
    lesions = tuple(
        Lesion(grid.to_mm(rng.uniform(0, shape)), 1.0, int(rng.integers(len(LOCATIONS)))) for _ in range(3)
    )
    case = PreparedCase(
        "s", "p", "MRA", rng.normal(size=shape).astype(np.float32), grid, vessel, aneurysm, lesions,
        None, None, True, locations, grid, 0.0,
    )  # fmt: skip
    changed, _ = augment_case(case, rng, dataclasses.replace(OFF, mirror_chance=1))
    name_of = {label: LOCATIONS[i] for i, label in enumerate(VESSEL_LABEL)}

    def other(name: str) -> str:
        swapped = name.replace("Left ", "#").replace("Right ", "Left ").replace("#", "Right ")
        return swapped if name.startswith(("Left ", "Right ")) else name

    for index in np.ndindex(shape):
        mirrored = (*index[:2], shape[2] - 1 - index[2])
        before, after = int(vessel[index]), int(changed.vessel[mirrored])
        assert after == before if before not in name_of else name_of[after] == other(name_of[before])
        assert aneurysm[index] == changed.aneurysm[mirrored] and case.image[index] == changed.image[mirrored]
        # The grid keeps telling where in the patient the voxel was.
        np.testing.assert_allclose(changed.grid.to_mm(mirrored), grid.to_mm(index), atol=1e-9)
    for i, name in enumerate(LOCATIONS):
        j = LOCATIONS.index(other(name))
        assert MIRRORED_LOCATION[i] == j
        np.testing.assert_array_equal(changed.locations[j], locations[i])
    for one, swapped in zip(lesions, changed.lesions, strict=True):
        assert LOCATIONS[swapped.location] == other(LOCATIONS[one.location])
        np.testing.assert_array_equal(swapped.centre_mm, one.centre_mm)


def test_ghosts_repeat_the_head_along_one_axis():
    image = torch.zeros(1, 24, 20, 60)
    image[0, 10:14, 8:12, 28:32] = 1
    changed = ghosted(image, axis=2, ghosts=3, strength=0.3)
    rest = (changed - image)[0, 12, 10]
    assert rest[8:12].abs().min() > 0.02 and rest[48:52].abs().min() > 0.02  # 20 voxels away to either side
    assert (changed - image)[0, :8].abs().max() < 1e-6 and (changed - image)[0, :, :6].abs().max() < 1e-6
    assert abs(float(changed.mean() - image.mean())) < 1e-6
    torch.testing.assert_close(ghosted(image, 1, 4, 0.0), image, atol=1e-6, rtol=0)


def test_what_a_scanner_adds_leaves_the_other_draws_alone():
    on = Augmentation(ghost_chance=1, ringing_chance=1, spike_chance=1)
    for seed in range(20):
        plain, more = (a.draw(np.random.default_rng(seed), "MRA") for a in (Augmentation(), on))
        assert more.ghost and more.ringing is not None and more.spike is not None
        assert dataclasses.replace(more, ghost=None, ringing=None, spike=None) == plain
    with pytest.raises(ValueError, match="at least 2"):
        Augmentation(ghosts=(1, 3))
