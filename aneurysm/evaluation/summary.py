"""Everything that is measured about one experiment, in one object for terminal, JSON and report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd

from aneurysm.data.scan import Lesion
from aneurysm.data.tables import CANDIDATES, EXPERT, INDEX, LOCATION_KEYS, SCANS
from aneurysm.evaluation.calibration import Calibration, calibration
from aneurysm.evaluation.candidates import CandidateRecall, candidate_recall
from aneurysm.evaluation.froc import FALSE_ALARM, Froc, froc
from aneurysm.evaluation.intervals import Interval, bootstrap
from aneurysm.evaluation.lesion_kinds import LesionFacts
from aneurysm.evaluation.mask_groups import mask_groups, undefined
from aneurysm.evaluation.rows import (
    Row,
    calibration_rows,
    candidate_rows,
    froc_rows,
    score_rows,
    size_rows,
    vessel_rows,
)
from aneurysm.evaluation.rsna_score import RsnaScore, rsna_score


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All figures of an experiment and what they were computed from."""

    scans: tuple[str, ...]  # series UIDs of the rows below
    truth: np.ndarray  # (n, 14) 0, 1 or NaN, submission order
    probability: np.ndarray  # (n, 14)
    rsna: RsnaScore
    column_intervals: dict[str, Interval]  # of the AUC of each scored column
    froc: dict[str, Froc]  # "expert" and "smart_net", those that exist
    candidates: CandidateRecall | None
    candidate_curve: pd.DataFrame | None  # kept, recall, low, high
    candidate_groups: pd.DataFrame | None  # recall of candidates by size and kind of the lesions
    calibration: dict[str, Calibration]  # "scan" (Aneurysm Present) and "candidate"
    vessel: pd.DataFrame | None  # series_uid and per-scan figures
    groups: pd.DataFrame  # group, value, scans, positives, auc_present, lesions, sensitivity_1fp
    left_out: tuple[str, ...]  # sentences: what could not be measured and why
    table: tuple[Row, ...]
    masks: pd.DataFrame = field(default_factory=pd.DataFrame)  # of `mask_groups`: figures by modality

    def rows(self) -> list[Row]:
        """(figure, value, interval, n, note) of every headline figure, for a table."""
        return list(self.table)

    def to_json(self) -> str:
        """All figures and curves; NaN and infinity become null."""
        content = {
            "figures": [
                {
                    "figure": row.figure,
                    "value": row.value,
                    "low": row.interval.low if row.interval else None,
                    "high": row.interval.high if row.interval else None,
                    "resamples": row.interval.valid if row.interval else None,
                    "n": row.n,
                    "note": row.note,
                }
                for row in self.table
            ],
            "auc": self.rsna.per_column,
            "auc_left_out": dict(self.rsna.left_out),
            "positives": self.rsna.positives,
            "negatives": self.rsna.negatives,
            "froc": {name: curve.curve.to_dict("list") for name, curve in self.froc.items()},
            "candidate_recall": _columns(self.candidate_curve),
            "candidate_recall_by_lesion": _columns(self.candidate_groups),
            "calibration": {name: vars(value) for name, value in self.calibration.items()},
            "groups": self.groups.to_dict("records"),
            "lumen_masks": self.masks.to_dict("records"),
            "left_out": self.left_out,
        }
        return json.dumps(_plain(content), indent=1, allow_nan=False)


def evaluate_scans(
    index: pd.DataFrame,
    scans: pd.DataFrame,
    expert: pd.DataFrame | None = None,
    lesions: Mapping[str, Sequence[Lesion]] | None = None,
    candidates: pd.DataFrame | None = None,
    vessel: pd.DataFrame | None = None,
    graph_mask: pd.DataFrame | None = None,
    reach_mm: float = 5.0,
    resamples: int = 1000,
    seed: int = 0,
    facts: Mapping[str, Sequence[LesionFacts]] | None = None,
) -> Evaluation:
    """Measure out-of-fold predictions of an experiment against what is known.

    Args:
        index: INDEX table, every series of the data set.
        scans: SCANS table, the 14 probabilities of the predicted series.
        expert: EXPERT table; several folds or seeds of one candidate are averaged.
        lesions: lesions with positions of each series; a positive series without an entry has unknown
            positions and is left out of the FROC curve.
        candidates: CANDIDATES table of the Smart Net.
        vessel: series_uid and any other columns of `tables.OVERLAP`, of the vessel stage.
        graph_mask: the same of the segmenter, whose mask becomes the graph.
        reach_mm: a mark hits within max(reach_mm, radius of the lesion) of its centre.
        resamples: bootstrap draws of patients.
        seed: of the bootstrap.
        facts: true sacs and kinds of the lesions of each series, as far as masks tell.

    Raises:
        ValueError: a table breaks its contract, or a predicted series is not in the index or repeated.
    """
    known = _joined(INDEX.conform(index), SCANS.conform(scans))
    uids = tuple(known["series_uid"])
    left_out = _unpredicted(index, uids)
    truth = known[[*LOCATION_KEYS, "present"]].to_numpy(dtype=np.float64)
    probability = known[[f"p_{key}" for key in (*LOCATION_KEYS, "present")]].to_numpy(dtype=np.float64)
    draw = partial(bootstrap, resamples=resamples, seed=seed)
    patients = known["patient_id"].tolist()

    score = rsna_score(truth, probability)
    left_out += [f"{name}: not in the RSNA score, {reason}." for name, reason in score.left_out]
    rows, column_intervals = score_rows(score, truth, probability, patients, draw)
    reliability = {"scan": calibration(truth[:, -1], probability[:, -1])}

    located, reasons = _with_known_lesions(known, lesions or {})
    left_out += reasons
    lesions_of = {uid: tuple((lesions or {}).get(uid, ())) for uid in located}
    located_patients = known.set_index("series_uid").loc[list(located), "patient_id"].tolist()
    curves: dict[str, Froc] = {}
    if expert is not None and located:
        curves["expert"] = froc(merged_seeds(EXPERT.conform(expert)), lesions_of, located, reach_mm)
        outcome = curves["expert"].marks["outcome"]
        reliability["candidate"] = calibration(
            (outcome != FALSE_ALARM).to_numpy(dtype=np.float64),
            curves["expert"].marks["p"].to_numpy(dtype=np.float64).clip(0, 1),
        )
        rows += froc_rows("expert", curves["expert"], located_patients, draw)
        rows += size_rows(curves["expert"])
    recall = curve = by_lesion = None
    if candidates is not None and located:
        proposed = CANDIDATES.conform(candidates)
        curves["smart_net"] = froc(proposed.rename(columns={"score": "p"}), lesions_of, located, reach_mm)
        of_located = None if facts is None else {uid: facts[uid] for uid in located if uid in facts}
        recall = candidate_recall(proposed, lesions_of, located, reach_mm, of_located)
        rows += candidate_rows(recall, curves["smart_net"], located_patients, draw)
        curve = recall.curve_with_intervals(located_patients, resamples=resamples, seed=seed)
        by_lesion = recall.table(located_patients)
    if vessel is not None and len(vessel):
        rows += vessel_rows(vessel, index, draw)
        left_out += undefined(vessel)
    rows += calibration_rows(reliability)
    named = {"vessel net": vessel, "Smart Net": graph_mask}
    stages = {name: table for name, table in named.items() if table is not None and len(table)}
    groups = _groups(known, truth, probability, curves.get("expert"))
    return Evaluation(
        uids, truth, probability, score, column_intervals, curves, recall, curve, by_lesion, reliability,
        vessel, groups, tuple(left_out), tuple(rows), mask_groups(stages),
    )  # fmt: skip


def _columns(table: pd.DataFrame | None) -> dict[str, list] | None:
    return None if table is None else table.to_dict("list")


def merged_seeds(expert: pd.DataFrame) -> pd.DataFrame:
    """One row per candidate of an EXPERT table: means over folds and seeds."""
    keys = ("series_uid", "candidate", "fold", "seed")
    numbers = [column for column in EXPERT.columns if column not in keys]
    whole = EXPERT.conform(expert)  # tables of former versions lack columns
    candidates = whole.groupby(["series_uid", "candidate"], sort=False, as_index=False)
    return pd.DataFrame(candidates[numbers].mean())


def _joined(index: pd.DataFrame, scans: pd.DataFrame) -> pd.DataFrame:
    for name, table in (("index", index), ("scan predictions", scans)):
        twice = table.loc[table["series_uid"].duplicated(), "series_uid"]
        if len(twice):
            raise ValueError(f"The {name} table lists {twice.iloc[0]} twice. Keep one row per series.")
    stray = scans.loc[~scans["series_uid"].isin(index["series_uid"]), "series_uid"]
    if len(stray):
        raise ValueError(
            f"{len(stray)} predicted series are not in the index, the first is {stray.iloc[0]}. "
            "Evaluate predictions against the index they were made from."
        )
    return scans.drop(columns="patient_id").merge(index, on="series_uid", how="left", validate="one_to_one")


def _unpredicted(index: pd.DataFrame, uids: tuple[str, ...]) -> list[str]:
    missing = index.loc[~index["series_uid"].isin(uids), "series_uid"].tolist()
    if not missing:
        return []
    return [f"{len(missing)} of {len(index)} series have no prediction, the first is {missing[0]}."]


def _with_known_lesions(
    known: pd.DataFrame, lesions: Mapping[str, Sequence[Lesion]]
) -> tuple[tuple[str, ...], list[str]]:
    """Series whose lesion positions are all known, and why the others are left out of the FROC curve."""
    place, unlabelled, unplaced = [], 0, 0
    for row in known[["series_uid", "present", *LOCATION_KEYS]].itertuples(index=False):
        uid, present = row[0], row[1]
        count = len(lesions.get(uid, ()))
        marked = int(np.nansum(np.asarray(row[2:], dtype=np.float64)))
        if count == 0 and not np.isfinite(present) and marked == 0:
            unlabelled += 1
        elif count < max(int(present == 1), marked):
            unplaced += 1  # a hit on an unplaced lesion would count as a false alarm
        else:
            place.append(uid)
    reasons = []
    if unplaced:
        reasons.append(f"{unplaced} positive series lack the position of a lesion: not in the FROC curve.")
    if unlabelled:
        reasons.append(f"{unlabelled} series have no label: not in the FROC curve.")
    if not any(lesions.get(uid) for uid in place):
        reasons.append("No lesion has a known position: sensitivities are undefined.")
    return tuple(place), reasons


def _groups(
    known: pd.DataFrame, truth: np.ndarray, probability: np.ndarray, curve: Froc | None
) -> pd.DataFrame:
    """The scan AUC and the lesion sensitivity per modality and per site."""
    records = []
    for column in ("modality", "site"):
        for value in sorted(known[column].unique()):
            inside = (known[column] == value).to_numpy()
            auc = rsna_score(truth[inside], probability[inside]).present
            lesions, found = 0, float("nan")
            if curve is not None:
                mine = np.isin(curve.lesions["series_uid"], known["series_uid"].to_numpy()[inside])
                lesions = int(mine.sum())
                hit = curve.lesions["p"].to_numpy(dtype=np.float64)[mine] >= curve.threshold_at(1.0)
                found = float(hit.mean()) if lesions else float("nan")
            records.append(
                {
                    "group": column, "value": value, "scans": int(inside.sum()),
                    "positives": int((truth[inside, -1] == 1).sum()), "auc_present": auc,
                    "lesions": lesions, "sensitivity_1fp": found,
                }
            )  # fmt: skip
    return pd.DataFrame(records)


def _plain(value):
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
