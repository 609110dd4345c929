"""Names of vessels: labels from probabilities, and the artery at a place."""

import numpy as np
import pytest

from aneurysm.data.labels import LOCATIONS, UNNAMED_VESSEL, VESSEL_LABEL
from aneurysm.data.scan import Grid
from aneurysm.vessels.arteries import NO_ARTERY, artery_at, location_of_label, named_arteries

GRID = Grid((20, 24, 28), np.array([[0, 0, 0.5, -3], [0, 0.5, 0, 7], [1.5, 0, 0, 2], [0, 0, 0, 1.0]]))


def test_labels_and_locations_are_each_others_inverse():
    assert location_of_label(np.array(VESSEL_LABEL)).tolist() == list(range(13))
    assert location_of_label(np.array([[0, UNNAMED_VESSEL, 255]])).tolist() == [[NO_ARTERY] * 3]


def test_the_likeliest_artery_names_what_may_be_lumen():
    lumen = np.full((2, 2, 2), 0.9, np.float32)
    lumen[0, 0, 0] = 0.1
    arteries = np.zeros((13, 2, 2, 2), np.float32)
    arteries[4], arteries[11] = 0.3, 0.2
    arteries[11, 1] = 0.6
    labels = named_arteries(lumen, arteries)
    assert labels.dtype == np.uint8 and labels[0, 0, 0] == 0
    assert labels[0, 1, 1] == VESSEL_LABEL[4] and (labels[1] == VESSEL_LABEL[11]).all()
    with pytest.raises(ValueError, match="13 locations"):
        named_arteries(lumen, arteries[:12])


def test_the_artery_at_a_point_is_the_nearest_in_millimetres():
    labels = np.zeros(GRID.shape, np.uint8)
    labels[4, 12, 14], labels[10, 12, 20] = VESSEL_LABEL[2], VESSEL_LABEL[9]
    labels[7, 12, 17] = UNNAMED_VESSEL
    # Three planes of 1.5 mm are farther than six voxels of 0.5 mm.
    points = GRID.to_mm(np.array([[10, 12, 14], [4, 12, 14], [7, 12, 17], [19, 0, 0]]))
    index, distance = artery_at(labels, GRID, points)
    voxels = GRID.to_mm(np.array([[4, 12, 14], [10, 12, 20]]))
    apart = np.linalg.norm(points[:, None] - voxels, axis=-1)
    assert index.tolist() == np.array([2, 9])[apart.argmin(1)].tolist()
    np.testing.assert_allclose(distance, apart.min(1))
    assert index[0] == 9 and index[1] == 2 and distance[1] == pytest.approx(0)
    assert LOCATIONS[index[0]].startswith("Left Posterior Comm")


def test_no_artery_and_no_point():
    index, distance = artery_at(np.zeros(GRID.shape, np.uint8), GRID, np.zeros((2, 3)))
    assert index.tolist() == [NO_ARTERY] * 2 and np.isinf(distance).all()
    index, distance = artery_at(np.full(GRID.shape, 1, np.uint8), GRID, np.zeros((0, 3)))
    assert len(index) == len(distance) == 0
    with pytest.raises(ValueError):
        artery_at(np.zeros((2, 2, 2), np.uint8), GRID, np.zeros((1, 3)))
