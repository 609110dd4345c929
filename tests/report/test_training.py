"""The report of an experiment holds every figure, stands alone and comes with its numbers."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from aneurysm.evaluation.summary import evaluate_scans
from aneurysm.report.examples import choose_examples, example_picture
from aneurysm.report.figures import TrainingCurve
from aneurysm.report.training import write_training_report


@pytest.fixture(scope="module")
def report(tmp_path_factory, evaluation, volume, grid):
    metrics = pd.DataFrame({"epoch": [0, 1], "train/loss": [1.0, 0.5], "train/weight_mask": [0.5, 0.6]})
    chosen = choose_examples(evaluation, 1)
    examples = [example_picture(example, evaluation, volume, grid, "MRA") for example in chosen]
    return write_training_report(
        tmp_path_factory.mktemp("report") / "new",
        evaluation,
        [TrainingCurve("expert", fold, metrics) for fold in (0, 1)],
        examples,
        "seed: 3 <b>",
        "40 synthetic series",
        {"expert": 90.0, "stacker": 2.0},
        "An experiment",
    )


def test_the_page_stands_alone(report):
    page = report.read_text()
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "http:" not in words and "https:" not in words and "//" not in words
    assert set(re.findall(r'(?:src|href)="([^"]{0,20})', page)) == {"data:image/png;base6"}
    assert "<script" not in page and "default-src 'none'" in page


def test_the_page_says_everything(report, evaluation):
    page = report.read_text()
    for row in evaluation.rows():
        assert row.figure in page
    for sentence in evaluation.left_out:
        assert sentence in page
    assert "Not a medical device" in page and "Found: series" in page
    for part in ("seed: 3 &lt;b&gt;", "40 synthetic series", "1 min 30 s"):
        assert part in page
    # FROC, candidates, ROC, locations, calibration, expert and its weights, three examples
    assert page.count("<img") == 10


def test_pictures_and_numbers_lie_beside_it(report, evaluation):
    folder = report.parent
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert len(pictures) == 10 and pictures[0] == "01_froc.png"
    figures = json.loads((folder / "metrics.json").read_text())["figures"]
    results = pd.read_csv(folder / "results.csv")
    assert results["figure"].tolist() == [row.figure for row in evaluation.rows()]
    assert [row["value"] for row in figures] == pytest.approx(results["value"].tolist())
    assert not list(folder.glob(".*"))


def test_detections_agree_with_the_curve(report, evaluation):
    table = pd.read_csv(report.parent / "detections.csv")
    curve = evaluation.froc["expert"]
    above = table[table["above_threshold"]]
    found = (above["outcome"] == "TP").sum()
    assert found / len(curve.lesions) == pytest.approx(curve.sensitivity_at(1.0))
    assert (above["outcome"] == "FP").sum() / len(curve.scans) <= 1.0
    assert found + (table["outcome"] == "FN").sum() == len(curve.lesions)


def test_examples_are_of_each_kind_and_each_scan_once(evaluation):
    examples = choose_examples(evaluation, 2)
    assert [e.kind for e in examples] == ["hit"] * 2 + ["missed"] * 2 + ["false alarm"] * 2
    assert len({e.series_uid for e in examples}) == 6
    best = evaluation.froc["expert"].lesions["p"].max()
    assert examples[0].p == best


def test_probabilities_alone_make_a_report(tmp_path, evaluation):
    keys = [f"location_{i}" for i in range(13)] + ["present"]
    n = len(evaluation.scans)
    who = {"series_uid": list(evaluation.scans), "patient_id": [f"p{i}" for i in range(n)]}
    about = {"modality": "CTA", "age": np.nan, "sex": "", "site": "x"}
    index = pd.DataFrame(who | about | dict(zip(keys, np.full((14, n), np.nan), strict=True)))
    predicted = {f"p_{key}": p for key, p in zip(keys, evaluation.probability.T, strict=True)}
    scans = pd.DataFrame(who | {"fold": 0} | predicted)
    page = write_training_report(tmp_path, evaluate_scans(index, scans, resamples=10))
    assert "no scan has a known label" in page.read_text()
    assert choose_examples(evaluate_scans(index, scans, resamples=10)) == []
