"""Mask overlap on counts that fit on one hand."""

import numpy as np
import pytest

from aneurysm.evaluation.segmentation import overlap


def test_counts():
    truth, prediction = np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)
    truth[0, 0, :4] = 3  # labels count as vessel
    prediction[0, 0, 1:4] = 1
    prediction[1, 1, :2] = 1
    result = overlap(prediction, truth)
    assert result.recall == 3 / 4
    assert result.precision == 3 / 5
    assert result.dice == pytest.approx(2 * 3 / 9)
    assert np.isnan(result.cldice)


def test_empty_masks_are_undefined_not_zero():
    empty, full = np.zeros((3, 3, 3)), np.ones((3, 3, 3))
    assert np.isnan(overlap(full, empty).recall)
    assert np.isnan(overlap(empty, full).precision) and overlap(empty, full).dice == 0
    assert np.isnan(overlap(empty, empty, centrelines=True).dice)
    assert overlap(empty, full, centrelines=True).cldice == 0


def test_centre_line_dice_sees_a_gap_that_dice_forgives():
    truth = np.zeros((9, 9, 60), bool)
    truth[2:7, 2:7, 5:55] = True
    gap = truth.copy()
    gap[:, :, 28:32] = False
    thin = np.zeros_like(truth)
    thin[4, 4, 5:55] = True
    whole = overlap(truth, truth, centrelines=True)
    assert whole.cldice == 1.0 and whole.dice == 1.0
    assert overlap(gap, truth, centrelines=True).cldice < 0.97
    along = overlap(thin, truth, centrelines=True)
    assert along.cldice > 0.95 and along.dice < 0.1


def test_shapes_must_match():
    with pytest.raises(ValueError, match="differ in shape"):
        overlap(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
