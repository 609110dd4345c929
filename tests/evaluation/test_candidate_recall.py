"""Candidate recall counted by hand."""

import numpy as np
import pandas as pd

from aneurysm.data.scan import Lesion
from aneurysm.evaluation.candidates import candidate_recall


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
