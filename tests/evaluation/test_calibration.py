"""Calibration on cases whose answer is known."""

import numpy as np
import pytest

from aneurysm.evaluation.calibration import calibration


def test_hand_computed_bins():
    p = np.array([0.05, 0.05, 0.95, 0.95, 0.55])
    truth = np.array([0, 0, 1, 0, np.nan])
    result = calibration(truth, p)
    np.testing.assert_allclose(result.predicted, [0.05, 0.95])
    np.testing.assert_allclose(result.observed, [0.0, 0.5])
    assert result.count.tolist() == [2, 2] and result.cases == 4
    assert result.ece == pytest.approx(0.5 * 0.05 + 0.5 * 0.45)
    assert result.brier == pytest.approx(np.mean([0.05**2, 0.05**2, 0.05**2, 0.95**2]))
    assert result.prevalence == 0.25


def test_perfect_probabilities_have_a_small_error():
    rng = np.random.default_rng(0)
    p = rng.random(20000)
    assert calibration((rng.random(20000) < p).astype(float), p).ece < 0.02


def test_one_is_in_the_last_bin_and_nothing_known_is_nan():
    assert calibration(np.array([1.0, 1.0]), np.array([1.0, 1.0])).count.tolist() == [2]
    assert np.isnan(calibration(np.array([np.nan]), np.array([0.5])).ece)


def test_a_logit_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        calibration(np.array([1.0]), np.array([3.0]))
