"""The whole evaluation: figures agree with their parts and nothing is left out in silence."""

import json

import numpy as np
import pytest

from aneurysm.data.labels import LOCATIONS
from aneurysm.evaluation.froc import froc
from aneurysm.evaluation.summary import evaluate_scans, merged_seeds


def figures(evaluation) -> dict:
    return {row.figure: row for row in evaluation.rows()}


def test_headline_figures_and_intervals(experiment):
    evaluation = evaluate_scans(**experiment, resamples=200)
    rows = figures(evaluation)
    assert rows["RSNA 2025 score"].value == evaluation.rsna.score
    for name in ("RSNA 2025 score", "AUC Aneurysm Present", "CPM", "Sensitivity at 1 false alarm per scan"):
        row = rows[name]
        assert row.interval.low <= row.value <= row.interval.high, name
    assert rows["Candidate recall"].value == 1.0
    assert rows["Candidates per scan"].value == 4.0
    assert rows["Vessel recall"].value == pytest.approx(0.97) and rows["Vessel recall"].n == 8
    assert "Vessel clDice" not in rows
    sizes = [row.n for name, row in rows.items() if name.startswith("Sensitivity") and "mm" in name]
    assert sum(sizes) == 20


def test_froc_uses_the_mean_over_seeds(experiment):
    evaluation = evaluate_scans(**experiment, resamples=50)
    merged = merged_seeds(experiment["expert"])
    assert len(merged) == 240
    alone = froc(merged, experiment["lesions"], experiment["scans"]["series_uid"].tolist())
    assert evaluation.froc["expert"].cpm == pytest.approx(alone.cpm)
    assert evaluation.froc["expert"].sensitivity_at(1.0) >= evaluation.froc["smart_net"].sensitivity_at(0.5)


def test_what_could_not_be_measured_is_named(experiment):
    uid = next(iter(experiment["lesions"]))
    del experiment["lesions"][uid]
    experiment["scans"] = experiment["scans"].iloc[:-1]
    evaluation = evaluate_scans(**experiment, resamples=20)
    said = " ".join(evaluation.left_out)
    assert f"{LOCATIONS[12]}: not in the RSNA score, no positive among 59 scans." in said
    assert "1 of 60 series have no prediction, the first is 1.2.59." in said
    assert "1 positive series lack the position of a lesion: not in the FROC curve." in said
    assert uid not in evaluation.froc["expert"].scans


def test_json_is_strict_and_complete(experiment):
    content = json.loads(evaluate_scans(**experiment, resamples=20).to_json())
    assert {row["figure"] for row in content["figures"]} >= {"RSNA 2025 score", "CPM"}
    assert content["froc"]["expert"]["threshold"][0] is None
    assert content["auc_left_out"][LOCATIONS[12]] == "no positive among 60 scans"
    assert {row["value"] for row in content["groups"]} == {"CTA", "MRA", "phantom"}


def test_scan_probabilities_alone_are_enough(experiment):
    evaluation = evaluate_scans(experiment["index"], experiment["scans"], resamples=20)
    assert evaluation.froc == {} and evaluation.candidates is None
    assert np.isfinite(evaluation.rsna.score)
    json.loads(evaluation.to_json())


def test_no_candidate_at_all_is_zero_sensitivity(experiment):
    experiment["expert"] = experiment["expert"].iloc[:0]
    experiment["candidates"] = experiment["candidates"].iloc[:0]
    rows = figures(evaluate_scans(**experiment, resamples=20))
    assert rows["Sensitivity at 1 false alarm per scan"].value == 0.0
    assert rows["Candidate recall"].value == 0.0


def test_unlabelled_data_gives_nan_not_a_crash(experiment):
    labels = [c for c in experiment["index"] if c.startswith("location_") or c == "present"]
    experiment["index"][labels] = np.nan
    experiment["lesions"] = {}
    evaluation = evaluate_scans(**experiment, resamples=20)
    assert np.isnan(evaluation.rsna.score) and len(evaluation.rsna.left_out) == 14
    assert "60 series have no label: not in the FROC curve." in evaluation.left_out
    json.loads(evaluation.to_json())


def test_predictions_of_other_data_are_refused(experiment):
    experiment["scans"].loc[0, "series_uid"] = "9.9"
    with pytest.raises(ValueError, match=r"not in the index, the first is 9\.9"):
        evaluate_scans(**experiment)
    experiment["scans"].loc[0, "series_uid"] = "1.2.1"
    with pytest.raises(ValueError, match=r"lists 1\.2\.1 twice"):
        evaluate_scans(**experiment)
