import numpy as np
import pytest
from scipy import ndimage

from aneurysm.physics.lumen import wall_function

AXIS = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])


def lumen_of(tube, sigma_mm: float):
    lumen = wall_function(tube.prob, tube.spacing, sigma_mm, tube.path)
    assert lumen is not None
    return lumen


def test_jets_at_voxel_centres_are_gaussian_derivatives(tube):
    vessel = tube(radius=3.0, shape=(16, 20, 15), axis=(1.0, 0.4, 0.0), spacing=(1.0, 0.8, 0.9))
    lumen = lumen_of(vessel, 1.1)
    rng = np.random.default_rng(0)
    index = np.stack([rng.integers(0, n, 60) for n in vessel.prob.shape], axis=1)
    jet = lumen.jet((index - (np.array(vessel.prob.shape) - 1) / 2) * vessel.spacing)
    sigma = 1.1 / vessel.spacing

    def filtered(*order: int) -> np.ndarray:
        field = ndimage.gaussian_filter(lumen.indicator, sigma, order=order, mode="nearest", truncate=5.0)
        return field[tuple(index.T)] / np.prod(vessel.spacing ** np.array(order)) / (1 - lumen.level)

    gradient = np.stack([filtered(1, 0, 0), filtered(0, 1, 0), filtered(0, 0, 1)], axis=1)
    laplacian = filtered(2, 0, 0) + filtered(0, 2, 0) + filtered(0, 0, 2)
    np.testing.assert_allclose(jet[:, 0], lumen.field[tuple(index.T)], atol=2e-5)
    np.testing.assert_allclose(jet[:, 1:4], gradient, atol=2e-4)
    np.testing.assert_allclose(jet[:, 4], laplacian, atol=1e-3)


def test_jets_between_voxels_are_the_slope_and_curvature_of_phi(tube):
    vessel = tube(axis=(1.0, 0.3, -0.2))
    lumen = lumen_of(vessel, 1.3)
    points = np.random.default_rng(1).uniform(-6, 6, (40, 3))
    jet, step = lumen.jet(points), 1e-2
    laplacian = np.zeros(40)
    for axis in range(3):
        shift = step * np.eye(3)[axis]
        ahead, behind = lumen.jet(points + shift)[:, 0], lumen.jet(points - shift)[:, 0]
        np.testing.assert_allclose(jet[:, 1 + axis], (ahead - behind) / (2 * step), atol=2e-4)
        laplacian += (ahead - 2 * jet[:, 0] + behind) / step**2
    # The Gaussian is cut at 5 sigma: a voxel that enters the window moves phi by up to 1e-7, over step^2.
    np.testing.assert_allclose(jet[:, 4], laplacian, atol=2e-2)


@pytest.mark.parametrize("radius", [2.0, 3.0, 4.0, 6.0])
def test_wall_lies_at_the_vessel_radius(tube, radius):
    lumen = lumen_of(tube(radius=radius, shape=(24, 29, 29)), max(1.0, 0.35 * radius))
    reach = np.linspace(0, 2 * radius, 400)
    for angle in (0.0, 0.4, np.pi / 4):
        ray = reach[:, None] * np.array([0.0, np.cos(angle), np.sin(angle)])
        wall = reach[(lumen.jet(ray)[:, 0] > 0).sum()]
        assert wall == pytest.approx(radius, rel=0.06)
    centre, outside = lumen.jet(np.array([[0.0, 0.0, 0.0], [0.0, 2 * radius, 0.0]]))[:, 0]
    assert 0.7 < centre <= 1.0 + 1e-6 and outside < 0


def test_vessel_leaves_the_crop_without_a_wall(tube):
    vessel = tube()
    edge = vessel.prob.shape[0] / 2
    assert lumen_of(vessel, 1.2).jet(np.array([[edge, 0.0, 0.0]]))[0, 0] > 0.7


def test_only_the_vessel_with_the_path_remains(tube):
    vessel = tube(radius=3.0)
    prob = vessel.prob.copy()
    prob[5:35, 1:4, 1:4] = 1.0
    lumen = wall_function(prob, vessel.spacing, 1.0, AXIS)
    assert lumen is not None
    np.testing.assert_array_equal(lumen.indicator, vessel.prob)


def test_no_wall_function_without_vessel_or_off_the_vessel(tube):
    vessel = tube(radius=3.0)
    assert wall_function(np.zeros((9, 9, 9)), np.ones(3), 1.0, AXIS) is None
    assert wall_function(vessel.prob, vessel.spacing, 1.0, AXIS + np.array([0.0, 12.0, 0.0])) is None
