"""The headline figures, one row each: name, value, interval, how many were counted, of what."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from aneurysm.data.labels import LABEL_COLUMNS, PRESENT
from aneurysm.evaluation.calibration import Calibration
from aneurysm.evaluation.candidates import BUDGET, CandidateRecall
from aneurysm.evaluation.froc import CPM_RATES, Froc
from aneurysm.evaluation.intervals import Interval, resampled_mean
from aneurysm.evaluation.rsna_score import RsnaScore, combined, resampled_columns

FROC_RATES = (0.5, 1.0, 2.0)  # false alarms per scan that are reported one by one
VESSEL_FIGURES = {
    "recall": "Vessel recall",
    "precision": "Vessel precision",
    "dice": "Vessel Dice",
    "cldice": "Vessel clDice",
    "betti0_error": "Vessel Betti-0 error",
    "betti1_error": "Vessel Betti-1 error",
    "hd95_mm": "Vessel HD95 (mm)",
    "recall_below_0_75mm": "Vessel recall, radius below 0.75 mm",
    "recall_0_75_to_1_25mm": "Vessel recall, radius 0.75 to 1.25 mm",
    "recall_1_25_to_2mm": "Vessel recall, radius 1.25 to 2 mm",
    "recall_from_2mm": "Vessel recall, radius from 2 mm",
}
_IN_MASK = {
    "aneurysms_centre": "Aneurysm-in-mask recall, centre",
    "aneurysms_half": "Aneurysm-in-mask recall, half of the sac",
}
SIZES = ((0.0, 3.0, "below 3 mm"), (3.0, 7.0, "3 to 7 mm"), (7.0, math.inf, "7 mm and more"))
# A bootstrap with its draws and seed fixed: (statistic (b, n) -> (b, k), patients) -> k intervals.
Draw = Callable[[Callable[[np.ndarray], np.ndarray], Sequence[str]], list[Interval]]


class Row(NamedTuple):
    """One measured figure."""

    figure: str
    value: float
    interval: Interval | None  # 95 %, over patients
    n: int  # how many things were counted
    note: str  # of what, and how to read it


def score_rows(
    score: RsnaScore, truth: np.ndarray, probability: np.ndarray, patients: Sequence[str], draw: Draw
) -> tuple[list[Row], dict[str, Interval]]:
    """Score and AUC of all scans, and the interval of each column's AUC."""
    present = LABEL_COLUMNS.index(PRESENT)

    def figures(weights: np.ndarray) -> np.ndarray:
        areas = resampled_columns(truth, probability, weights)
        whole = combined(areas)
        if PRESENT in score.per_column:  # a resample without half of the score's weight is another figure
            whole = np.where(np.isfinite(areas[:, present]), whole, np.nan)
        places = areas[:, :present]
        found = np.isfinite(places).any(axis=1)
        mean = np.full(len(areas), np.nan)
        mean[found] = np.nanmean(places[found], axis=1)
        return np.column_stack([whole, mean, areas])

    whole, mean, *columns = draw(figures, patients)
    places = len(score.per_column) - (PRESENT in score.per_column)
    n = len(patients)
    rows = [
        Row("RSNA 2025 score", score.score, whole, n, f"{len(score.per_column)} of 14 labels scored"),
        Row("AUC Aneurysm Present", score.present, columns[present], n, _counts(score, PRESENT)),
        Row("Mean AUC of locations", score.locations, mean, n, f"{places} of 13 locations scored"),
    ]
    return rows, {name: columns[LABEL_COLUMNS.index(name)] for name in score.per_column}


def _counts(score: RsnaScore, name: str) -> str:
    return f"{score.positives[name]} positive, {score.negatives[name]} negative"


def froc_rows(stage: str, curve: Froc, patients: list[str], draw: Draw) -> list[Row]:
    """Sensitivity at fixed false alarms, CPM and false alarms on negatives of one stage's marks."""
    rates = (*FROC_RATES, *CPM_RATES)

    def figures(weights: np.ndarray) -> np.ndarray:
        values = curve.resampled(weights, rates)
        cpm = values[:, len(FROC_RATES) : len(rates)].mean(axis=1)
        return np.column_stack([values[:, : len(FROC_RATES)], cpm, values[:, len(rates) + 1]])

    *sensitivity, cpm, negatives = draw(figures, patients)
    reached = float(curve.curve["fp_per_scan"].to_numpy().max())
    lesions, negative = len(curve.lesions), int(curve.negative.sum())
    note = f"lesions; {stage}, hit within {curve.reach_mm:g} mm or the lesion's radius"
    rows = []
    for rate, interval in zip(FROC_RATES, sensitivity, strict=True):
        held = f"; curve ends at {reached:.2f}" if rate > reached else ""
        name = f"Sensitivity at {rate:g} false alarm{'' if rate == 1 else 's'} per scan"
        rows.append(Row(name, curve.sensitivity_at(rate), interval, lesions, note + held))
    note = "lesions; mean sensitivity at 1/8 to 8 false alarms per scan"
    rows.append(Row("CPM", curve.cpm, cpm, lesions, note))
    fp = curve.fp_on_negatives_at(FROC_RATES[1])
    name = "False alarms per negative scan"
    rows.append(Row(name, fp, negatives, negative, "negative scans; at 1 false alarm per scan over all"))
    return rows


def size_rows(curve: Froc) -> list[Row]:
    """Sensitivity by diameter of the lesion, for those whose size is known."""
    diameter = 2 * curve.lesions["radius_mm"].to_numpy(dtype=np.float64)
    found = curve.lesions["p"].to_numpy(dtype=np.float64) >= curve.threshold_at(1.0)
    rows = []
    for low, high, name in SIZES:
        inside = (diameter >= low) & (diameter < high)
        if inside.any():
            note = "lesions of that diameter, at 1 false alarm per scan"
            share = float(found[inside].mean())
            rows.append(Row(f"Sensitivity {name}", share, None, int(inside.sum()), note))
    return rows


def candidate_rows(recall: CandidateRecall, curve: Froc, patients: list[str], draw: Draw) -> list[Row]:
    """What the Smart Net hands to the expert: recall, number, and its own sensitivity."""
    interval = draw(recall.resampled, patients)[0]
    budget = draw(lambda weights: recall.resampled_when_keeping(weights, np.array([BUDGET])), patients)[0]
    number = draw(partial(resampled_mean, recall.per_scan.astype(np.float64)), patients)[0]
    found = draw(lambda weights: curve.resampled(weights, (1.0,))[:, :1], patients)[0]
    lesions, n = len(recall.rank), len(recall.scans)
    smart = "Smart Net sensitivity at 1 false alarm per scan"
    return [
        Row("Candidate recall", recall.recall, interval, lesions, "lesions hit by any candidate"),
        Row(
            f"Candidate recall at {BUDGET} per scan", recall.recall_when_keeping(BUDGET), budget, lesions,
            f"lesions hit by one of the best {BUDGET} candidates",
        ),
        Row("Candidates per scan", recall.mean_per_scan, number, n, "scans"),
        Row(smart, curve.sensitivity_at(1.0), found, lesions, "lesions; before the expert"),
        *(
            Row(
                f"Candidate recall at {BUDGET}, {name}", part.recall_when_keeping(BUDGET), None,
                len(part.rank), "lesions of that diameter or place",
            )
            for name, part in recall.groups()
        ),
    ]  # fmt: skip


def vessel_rows(vessel: pd.DataFrame, index: pd.DataFrame, draw: Draw) -> list[Row]:
    """Mean of each per-scan figure of the vessel masks."""
    patient_of = dict(zip(index["series_uid"], index["patient_id"], strict=True))
    patients = [str(patient_of.get(uid, uid)) for uid in vessel["series_uid"]]
    rows = []
    for column, name in VESSEL_FIGURES.items():
        if column not in vessel:
            continue
        values = vessel[column].to_numpy(dtype=np.float64)
        n = int(np.isfinite(values).sum())
        if n:
            interval = draw(partial(resampled_mean, values), patients)[0]
            rows.append(Row(name, float(np.nanmean(values)), interval, n, "scans with a vessel mask; mean"))
    for column, name in _IN_MASK.items():
        if column not in vessel or not (total := int(vessel["aneurysms"].to_numpy().sum())):
            continue
        inside, of = vessel[column].to_numpy(np.float64), vessel["aneurysms"].to_numpy(np.float64)
        interval = draw(partial(_resampled_share, inside, of), patients)[0]
        rows.append(Row(name, float(inside.sum() / total), interval, total, "aneurysms with a known place"))
    return rows


def _resampled_share(part: np.ndarray, whole: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of counts (n,) in each resample (b, n) -> (b, 1)."""
    total = weights @ whole
    return np.divide(weights @ part, total, out=np.full(len(weights), np.nan), where=total > 0)[:, None]


def calibration_rows(reliability: dict[str, Calibration]) -> list[Row]:
    """Expected calibration error and Brier score of each probability."""
    rows = []
    for what, value in reliability.items():
        if value.cases:
            note = f"{what}s; share of positives {value.prevalence:.2f}; 0 is perfect"
            rows.append(Row(f"Calibration error, {what}", value.ece, None, value.cases, note))
            rows.append(Row(f"Brier score, {what}", value.brier, None, value.cases, note))
    return rows
