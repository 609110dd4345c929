"""The command on what it cannot read, and its table; tests/test_pipeline.py has a trained experiment."""

import json

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.errors import UserError
from aneurysm.sensitivity.__main__ import main
from aneurysm.sensitivity.errors import MaskError
from aneurysm.sensitivity.table import CSV, PAGE, PNG, has, losses_figure, read_rows, write_all


def rows() -> pd.DataFrame:
    made = []
    for base in ("predicted", "truth"):
        for kind, level, recall, precision, found in (
            ("none", 0.0, 0.9, 0.7, 0.95), ("drop", 0.1, 0.8, 0.7, 0.9), ("drop", 0.4, 0.5, 0.72, 0.6),
            ("dilate", 1.0, 0.95, 0.4, 0.94),
        ):  # fmt: skip
            made.append(
                {
                    "run": "expert-1", "seed": 0, "base": base, "kind": kind, "level": level, "scans": 60,
                    "mask_recall": recall, "mask_precision": precision, "mask_dice": 0.8, "aneurysms": 34,
                    "aneurysm_in_mask": found, "candidates_per_scan": 8.0, "candidate_recall": found,
                    "candidate_recall_low": found - 0.1, "candidate_recall_high": 1.0, "expert_auc": 0.8,
                    "expert_auc_with_missed": 0.8 * found, "sensitivity_1fp": np.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(made)


def test_the_table_is_written_and_read_again(tmp_path):
    write_all(rows(), tmp_path, "phantom")
    again = read_rows(tmp_path / CSV, "expert-1", 0)
    pd.testing.assert_frame_equal(again, rows())
    assert has(again, "truth", MaskError("drop", 0.4), 60)
    assert not has(again, "truth", MaskError("drop", 0.4), 30)
    assert not has(again, "truth", MaskError("erode", 0.5), 60)
    assert (tmp_path / PNG).read_bytes()[:4] == b"\x89PNG" and (tmp_path / PNG).stat().st_size < 200_000
    text = (tmp_path / PAGE).read_text()
    assert "| predicted | drop | 0.4 share of the vessel length taken out | 0.500 | 0.720 | 0.600 |" in text
    assert "60 scans, 34 aneurysms" in text
    with pytest.raises(UserError, match="holds figures of the expert expert-1"):
        read_rows(tmp_path / CSV, "expert-2", 0)
    assert read_rows(tmp_path / "none.csv", "expert-1", 0).empty


def test_every_kind_of_error_is_a_line_from_the_mask_as_it_was():
    figure = losses_figure(rows())
    upper_left = figure.axes[0]
    lines = {line.get_label(): line.get_xydata() for line in upper_left.lines}
    np.testing.assert_allclose(lines["drop, on predicted masks"], [[0.9, 0.95], [0.8, 0.9], [0.5, 0.6]])
    np.testing.assert_allclose(lines["dilate, on truth masks"], [[0.9, 0.95], [0.95, 0.94]])
    only_start = rows()[lambda t: (t.kind == "none") & (t.base == "truth")]
    assert len(losses_figure(only_start).axes[0].lines) == 1


def test_what_cannot_be_studied_is_told(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "There is no experiment in" in capsys.readouterr().err
    folder = tmp_path / "phantom"
    folder.mkdir()
    assert main([str(folder)]) == 2
    assert "no expert that is finished in all folds" in capsys.readouterr().err
    run = folder / "expert" / "akorn-1" / "fold_0"
    run.mkdir(parents=True)
    note = {"settings": {"folds": 2}, "upstream": {"smart_net": "abc"}}
    (run / "run.json").write_text(json.dumps(note))
    (run / "done.json").write_text("{}")
    assert main([str(folder)]) == 2  # one of two folds is finished
    assert "no expert that is finished in all folds" in capsys.readouterr().err
    (run.parent / "fold_1").mkdir()
    (run.parent / "fold_1" / "done.json").write_text("{}")
    assert main([str(folder)]) == 2
    assert "has no run abc" in capsys.readouterr().err
    assert main([str(folder), "--kinds", "shear"]) == 2
    assert "--kinds shear: there are erode" in capsys.readouterr().err
    assert main([str(folder), "--scans", "0"]) == 2
