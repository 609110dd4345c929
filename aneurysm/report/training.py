"""The page that tells how good an experiment is: figures, curves, examples, what was left out."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from aneurysm.data.files import replacing
from aneurysm.data.labels import LOCATIONS
from aneurysm.evaluation.froc import DUPLICATE, FALSE_ALARM, HIT
from aneurysm.evaluation.summary import Evaluation
from aneurysm.report.figures import (
    TrainingCurve,
    calibration_figure,
    candidate_figure,
    froc_figure,
    location_figure,
    loss_weight_figure,
    roc_figure,
    training_figure,
)
from aneurysm.report.html import Picture, write_page

HEADLINE = (
    "RSNA 2025 score",
    "AUC Aneurysm Present",
    "Sensitivity at 1 false alarm per scan",
    "Candidate recall",
    "Vessel recall",
    "Calibration error, scan",
)
STAGE_ORDER = ("pretrain", "vessel", "smart_net", "expert", "stacker")
CALIBRATION_CAPTION = "On the dashed line a probability means what it says. Larger circles hold more cases."


def write_training_report(
    folder: Path,
    evaluation: Evaluation,
    curves: Sequence[TrainingCurve] = (),
    figures: Sequence[Picture] = (),
    config_text: str = "",
    data_text: str = "",
    timings: Mapping[str, float] | None = None,
    title: str = "Training report",
) -> Path:
    """Write index.html with everything inside, and beside it the PNGs, metrics.json and three CSV tables.

    Args:
        folder: made if it is not there; files of an earlier report are replaced.
        evaluation: of the out-of-fold predictions.
        curves: what the loggers recorded, one per stage and fold.
        figures: further pictures, such as projections of example scans, shown under their `group`.
        config_text: the resolved configuration.
        data_text: where the data came from, in words.
        timings: seconds per part of the run.
        title: of the page.

    Returns:
        The path of index.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    detection = []
    if evaluation.froc:
        caption = "Dots: 0.5, 1 and 2 false alarms per scan. Dotted: beyond the last mark. All scans count."
        detection.append(Picture("FROC", froc_figure(evaluation.froc), caption))
    if evaluation.candidates is not None:
        caption = (
            "No later stage can find a lesion that no candidate hits. Shaded: 95 % interval over patients. "
            "candidates.csv holds the recall by size and kind of the lesions."
        )
        figure = candidate_figure(evaluation.candidates, evaluation.candidate_curve)
        detection.append(Picture("Candidate recall", figure, caption))
    intervals = evaluation.column_intervals
    roc = roc_figure(evaluation.truth, evaluation.probability, evaluation.rsna, intervals)
    scan_level = [
        Picture("ROC", roc),
        Picture("AUC by location", location_figure(evaluation.rsna, intervals)),
        Picture("Calibration", calibration_figure(evaluation.calibration), CALIBRATION_CAPTION),
    ]
    training = list(_training_pictures(curves))
    for stale in folder.glob("[0-9][0-9]_*.png"):
        stale.unlink()
    for number, picture in enumerate([*detection, *scan_level, *training, *figures], start=1):
        name = re.sub(r"[^a-z0-9]+", "_", picture.title.lower()).strip("_")[:60]
        _write(folder / f"{number:02d}_{name}.png", picture.png)
    _write(folder / "metrics.json", evaluation.to_json().encode())
    _write_results(folder / "results.csv", evaluation)
    _write_detections(folder / "detections.csv", evaluation)
    if evaluation.candidate_groups is not None:
        with replacing(folder / "candidates.csv") as part:
            evaluation.candidate_groups.to_csv(part, index=False)

    rows = evaluation.rows()
    named = {row.figure: row for row in rows}
    spent = dict(timings or {})
    longest = max([*spent.values(), 1e-9])
    grouped: dict[str, list[Picture]] = {}
    for picture in figures:
        grouped.setdefault(picture.group or "Example scans", []).append(picture)
    content = {
        "title": title,
        "scans": len(evaluation.scans),
        "headline": [named[name] for name in HEADLINE if name in named],
        "rows": rows,
        "left_out": evaluation.left_out,
        "detection": detection,
        "scan_level": scan_level,
        "groups": evaluation.groups.to_dict("records"),
        "masks": evaluation.masks.to_dict("records"),
        "groups_of_pictures": list(grouped.items()),
        "training": training,
        "timings": [(name, seconds, seconds / longest) for name, seconds in spent.items()],
        "data_text": data_text,
        "config_text": config_text,
    }
    return write_page(folder / "index.html", "training", content)


def _training_pictures(curves: Sequence[TrainingCurve]):
    names = {curve.stage for curve in curves}
    for stage in [*STAGE_ORDER, *sorted(names - set(STAGE_ORDER))]:
        mine = [curve for curve in curves if curve.stage == stage]
        folds = len({curve.fold for curve in mine})
        caption = f"{folds} folds, one line each." if folds > 1 else ""
        for what, draw in (("", training_figure), (", loss weights", loss_weight_figure)):
            figure = draw(mine) if mine else None
            if figure is not None:
                yield Picture(f"{stage.replace('_', ' ').capitalize()}{what}", figure, caption)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


def _write_results(path: Path, evaluation: Evaluation) -> None:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["figure", "value", "low", "high", "resamples", "n", "note"])
        for row in evaluation.rows():
            bounds = row.interval or ("", "", "")
            writer.writerow([row.figure, row.value, *bounds, row.n, row.note])


def _write_detections(path: Path, evaluation: Evaluation) -> None:
    """Every mark with its outcome at 1 false alarm per scan, and every lesion without a mark above it."""
    curve = evaluation.froc.get("expert") or evaluation.froc.get("smart_net")
    if curve is None:
        return
    threshold = curve.threshold_at(1.0)
    short = {HIT: "TP", FALSE_ALARM: "FP", DUPLICATE: "duplicate"}
    marks = curve.marks.assign(
        outcome=[short[outcome] for outcome in curve.marks["outcome"]],
        above_threshold=curve.marks["p"] >= threshold,
        radius_mm=np.nan,
        location="",
    )
    missed = curve.lesions.assign(
        outcome="FN",
        above_threshold=False,
        location=[LOCATIONS[k] if k >= 0 else "" for k in curve.lesions["location"]],
    )
    missed = missed.loc[~(curve.lesions["p"] >= threshold)]
    columns = ["series_uid", "outcome", "above_threshold", "p", "x_mm", "y_mm", "z_mm", "lesion"]
    columns += ["radius_mm", "location"]
    table = pd.concat([marks[columns], missed[columns]], ignore_index=True)
    order = np.lexsort((-np.asarray(table["p"]), np.asarray(table["series_uid"], dtype=str)))
    table = table.iloc[order]
    with replacing(path) as part:
        table.to_csv(part, index=False)
