"""Grids and resampling: exact where it can be, and right against an analytic field where it cannot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from aneurysm.data.resample import canonicalise, crop_grid, isotropic, resample
from aneurysm.data.scan import Grid


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]


def grid_of(seed: int, shape=(6, 7, 8)) -> Grid:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = rotation(seed) * rng.uniform(0.3, 5, 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return Grid(shape, affine)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_index_to_mm_and_back(seed):
    grid = grid_of(seed)
    index = np.random.default_rng(seed).uniform(-5, 500, (20, 3))
    np.testing.assert_allclose(grid.to_index(grid.to_mm(index)), index, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_canonical_axes_keep_every_voxel_in_place(seed):
    grid = grid_of(seed)
    volume = np.random.default_rng(seed).normal(size=grid.shape)
    turned, canonical = canonicalise(volume, grid)
    for index in np.random.default_rng(seed).integers(0, grid.shape, (10, 3)):
        d, h, w = np.rint(canonical.to_index(grid.to_mm(index))).astype(int)
        assert turned[d, h, w] == volume[tuple(index)]
    again, same = canonicalise(turned, canonical)
    assert same.same_as(canonical) and np.array_equal(again, turned)
    # No other assignment of axes is nearer to anatomy, and each grows the right way.
    directions = canonical.affine[:3, :3] / canonical.spacing
    assert (directions[[2, 1, 0], [0, 1, 2]] > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 3]))
def test_resampling_onto_permuted_axes_and_back_is_exact(seed, order):
    grid = grid_of(seed)
    volume = np.random.default_rng(seed).normal(size=grid.shape).astype(np.float32)
    turned, canonical = canonicalise(volume, grid)
    np.testing.assert_array_equal(resample(turned, canonical, grid, order=order), volume)


def analytic(grid: Grid) -> np.ndarray:
    mm = grid.to_mm(np.moveaxis(np.indices(grid.shape), 0, -1))
    return np.prod(np.sin(mm / 6.0 + [0.3, 1.1, 2.0]), axis=-1).astype(np.float32)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("order", "bound"), [(1, 0.03), (3, 0.008)])
def test_against_an_analytic_field(seed, order, bound):
    directions = np.eye(3)[:, ::-1] if seed is None else rotation(seed)
    affine = np.eye(4)
    affine[:3, :3] = directions * [1.2, 0.9, 1.0]
    grid = Grid((40, 44, 48), affine)
    inner = crop_grid(grid, (8, 8, 8), (24, 28, 32))
    # Parallel grids take one path, rotated ones the other.
    turned = np.eye(4)
    turned[:3, :3] = inner.affine[:3, :3] * 0.7 if seed is None else rotation(5) * 0.6
    turned[:3, 3] = inner.centre_mm
    onto = crop_grid(Grid((20, 20, 20), turned), (-10, -10, -10), (20, 20, 20))
    error = resample(analytic(grid), grid, onto, order=order) - analytic(onto)
    assert np.sqrt((error**2).mean()) < bound


def test_labels_keep_their_type_and_outside_is_filled():
    grid = Grid((4, 4, 4), np.eye(4)[[2, 1, 0, 3]])
    labels = np.full(grid.shape, 13, np.uint8)
    far = resample(labels, grid, crop_grid(grid, (-2, 0, 1), (8, 4, 3)), order=0, fill=7)
    assert far.dtype == np.uint8 and far.shape == (8, 4, 3)
    assert (far[:2] == 7).all() and (far[2:6] == 13).all() and (far[6:] == 7).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 3.0))
def test_isotropic_covers_the_grid(seed, spacing):
    grid = grid_of(seed, (20, 30, 25))
    iso = isotropic(grid, spacing)
    expected = np.zeros((3, 3))
    expected[[0, 1, 2], [2, 1, 0]] = spacing
    np.testing.assert_allclose(iso.affine[:3, :3], expected)
    np.testing.assert_allclose(iso.centre_mm, grid.centre_mm, atol=1e-9)
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in grid.shape])).reshape(3, -1).T
    index = iso.to_index(grid.to_mm(corners))
    assert (index > -1.01).all() and (index < np.array(iso.shape) + 0.01).all()


def test_isotropic_keeps_axes_that_are_near_the_target():
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (1.0, 0.71, 0.78, 1)  # (d, h, w) spacing in mm
    grid = Grid((20, 30, 25), affine)
    kept = isotropic(grid, 0.75, keep_within=0.1)
    np.testing.assert_allclose(kept.spacing, [0.75, 0.71, 0.78])
    assert kept.shape[1:] == (30, 25)
    volume = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    np.testing.assert_array_equal(resample(volume, grid, isotropic(grid, 0.75, 0.4)), volume)  # all kept
    np.testing.assert_allclose(isotropic(grid, 0.75, 0.03).spacing, [0.75, 0.75, 0.75])
    # The voxels of an oblique scan lie between those of any canonical grid, so it is always interpolated.
    turned = affine.copy()
    turned[:3, :3] = Rotation.from_euler("x", 5, degrees=True).as_matrix() @ affine[:3, :3]
    np.testing.assert_allclose(isotropic(Grid(grid.shape, turned), 0.75, 0.1).spacing, 0.75)


def test_smoothing_averages_where_voxels_grow_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    grid = Grid((60, 60, 60), np.diag([0.3, 0.3, 0.3, 1.0])[[2, 1, 0, 3]])
    noise = rng.normal(100, 10, grid.shape).astype(np.float32)
    coarse = isotropic(grid, 0.9)
    rough, smooth = (resample(noise, grid, coarse, smooth=s) for s in (False, True))
    assert smooth.std() < 0.5 * rough.std()
    assert abs(smooth.mean() - 100) < 0.2
    fine = isotropic(grid, 0.3)
    np.testing.assert_array_equal(resample(noise, grid, fine, smooth=True), noise)


def test_wrong_arguments():
    grid = grid_of(0)
    with pytest.raises(ValueError, match="orders 0, 1 and 3"):
        resample(np.zeros(grid.shape), grid, grid, order=2)
    with pytest.raises(ValueError, match="its grid"):
        resample(np.zeros((2, 2, 2)), grid, grid)
    with pytest.raises(ValueError, match="positive"):
        isotropic(grid, 0)
