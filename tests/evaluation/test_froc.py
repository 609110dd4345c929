"""The free-response curve against hand counts and a slow, obvious matcher."""

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.scan import Lesion
from aneurysm.evaluation.froc import froc


def marks(*rows: tuple[str, float, float]) -> pd.DataFrame:
    """(scan, x in mm, p); y = z = 0."""
    return pd.DataFrame(
        [{"series_uid": uid, "x_mm": x, "y_mm": 0.0, "z_mm": 0.0, "p": p} for uid, x, p in rows],
        columns=["series_uid", "x_mm", "y_mm", "z_mm", "p"],
    )


def lesion(x: float, radius: float | None = None) -> Lesion:
    return Lesion(np.array([x, 0.0, 0.0]), radius)


@pytest.fixture
def example():
    lesions = {"a": [lesion(0), lesion(50)], "b": [lesion(0)]}
    table = marks(
        ("a", 1, 0.9),  # hit
        ("c", 0, 0.8),  # false alarm on a negative scan
        ("a", 2, 0.7),  # duplicate on the first lesion: neither
        ("b", 30, 0.6),  # false alarm on a positive scan
        ("b", 4, 0.5),  # hit
        ("d", 0, 0.4),  # false alarm on a negative scan
    )
    return froc(table, lesions, ["a", "b", "c", "d"])


def test_hand_computed_curve(example):
    curve = example.curve
    assert curve["threshold"].tolist() == [np.inf, 0.9, 0.8, 0.6, 0.5, 0.4]
    np.testing.assert_allclose(curve["sensitivity"], np.array([0, 1, 1, 1, 2, 2]) / 3)
    np.testing.assert_allclose(curve["fp_per_scan"], np.array([0, 0, 1, 2, 2, 3]) / 4)
    np.testing.assert_allclose(curve["fp_per_negative_scan"], np.array([0, 0, 1, 1, 1, 2]) / 2)


def test_hand_computed_operating_points(example):
    assert example.sensitivity_at(0.0) == pytest.approx(1 / 3)
    assert example.sensitivity_at(0.25) == pytest.approx(1 / 3)
    assert example.sensitivity_at(0.5) == pytest.approx(2 / 3)
    assert example.sensitivity_at(8.0) == pytest.approx(2 / 3)
    assert example.cpm == pytest.approx((1 / 3 + 1 / 3 + 5 * 2 / 3) / 7)
    assert example.fp_on_negatives_at(0.5) == pytest.approx(1 / 2)
    assert example.threshold_at(0.5) == 0.5
    assert example.lesions["p"].tolist()[:1] == [0.9] and np.isnan(example.lesions["p"][1])
    assert example.marks["outcome"].tolist().count("duplicate") == 1


def test_every_lesion_found_reaches_one():
    curve = froc(marks(("a", 0, 0.9), ("b", 0, 0.1)), {"a": [lesion(0)], "b": [lesion(0)]}, ["a", "b"])
    assert curve.curve["sensitivity"].iloc[-1] == 1.0
    assert curve.sensitivity_at(0.5) == 1.0


def test_tied_scores_are_joined_by_a_line():
    table = marks(("a", 0, 0.5), ("b", 0, 0.5))
    curve = froc(table, {"a": [lesion(0)]}, ["a", "b"])
    assert curve.sensitivity_at(0.25) == pytest.approx(0.5)
    assert curve.sensitivity_at(0.5) == pytest.approx(1.0)


def test_a_large_lesion_is_hit_within_its_radius():
    assert froc(marks(("a", 7, 0.9)), {"a": [lesion(0, 8.0)]}, ["a"]).sensitivity_at(0) == 1.0
    assert froc(marks(("a", 7, 0.9)), {"a": [lesion(0, 2.0)]}, ["a"]).sensitivity_at(1) == 0.0
    assert froc(marks(("a", 7, 0.9)), {"a": [lesion(0)]}, ["a"], reach_mm=10).sensitivity_at(0) == 1.0


def test_one_mark_finds_one_lesion_only():
    close = {"a": [lesion(0), lesion(4)]}
    one = froc(marks(("a", 1, 0.9)), close, ["a"])
    assert one.sensitivity_at(1) == 0.5 and one.marks["lesion"].tolist() == [0]
    two = froc(marks(("a", 1, 0.9), ("a", 2, 0.5)), close, ["a"])
    assert two.sensitivity_at(0) == 1.0


def test_scans_without_marks_or_lesions_count_in_the_denominator():
    alone = froc(marks(("a", 90, 0.9)), {"a": [lesion(0)]}, ["a"])
    among = froc(marks(("a", 90, 0.9)), {"a": [lesion(0)]}, ["a", "b", "c", "d"])
    assert alone.curve["fp_per_scan"].iloc[-1] == 1.0
    assert among.curve["fp_per_scan"].iloc[-1] == 0.25


def test_marks_of_scans_that_do_not_count_are_ignored():
    curve = froc(marks(("a", 0, 0.9), ("x", 0, 0.95)), {"a": [lesion(0)]}, ["a"])
    assert curve.curve["fp_per_scan"].iloc[-1] == 0.0


def test_no_marks_and_no_lesions():
    missed = froc(marks(), {"a": [lesion(0)]}, ["a"])
    assert missed.sensitivity_at(1) == 0.0 and missed.threshold_at(1) == np.inf
    assert np.isnan(froc(marks(("a", 0, 0.5)), {}, ["a"]).sensitivity_at(1))


def test_resampled_equals_repeating_the_scans():
    rng = np.random.default_rng(0)
    scans = [f"s{i}" for i in range(12)]
    lesions = {uid: [lesion(0), lesion(100)][: 1 + i % 2] for i, uid in enumerate(scans[:7])}
    rows = [
        (uid, float(rng.choice([0, 100, 40, 200])), round(rng.random(), 1)) for uid in scans for _ in range(4)
    ]
    curve = froc(marks(*rows), lesions, scans)
    weights = rng.integers(0, 3, size=(6, len(scans)))
    values = curve.resampled(weights, (0.5, 1.0))
    for times, value in zip(weights, values, strict=True):
        copies = [(uid, f"{uid}-{k}") for uid, n in zip(scans, times, strict=True) for k in range(n)]
        table = marks(*[(copy, x, p) for uid, copy in copies for name, x, p in rows if name == uid])
        known = {copy: lesions[uid] for uid, copy in copies if uid in lesions}
        again = froc(table, known, [copy for _, copy in copies])
        expected = [again.sensitivity_at(0.5), again.sensitivity_at(1.0), again.fp_on_negatives_at(0.5)]
        np.testing.assert_allclose(value[:3], expected)


def test_a_nan_score_is_refused_with_its_scan():
    with pytest.raises(ValueError, match="a: a mark has a NaN"):
        froc(marks(("a", 0, np.nan)), {}, ["a"])


def test_a_scan_listed_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        froc(marks(), {}, ["a", "a"])
