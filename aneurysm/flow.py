"""What the physics head is worth: `python -m aneurysm.flow outputs/<experiment>`.

Reads the finished experts of an experiment (with the head, without it, with a placebo; several seeds),
measures how well each tells aneurysms from other candidates, and how well every flow feature does so by
itself. Leaves `flow/arms.csv` and `flow/features.csv` there.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.tables import EXPERT
from aneurysm.evaluation.intervals import bootstrap
from aneurysm.evaluation.rsna_score import resampled_auc
from aneurysm.stages.expert import FLOW_COLUMNS
from aneurysm.stages.stored import opened
from aneurysm.training.finished import Finished, read_finished

ARMS = {"PhysicsHead": "navier_stokes", "PlaceboHead": "placebo", "absent": "none"}
FEATURES = ("physics_residual", *FLOW_COLUMNS)


@dataclass(frozen=True, eq=False)
class Judged:
    """One trained expert's answers about its held-out candidates whose nature is known."""

    arm: str
    seed: int
    run: str  # name of its folder
    table: pd.DataFrame  # tables.EXPERT with patient_id and is_aneurysm


def judged(experiment: Path, prepared: Path) -> list[Judged]:
    """The finished experts of an experiment.

    Raises:
        UserError: none is finished, or nothing is known of their lesions.
    """
    found = []
    for folder in sorted((experiment / "expert").glob("*")):
        notes = sorted(folder.glob("fold_*/run.json"))
        done = [p for p in folder.glob("fold_*/done.json") if p.parent.name[5:].isdigit()]
        if not notes:
            continue
        note = json.loads(notes[0].read_text())
        if len(done) < int(note["settings"]["folds"]):
            continue
        finished = read_finished(experiment, folder.name, prepared)
        target = str(note["settings"]["physics"]["_target_"]).rsplit(".", 1)[-1]
        seed = int(note["settings"]["expert"].get("seed", note["settings"]["seed"]))
        table = _with_truth(finished, experiment / f"labels-{note['data']}.csv")
        found.append(Judged(ARMS.get(target, target), seed, folder.name, table))
    if not found:
        raise UserError(
            f"{experiment} holds no expert that is finished in all folds. Train them: python train.py -m "
            "experiment=study_physics"
        )
    return found


def _with_truth(finished: Finished, labels: Path) -> pd.DataFrame:
    """The expert's out-of-fold table with patient and nature of every candidate, known ones only."""
    if not labels.is_file():
        raise UserError(f"{labels} is missing: give the folder of an experiment as train.py left it.")
    patient = (
        pd.read_csv(labels, dtype={"series_uid": str, "patient_id": str}).set_index("series_uid").patient_id
    )
    folds = sorted(finished.expert.glob("fold_*/predictions.parquet"))
    table = pd.concat([EXPERT.read(path) for path in folds], ignore_index=True)
    places = finished.candidates().set_index(["series_uid", "candidate"])[["x_mm", "y_mm", "z_mm"]]
    known = {}
    for scan in finished.scans:
        case = opened(scan.case)
        if case.lesions or case.present is False:
            known[scan.series_uid] = case.lesions
    table = table[table.series_uid.isin(known)].reset_index(drop=True)
    hit = float(finished.cfg.expert.hit_mm)
    # As the expert was taught: by where the Smart Net put the candidate, not where the expert moved it.
    place = places.loc[list(zip(table.series_uid, table.candidate, strict=True))].to_numpy(float)
    truth = [
        any(
            np.linalg.norm(np.asarray(one.centre_mm) - at) <= max(hit, one.radius_mm or 0.0)
            for one in known[uid]
        )
        for uid, at in zip(table.series_uid, place, strict=True)
    ]
    return table.assign(
        patient_id=patient.loc[table.series_uid].to_numpy(), is_aneurysm=np.array(truth, float)
    )


def _areas(one: Judged, columns: tuple[str, ...], times: dict[str, np.ndarray], size: int) -> np.ndarray:
    """AUC of each column, mean over folds, in each resample: (b, columns).

    Folds are judged apart: their networks were trained apart, and are not calibrated to each other.
    """
    per_fold = []
    for _, part in one.table.groupby("fold"):
        weights = np.stack([times[p] for p in part.patient_id], axis=1) if len(part) else np.zeros((size, 0))
        truth = part.is_aneurysm.to_numpy(float)
        areas = []
        for column in columns:
            values = part[column].to_numpy(float)
            areas.append(
                resampled_auc(np.where(np.isfinite(values), truth, np.nan), np.nan_to_num(values), weights)
            )
        per_fold.append(np.stack(areas, axis=1))
    # A fold with one kind of candidate only has no AUC; without any fold there is none at all.
    stacked = np.stack(per_fold)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(total.shape, np.nan), where=known.any(0))


def _with_intervals(runs: list[Judged], statistic: Any) -> list[tuple[float, float, float]]:
    """Figure and bounds of each figure of `statistic(times, size)`, patients drawn with replacement."""
    patients = sorted({p for one in runs for p in one.table.patient_id})

    def figures(weights: np.ndarray) -> np.ndarray:
        return statistic(dict(zip(patients, weights.T, strict=True)), len(weights))

    plain = figures(np.ones((1, len(patients))))[0]
    bounds = bootstrap(figures, patients, resamples=500)
    return [(float(v), b.low, b.high) for v, b in zip(plain, bounds, strict=True)]


def arms_table(runs: list[Judged]) -> pd.DataFrame:
    """Candidate AUC of every arm, mean over seeds, and of the head against other arms, with 95 % bounds."""
    arms = {arm: [one for one in runs if one.arm == arm] for arm in dict.fromkeys(one.arm for one in runs)}
    pairs = [
        ("navier_stokes", other) for other in ("none", "placebo") if {"navier_stokes", other} <= set(arms)
    ]

    def statistic(times: dict[str, np.ndarray], size: int) -> np.ndarray:
        mean = {
            arm: np.mean([_areas(one, ("p",), times, size)[:, 0] for one in some], axis=0)
            for arm, some in arms.items()
        }
        return np.stack([*mean.values(), *(mean[a] - mean[b] for a, b in pairs)], axis=1)

    names = [*arms, *(f"{a} - {b}" for a, b in pairs)]
    one_patient = {p: np.ones(1) for run in runs for p in run.table.patient_id}
    rows = []
    for name, (value, low, high) in zip(names, _with_intervals(runs, statistic), strict=True):
        seeds = [float(_areas(one, ("p",), one_patient, 1)[0, 0]) for one in arms.get(name, [])]
        rows.append(
            {
                "arm": name,
                "auc": value,
                "low": low,
                "high": high,
                "seeds": len(seeds),
                "spread_over_seeds": float(np.std(seeds)) if seeds else np.nan,
            }
        )
    return pd.DataFrame(rows)


def features_table(runs: list[Judged]) -> pd.DataFrame:
    """AUC of the residual and of every flow feature by itself; below one half, less of it means aneurysm."""
    found = []
    for arm in ("navier_stokes", "placebo"):
        some = [one for one in runs if one.arm == arm and one.table.physics_residual.notna().any()]
        if not some:
            continue

        def statistic(times: dict[str, np.ndarray], size: int, some: list[Judged] = some) -> np.ndarray:
            return np.mean([_areas(one, FEATURES, times, size) for one in some], axis=0)

        for name, (value, low, high) in zip(FEATURES, _with_intervals(some, statistic), strict=True):
            share = float(np.mean([one.table[name].notna().mean() for one in some]))
            found.append(
                {"arm": arm, "feature": name, "auc": value, "low": low, "high": high, "known": share}
            )
    return pd.DataFrame(found, columns=["arm", "feature", "auc", "low", "high", "known"])


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m aneurysm.flow",
        description="What the physics head of an experiment is worth, and every flow feature by itself.",
    )
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>")
    parser.add_argument(
        "--prepared", type=Path, help="prepared scans; default: prepared/ beside the experiment"
    )
    given = parser.parse_args(arguments)
    try:
        runs = judged(given.experiment, given.prepared or given.experiment.parent / "prepared")
        tables = {"arms": arms_table(runs), "features": features_table(runs)}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    out = given.experiment / "flow"
    out.mkdir(exist_ok=True)
    for name, table in tables.items():
        with replacing(out / f"{name}.csv") as part:
            table.to_csv(part, index=False)
        Console(width=None if Console().is_terminal else 120).print(_shown(table))
    print(out)
    return 0


def _shown(table: pd.DataFrame) -> Table:
    shown = Table(*table.columns)
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    return shown


if __name__ == "__main__":
    sys.exit(main())
