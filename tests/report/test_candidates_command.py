"""`python -m aneurysm.candidates` on run folders as train.py leaves them."""

import json

import numpy as np
import pandas as pd
import pytest

from aneurysm.candidates import main
from aneurysm.data.preparation.prepared import SUFFIX, PreparedCase, save_prepared
from aneurysm.data.scan import Grid, Lesion
from aneurysm.data.tables import CANDIDATES

GRID = Grid((12, 12, 12), np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1.0]]))


@pytest.fixture
def outputs(tmp_path):
    """Six scans, the even ones with an aneurysm at (6, 6, 6), s4 with one that nobody has placed."""
    rows = []
    (tmp_path / "prepared").mkdir()
    for i in range(6):
        lesions = (Lesion(np.full(3, 6.0), 1.0),) if i in (0, 2) else ()
        case = PreparedCase(
            f"s{i}", f"p{i}", "CTA", np.zeros(GRID.shape, np.float32), GRID, None, None, lesions, None, None,
            i % 2 == 0, np.full(13, np.nan, np.float32), GRID, 0.0,
        )  # fmt: skip
        save_prepared(case, tmp_path / "prepared" / f"s{i}-abc{SUFFIX}")
        row = {"series_uid": f"s{i}", "patient_id": f"p{i}", "modality": "CTA"}
        rows.append(row | {"present": float(i % 2 == 0)})
    experiment = tmp_path / "phantom"
    experiment.mkdir()
    pd.DataFrame(rows).to_csv(experiment / "labels-d1.csv", index=False)
    for name, source, far in (("gat-aaaa", "union", 0.0), ("gat-bbbb", "graph", 40.0)):
        for fold in range(2):
            folder = experiment / "smart_net" / name / f"fold_{fold}"
            folder.mkdir(parents=True)
            settings = {
                "folds": 2,
                "graph_net": {"_target_": "aneurysm.nets.vessel_gat.VesselGat"},
                "smart_net": {"candidates": {"source": source}},
            }
            note = {"settings": settings, "data": "d1", "upstream": {"segmenter": "seg1"}}
            (folder / "run.json").write_text(json.dumps(note))
            (folder / "done.json").write_text("{}")
            found = [
                {"series_uid": f"s{i}", "candidate": 0, "x_mm": 6.0 + far * (i == 2), "y_mm": 6.0,
                 "z_mm": 6.0, "score": 0.5, "node": 0, "radius_mm": 1.0, "fold": fold}
                for i in range(6) if i % 2 == fold
            ]  # fmt: skip
            CANDIDATES.write(pd.DataFrame(found), folder / "candidates.parquet")
    return tmp_path


def test_every_variant_is_measured(outputs, capsys):
    assert main([str(outputs / "phantom")]) == 0
    table = pd.read_csv(outputs / "phantom" / "candidates" / "recall.csv")
    whole = table[table.lesions == "all"].set_index("variant")
    assert whole.n.tolist() == [2, 2]  # the unplaced aneurysm counts neither as found nor as missed
    assert whole.loc["VesselGat, union, sac mask (aaaa)", "recall_5"] == 1.0
    assert whole.loc["VesselGat, graph, sac mask (bbbb)", "recall_5"] == 0.5
    assert (outputs / "phantom" / "candidates" / "recall.png").stat().st_size > 5000
    assert "VesselGat" in capsys.readouterr().out


def test_unfinished_variants_and_missing_scans_are_told(outputs, capsys):
    (outputs / "phantom" / "smart_net" / "gat-bbbb" / "fold_1" / "done.json").unlink()
    assert main([str(outputs / "phantom")]) == 0
    assert set(pd.read_csv(outputs / "phantom" / "candidates" / "recall.csv").variant) == {
        "VesselGat, union, sac mask (aaaa)"
    }
    assert main([str(outputs / "phantom"), "--prepared", str(outputs)]) == 2
    assert "--prepared" in capsys.readouterr().err
    assert main([str(outputs / "nothing")]) == 2
    assert "no finished Smart Net" in capsys.readouterr().err
