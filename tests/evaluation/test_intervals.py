"""The bootstrap: it contains the estimate, draws whole patients, and owns up when it cannot say."""

import numpy as np
import pytest

from aneurysm.evaluation.intervals import bootstrap, resampled_mean
from aneurysm.evaluation.rsna_score import resampled_auc


def test_contains_the_estimate_and_matches_theory():
    values = np.random.default_rng(0).normal(5, 2, size=200)
    (interval,) = bootstrap(lambda w: resampled_mean(values, w), [str(i) for i in range(200)], resamples=2000)
    assert interval.low < values.mean() < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.1)
    assert interval.valid == 2000


def test_scans_of_one_patient_move_together():
    values = np.repeat(np.random.default_rng(0).normal(size=30), 10)

    def width(patients: list[str]) -> float:
        (interval,) = bootstrap(lambda w: resampled_mean(values, w), patients)
        return interval.high - interval.low

    together = width([str(i // 10) for i in range(300)])
    apart = width([str(i) for i in range(300)])
    assert together == pytest.approx(apart * np.sqrt(10), rel=0.25)


def test_same_seed_same_bounds_whatever_the_chunk():
    values = np.arange(20.0)
    patients = [str(i) for i in range(20)]
    first = bootstrap(lambda w: resampled_mean(values, w), patients, resamples=100, seed=7)
    assert first == bootstrap(lambda w: resampled_mean(values, w), patients, resamples=100, seed=7)
    assert first == bootstrap(lambda w: resampled_mean(values, w), patients, resamples=100, seed=7, chunk=9)
    assert first != bootstrap(lambda w: resampled_mean(values, w), patients, resamples=100, seed=8)


def test_resamples_without_both_classes_are_not_counted():
    truth = np.array([1.0, 1.0] + [0.0] * 8)
    score = np.linspace(1, 0, 10)
    (interval,) = bootstrap(lambda w: resampled_auc(truth, score, w)[:, None], [str(i) for i in range(10)])
    assert 800 < interval.valid < 950  # 1 - 0.8^10 = 0.893 of resamples hold a positive
    assert interval.high == 1.0


def test_too_little_to_say_gives_nan():
    (one,) = bootstrap(lambda w: resampled_mean(np.ones(3), w), ["a", "a", "a"])
    assert np.isnan(one.low) and np.isnan(one.high)
    (never,) = bootstrap(lambda w: np.full((len(w), 1), np.nan), ["a", "b"])
    assert never.valid == 0 and np.isnan(never.low)


def test_unknown_values_are_left_out_of_the_mean():
    values = np.array([1.0, np.nan, 3.0])
    weights = np.array([[1, 5, 1], [0, 2, 0]])
    np.testing.assert_array_equal(resampled_mean(values, weights)[:, 0], [2.0, np.nan])


def test_no_scan_is_refused():
    with pytest.raises(ValueError, match="at least one scan"):
        bootstrap(lambda w: w, [])
