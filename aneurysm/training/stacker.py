"""Training of stage 5, stacker."""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from aneurysm.build import boosting
from aneurysm.data.tables import LOCATION_KEYS, SCANS
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import stacker
from aneurysm.training.pictures import stacker_pictures
from aneurysm.training.products import expert_table


def train_stacker(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Trees on the other folds' out-of-fold readings; leaves the 14 probabilities of the held-out scans."""
    cfg = experiment.cfg
    expert = expert_table(experiment)
    training, held_out = experiment.training(run.fold), experiment.held_out(run.fold)
    module = stacker.StackerModule(boosting(cfg))
    fit(
        run,
        module,
        stacker.StackerData(_rows(experiment, expert, training), _rows(experiment, expert, held_out)),
        1,
        cfg,
    )
    rows, truth = _rows(experiment, expert, held_out)
    by_uid = experiment.index.set_index("series_uid")
    table = pd.DataFrame(module.probabilities(rows), columns=[f"p_{k}" for k in (*LOCATION_KEYS, "present")])
    table.insert(0, "series_uid", rows.series_uid)
    table.insert(1, "patient_id", [by_uid.patient_id[uid] for uid in rows.series_uid])
    table.insert(2, "fold", run.fold)
    SCANS.write(table, run.folder / "scans.parquet")
    illustrate(run, lambda log: stacker_pictures(log, table, truth))
    return {"scans": len(table), **_present_auc(table.p_present.to_numpy(np.float64), truth[:, -1])}


def _present_auc(p: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Over the fold's held-out scans; nothing where only one class is known."""
    known = np.isfinite(truth)
    if len(np.unique(truth[known])) < 2:
        return {}
    return {"present_auc": float(roc_auc_score(truth[known], p[known]))}


def stacker_rows(experiment: Experiment) -> tuple[stacker.ScanRows, np.ndarray]:
    """Features and labels of every scan, for the trees that a bundle ships."""
    return _rows(experiment, expert_table(experiment), list(experiment.index.series_uid))


def _rows(
    experiment: Experiment, expert: pd.DataFrame, uids: list[str]
) -> tuple[stacker.ScanRows, np.ndarray]:
    table = experiment.index.set_index("series_uid").loc[uids]
    rows = stacker.scan_rows(pd.DataFrame(expert[expert.series_uid.isin(uids)]), table.modality.to_dict())
    return rows, table[[*LOCATION_KEYS, "present"]].to_numpy(np.float64)
