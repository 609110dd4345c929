"""Candidate recall counted by hand."""

import numpy as np
import pandas as pd

from aneurysm.data.scan import Lesion
from aneurysm.evaluation.candidates import KINDS, candidate_recall
from aneurysm.evaluation.lesion_kinds import LesionFacts


def test_ranks_recall_and_number():
    rows = [("a", 90.0, 0.9), ("a", 3.0, 0.8), ("a", 1.0, 0.2), ("b", 0.0, 0.1), ("c", 0.0, 0.5)]
    table = pd.DataFrame(rows, columns=["series_uid", "x_mm", "score"]).assign(y_mm=0.0, z_mm=0.0)
    at = [Lesion(np.array([x, 0.0, 0.0])) for x in (0.0, 95.0, 300.0)]
    result = candidate_recall(table, {"a": at, "b": [at[0]]}, ["a", "b", "c", "d"])
    assert result.rank.tolist() == [2, 1, np.inf, 1]
    assert result.recall == 3 / 4
    assert result.recall_when_keeping(1) == 2 / 4
    assert result.mean_per_scan == 5 / 4
    assert result.curve()["recall"].tolist() == [0.5, 0.75, 0.75]
    weights = np.array([[1, 1, 1, 1], [0, 2, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_allclose(result.resampled(weights)[:, 0], [0.75, 1.0, np.nan])


def test_no_lesions():
    table = pd.DataFrame({"series_uid": ["a"], "x_mm": [0.0], "y_mm": [0.0], "z_mm": [0.0], "score": [0.5]})
    assert np.isnan(candidate_recall(table, {}, ["a"]).recall)


def test_curve_with_intervals_and_groups_by_hand():
    uids = [f"s{i}" for i in range(40)]
    rows = [(uid, 90.0, 0.9) for uid in uids] + [(uid, 0.0, 0.5) for uid in uids[:30]]
    table = pd.DataFrame(rows, columns=["series_uid", "x_mm", "score"]).assign(y_mm=0.0, z_mm=0.0)
    lesions = {uid: [Lesion(np.zeros(3), 1.0 + (i % 4))] for i, uid in enumerate(uids)}
    kinds = {uid: (LesionFacts(None, KINDS[i % 2]),) for i, uid in enumerate(uids)}
    result = candidate_recall(table, lesions, uids, facts=kinds)
    curve = result.curve_with_intervals(uids, most=10)
    assert curve["kept"].tolist() == list(range(1, 11))
    assert curve["recall"].tolist() == [0.0] + [0.75] * 9
    assert curve["low"][0] == curve["high"][0] == 0
    assert 0.55 < curve["low"][4] < 0.75 < curve["high"][4] < 0.92
    groups = dict(result.groups())
    assert {name: len(part.rank) for name, part in groups.items()} == {
        "below 3 mm": 10, "3 to 5 mm": 10, "5 to 7 mm": 10, "7 mm and more": 10, "side-wall": 20,
        "bifurcation": 20,
    }  # fmt: skip
    rows_of = result.table(uids).set_index("lesions")
    assert rows_of.loc["all", "recall_5"] == 0.75 and rows_of.loc["all", "recall_1"] == 0
    for name, part in groups.items():
        assert rows_of.loc[name, "recall_5"] == part.recall_when_keeping(5)
    weights = np.eye(40, dtype=int)
    one_each = result.resampled_when_keeping(weights, np.array([1, 2]))
    np.testing.assert_array_equal(one_each, [[0, 1]] * 30 + [[0, 0]] * 10)
