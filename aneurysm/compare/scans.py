"""How well a stacker's variants tell patients apart: the challenge's figures on out-of-fold predictions.

Two questions, two answers. Each fold has figures of its own, which go through the same statistics as those of
any other stage (would another training end elsewhere?). Over all folds together every patient is predicted
once, and patients are drawn with replacement, the same ones for every variant (would other patients say
otherwise?).
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from aneurysm.compare.read import Run, State
from aneurysm.compare.variants import Variant
from aneurysm.evaluation.intervals import Interval, bootstrap
from aneurysm.evaluation.rsna_score import combined, resampled_columns

FIGURES = ("rsna_score", "auc_present")
_RESAMPLES = 1000
# Bounds the time of the bootstrap: draws x scans x label columns x predictions, about 3 s on one core.
_WORK = 4e8
_COLUMNS = 14


@dataclass(frozen=True, eq=False)
class Labels:
    """What was known of the series of a data set."""

    patient: Mapping[str, str]
    truth: Mapping[str, np.ndarray]  # series -> (14,) 0, 1 or NaN, submission order


@dataclass(frozen=True)
class ScanLevel:
    """Out-of-fold figures of a variant over all patients, mean over its seeds."""

    scans: int
    seeds: int
    value: Mapping[str, float]
    interval: Mapping[str, Interval]
    difference: Mapping[str, float]  # to the reference
    difference_interval: Mapping[str, Interval]  # paired: the same patients in both
    resamples: int


def with_scan_figures(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Add each finished stacker fold's own AUC and score, and say where that cannot be done."""
    found, reasons = [], set()
    for run in runs:
        if run.stage == "stacker" and run.state == State.FINISHED:
            labels = labels_of(run)
            table = predictions(run)
            if labels is None:
                reasons.add(
                    f"{run.experiment}: no labels-{run.data}.csv beside its folds, so the stacker's "
                    "predictions cannot be scored. Any train.py command on this experiment writes it."
                )
            elif table is None or not all(uid in labels.truth for uid in table):
                reasons.add(f"{run.folder}: its scans.parquet cannot be read or scored.")
            else:
                scored = _score(*_matrices(table, sorted(table), labels))
                run = replace(run, figures={**scored, **run.figures})
        found.append(run)
    return found, sorted(reasons)


def scan_levels(variants: Sequence[Variant], reference: int) -> dict[int, ScanLevel]:
    """Out-of-fold figures of the variants of one data set; those without a complete set of folds lack."""
    labels = labels_of(variants[reference].runs[0])
    complete = {i: sets for i, v in enumerate(variants) if labels is not None and (sets := _seeds(v))}
    if labels is None or not complete:
        return {}
    uids = sorted(set.intersection(*(set(table) for sets in complete.values() for table in sets)))
    uids = [uid for uid in uids if uid in labels.truth]
    if not uids:
        return {}
    order = sorted(complete, key=lambda i: i != reference)  # the reference first
    owner = [i for i in order for _ in complete[i]]
    matrices = [_matrices(table, uids, labels) for i in order for table in complete[i]]
    truth = matrices[0][0]
    base = owner.index(reference) if reference in complete else None

    def figures(weights: np.ndarray) -> np.ndarray:
        """(b, n) draws -> (b, variants * 4): score, AUC, and both less the reference's."""
        areas = [resampled_columns(truth, p, weights) for _, p in matrices]
        each = [np.stack([combined(a), a[:, -1]], axis=1) for a in areas]  # (b, 2) per prediction
        own = {i: np.mean([e for e, o in zip(each, owner, strict=True) if o == i], axis=0) for i in order}
        zero = own[reference] if base is not None else np.full_like(each[0], np.nan)
        return np.concatenate([np.concatenate([own[i], own[i] - zero], axis=1) for i in order], axis=1)

    resamples = int(np.clip(_WORK / (len(uids) * _COLUMNS * len(matrices)), 100, _RESAMPLES))
    patients = [labels.patient[uid] for uid in uids]
    values = figures(np.ones((1, len(uids)), dtype=np.int64))[0].reshape(len(order), 4)
    intervals = bootstrap(figures, patients, resamples)
    found = {}
    for row, i in enumerate(order):
        bounds = intervals[4 * row : 4 * row + 4]
        found[i] = ScanLevel(
            len(uids),
            len(complete[i]),
            dict(zip(FIGURES, map(float, values[row, :2]), strict=True)),
            dict(zip(FIGURES, bounds[:2], strict=True)),
            dict(zip(FIGURES, map(float, values[row, 2:]), strict=True)),
            dict(zip(FIGURES, bounds[2:], strict=True)),
            resamples,
        )
    return found


def _seeds(variant: Variant) -> list[dict[str, np.ndarray]]:
    """One table per seed that has every fold."""
    by_seed: dict[int | None, list[Run]] = {}
    for run in variant.runs:
        if run.state == State.FINISHED:
            by_seed.setdefault(run.seed, []).append(run)
    tables = []
    for runs in by_seed.values():
        read = [predictions(run) for run in runs]
        if len(runs) == variant.folds and all(table is not None for table in read):
            tables.append({uid: row for table in read if table for uid, row in table.items()})
    return tables


def labels_of(run: Run) -> Labels | None:
    """The labels that an experiment keeps beside its folds; None when it does not."""
    return _read_labels(run.folder.parents[2] / f"labels-{run.data}.csv")


@cache
def _read_labels(file: Path) -> Labels | None:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        names = [*(f"location_{i}" for i in range(_COLUMNS - 1)), "present"]
        truth = {r["series_uid"]: np.array([float(r[n] or "nan") for n in names]) for r in rows}
        return Labels({r["series_uid"]: r["patient_id"] for r in rows}, truth)
    except (OSError, ValueError, KeyError):
        return None


@cache
def _read_predictions(file: Path) -> dict[str, np.ndarray] | None:
    import pyarrow.parquet  # costs a tenth of a second, and only the stacker has such tables

    names = [*(f"p_location_{i}" for i in range(_COLUMNS - 1)), "p_present"]
    try:
        table = pyarrow.parquet.read_table(file, columns=["series_uid", *names])
    except (OSError, ValueError, KeyError):
        return None
    values = np.stack([table[name].to_numpy() for name in names], axis=1).astype(np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        return None
    return dict(zip(table["series_uid"].to_pylist(), values, strict=True))


def predictions(run: Run) -> dict[str, np.ndarray] | None:
    """Series -> (14,) probabilities of a finished stacker fold; None when they cannot be read."""
    return _read_predictions(run.folder / "scans.parquet")


def _matrices(
    table: Mapping[str, np.ndarray], uids: Sequence[str], labels: Labels
) -> tuple[np.ndarray, np.ndarray]:
    """Truth and probability (n, 14) of these series."""
    return np.stack([labels.truth[uid] for uid in uids]), np.stack([table[uid] for uid in uids])


def _score(truth: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """The figures that exist: a fold of one class has no AUC."""
    areas = resampled_columns(truth, probability, np.ones((1, len(truth)), dtype=np.int64))
    both = dict(zip(FIGURES, (float(combined(areas)[0]), float(areas[0, -1])), strict=True))
    return {name: value for name, value in both.items() if np.isfinite(value)}
