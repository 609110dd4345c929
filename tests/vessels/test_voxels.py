"""The voxel list against the dense way of doing the same."""

import numpy as np
import pytest
from scipy import ndimage

from aneurysm.vessels.depth import depth
from aneurysm.vessels.pieces import cavities, filled, pieces
from aneurysm.vessels.voxels import STEPS, Voxels

EVERYWHERE = np.ones((3, 3, 3))


def blobs(seed: int, level: float, sigma: float = 1.3) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(24, 29, 35)), sigma)
    return noise / noise.std() > level


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int16, np.float32])
def test_list_and_volume_are_the_same(kind):
    mask = blobs(0, 1.0)
    for array in (mask.astype(kind), np.asfortranarray(mask.astype(kind)), 3 * mask[::-1].astype(kind)[::-1]):
        voxels = Voxels.of(array)
        np.testing.assert_array_equal(voxels.to_volume(), mask)
        np.testing.assert_array_equal(voxels.index, np.argwhere(mask))
    assert len(Voxels.of(np.zeros((2, 3, 4)))) == 0


def test_neighbours_against_a_look_up_of_each():
    voxels = Voxels.of(blobs(1, 0.5))
    expected = np.stack([voxels.find(voxels.index + step) for step in STEPS], axis=1)
    np.testing.assert_array_equal(voxels.neighbours, expected)
    inside = voxels.neighbours < len(voxels)
    values = np.append(np.arange(len(voxels)), -1)[voxels.neighbours]
    assert np.array_equal(values[inside], voxels.neighbours[inside]) and inside.any()


def test_lists_are_sets_of_voxels():
    first, second = blobs(1, 0.5), blobs(2, 0.3)
    a, b = Voxels.of(first), Voxels.of(second)
    np.testing.assert_array_equal(a.plus(b).to_volume(), first | second)
    np.testing.assert_array_equal(a.minus(b).to_volume(), first & ~second)
    np.testing.assert_array_equal(a.among(b), second[tuple(a.index.T)])
    assert not len(a.minus(a)) and a.plus(a.minus(a)) is a
    mixed = np.random.default_rng(0).permutation(np.concatenate([a.index, a.index[:50]]))
    again = Voxels.at_index(a.shape, mixed)
    np.testing.assert_array_equal(again.key, a.key)
    assert again.key.dtype == a.key.dtype and not len(Voxels.at_index(a.shape, a.index[:0]))


@pytest.mark.parametrize("seed", range(6))
def test_pieces_and_cavities_against_labels(seed: int):
    mask = blobs(seed, 1.2 if seed % 2 else -0.9)
    voxels = Voxels.of(mask)
    label, expected = ndimage.label(mask, EVERYWHERE)
    count, piece = pieces(voxels)
    assert count == expected
    assert len(set(zip(piece.tolist(), voxels.at(label).tolist(), strict=True))) == count
    whole = ndimage.binary_fill_holes(mask)
    np.testing.assert_array_equal(filled(voxels, 10**6)[0].to_volume(), whole)
    _, length, cavity = cavities(voxels)
    assert length.sum() == (whole & ~mask).sum()
    holes, many = ndimage.label(whole & ~mask)
    assert sorted(np.bincount(cavity, length, many)) == sorted(np.bincount(holes.ravel())[1:])
    if seed % 2 == 0:
        assert many > 3


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.2, 0.4, 0.5)])
@pytest.mark.parametrize("level", [-0.5, 1.0])
def test_depth_against_a_volume_that_goes_on(spacing, level: float):
    mask = blobs(3, level)
    beyond = np.pad(mask, 40, constant_values=True)  # the world past the rim is not outside
    expected = ndimage.distance_transform_edt(beyond, sampling=spacing)[40:-40, 40:-40, 40:-40][mask]
    np.testing.assert_allclose(depth(Voxels.of(mask), np.array(spacing)), expected, rtol=1e-12)
