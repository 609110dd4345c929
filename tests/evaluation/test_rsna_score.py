"""The challenge score against scikit-learn and the official formula."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, PRESENT
from aneurysm.evaluation.rsna_score import combined, resampled_auc, resampled_columns, rsna_score

TOLERANCE = 1e-6  # torchmetrics integrates in float32


@pytest.fixture
def scans() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    truth = (rng.random((80, 14)) < 0.25).astype(float)
    probability = np.clip(0.25 * truth + 0.7 * rng.random((80, 14)), 0, 1).round(2)  # rounded: ties
    return truth, probability


def test_equals_the_official_formula(scans):
    truth, probability = scans
    areas = np.array([roc_auc_score(truth[:, c], probability[:, c]) for c in range(14)])
    expected = 0.5 * areas[-1] + 0.5 * areas[:13].mean()
    result = rsna_score(truth, probability)
    assert result.score == pytest.approx(expected, abs=TOLERANCE)
    assert result.present == pytest.approx(areas[-1], abs=TOLERANCE)
    assert result.locations == pytest.approx(areas[:13].mean(), abs=TOLERANCE)
    assert result.left_out == ()
    np.testing.assert_allclose([result.per_column[name] for name in LABEL_COLUMNS], areas, atol=TOLERANCE)


def test_a_column_of_one_class_is_left_out_and_named(scans):
    truth, probability = scans
    truth[:, 0] = 0
    truth[:, 4] = 1
    truth[:, 7] = np.nan
    result = rsna_score(truth, probability)
    assert [name for name, _ in result.left_out] == [LOCATIONS[0], LOCATIONS[4], LOCATIONS[7]]
    assert dict(result.left_out)[LOCATIONS[0]] == "no positive among 80 scans"
    rest = [c for c in range(13) if c not in (0, 4, 7)]
    areas = {c: roc_auc_score(truth[:, c], probability[:, c]) for c in (*rest, 13)}
    expected = (13 * areas[13] + sum(areas[c] for c in rest)) / (13 + len(rest))
    assert result.score == pytest.approx(expected, abs=TOLERANCE)


def test_unknown_labels_are_skipped_per_column(scans):
    truth, probability = scans
    truth[10:40, 2] = np.nan
    known = np.isfinite(truth[:, 2])
    expected = roc_auc_score(truth[known, 2], probability[known, 2])
    assert rsna_score(truth, probability).per_column[LOCATIONS[2]] == pytest.approx(expected, abs=TOLERANCE)


def test_nothing_to_score_is_nan_not_zero():
    result = rsna_score(np.full((5, 14), np.nan), np.full((5, 14), 0.5))
    assert np.isnan(result.score) and np.isnan(result.present) and len(result.left_out) == 14


def test_resampled_equals_repeating_the_scans(scans):
    truth, probability = scans
    truth[:7, -1] = np.nan
    weights = np.random.default_rng(0).integers(0, 4, size=(5, len(truth)))
    for row, area in zip(weights, resampled_auc(truth[:, -1], probability[:, -1], weights), strict=True):
        drawn = np.repeat(np.arange(len(truth)), row)
        drawn = drawn[np.isfinite(truth[drawn, -1])]
        assert area == pytest.approx(roc_auc_score(truth[drawn, -1], probability[drawn, -1]), abs=1e-12)


def test_one_draw_of_every_scan_gives_the_score(scans):
    truth, probability = scans
    truth[:, 3] = 0
    once = resampled_columns(truth, probability, np.ones((1, len(truth))))
    assert np.isnan(once[0, 3])
    assert combined(once)[0] == pytest.approx(rsna_score(truth, probability).score, abs=TOLERANCE)


@pytest.mark.parametrize("bad", [np.nan, 1.2, -0.1])
def test_a_bad_probability_is_refused_with_its_column(scans, bad):
    truth, probability = scans
    probability[3, 13] = bad
    with pytest.raises(ValueError, match=f"row 3, column '{PRESENT}'"):
        rsna_score(truth, probability)


def test_wrong_width_is_refused(scans):
    truth, probability = scans
    with pytest.raises(ValueError, match="submission order"):
        rsna_score(truth[:, :13], probability[:, :13])
