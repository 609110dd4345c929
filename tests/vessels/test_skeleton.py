import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import euler_number

from aneurysm.vessels.skeleton import inside_distance, simple, skeletonise

EVERYWHERE = np.ones((3, 3, 3))


def blobs(seed: int, shape=(30, 34, 38)) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return np.pad(ndimage.gaussian_filter(noise, 1.7) > 0.08, 1)


def thin(mask: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    return skeletonise(mask, inside_distance(mask, np.array(spacing)), min(spacing))


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_straight_tubes_of_even_width_survive(width: int, axis: int):
    # The common implementation of Lee's thinning returns nothing at all here.
    mask = np.zeros((40, 40, 40), bool)
    where = [slice(10, 10 + width)] * 3
    where[axis] = slice(3, 37)
    mask[tuple(where)] = True
    skeleton = thin(mask)
    length = np.ptp(np.argwhere(skeleton)[:, axis]) + 1
    assert ndimage.label(skeleton, EVERYWHERE)[1] == 1
    assert length >= 34 - width - 2
    assert skeleton.sum() <= length + 4  # one voxel thick


@pytest.mark.parametrize("seed", range(4))
def test_thinning_keeps_pieces_tunnels_and_cavities(seed: int):
    mask = blobs(seed)
    skeleton = thin(mask)
    assert not (skeleton & ~mask).any()
    assert ndimage.label(skeleton, EVERYWHERE)[1] == ndimage.label(mask, EVERYWHERE)[1]
    assert euler_number(skeleton, 3) == euler_number(mask, 3)
    assert ndimage.label(~skeleton)[1] == ndimage.label(~mask)[1]
    assert skeleton.sum() < 0.2 * mask.sum()


def test_simple_points_against_the_definition():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 26, 400, dtype=np.uint32) & rng.integers(0, 1 << 26, 400, dtype=np.uint32)
    steps = [s for s in np.argwhere(np.ones((3, 3, 3))) - 1 if np.any(s)]
    faces = ndimage.generate_binary_structure(3, 1)
    near = ndimage.generate_binary_structure(3, 2)  # 18 neighbours and the centre
    for code, answer in zip(codes, simple(codes), strict=True):
        around = np.zeros((3, 3, 3), bool)
        for i, step in enumerate(steps):
            around[tuple(step + 1)] = code >> i & 1
        inside = ndimage.label(around, EVERYWHERE)[1]
        outside = ~around & near
        outside[1, 1, 1] = False
        pieces, _ = ndimage.label(outside)
        touching = {int(p) for p in pieces[faces] if p}
        assert answer == (inside == 1 and len(touching) == 1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.2, 0.4, 0.5)])
def test_distance_is_the_exact_euclidean_one(spacing):
    mask = blobs(7)
    expected = np.where(mask, ndimage.distance_transform_edt(mask, sampling=spacing), 0)
    np.testing.assert_allclose(inside_distance(mask, np.array(spacing)), expected, atol=1e-5)


def test_memory_order_does_not_matter():
    mask = blobs(3)
    assert np.array_equal(thin(mask), thin(np.asfortranarray(mask)))


def test_extreme_masks():
    assert not thin(np.zeros((5, 6, 7), bool)).any()
    single = np.zeros((5, 6, 7), bool)
    single[2, 3, 4] = True
    assert np.array_equal(thin(single), single)
    full = np.ones((5, 6, 7), bool)
    assert np.isfinite(inside_distance(full, np.ones(3))).all()
    assert ndimage.label(thin(full), EVERYWHERE)[1] == 1
