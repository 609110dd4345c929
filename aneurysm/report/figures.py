"""Charts of an evaluation; charts of training and views of a scan can be imported from here too."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, PRESENT
from aneurysm.evaluation.calibration import Calibration
from aneurysm.evaluation.candidates import KINDS, CandidateRecall
from aneurysm.evaluation.froc import Froc
from aneurysm.evaluation.intervals import Interval
from aneurysm.evaluation.rsna_score import RsnaScore
from aneurysm.report.curves import TrainingCurve, loss_weight_figure, training_figure
from aneurysm.report.projections import candidate_crops, mip_panel, vessel_graph_figure
from aneurysm.report.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SOFT_INK,
    dress,
    empty,
    legend,
    new_figure,
)

__all__ = [
    "TrainingCurve",
    "calibration_figure",
    "candidate_crops",
    "candidate_figure",
    "froc_figure",
    "location_figure",
    "loss_weight_figure",
    "mip_panel",
    "roc_figure",
    "training_figure",
    "vessel_graph_figure",
]

# Colour names the artery, the line its side; 13 hues cannot be told apart.
ARTERY_COLOURS = {
    "Infraclinoid": SKY,
    "Supraclinoid": BLUE,
    "Middle Cerebral": ORANGE,
    "Anterior": GREEN,
    "Posterior Communicating": PURPLE,
    "Basilar": RED,
    "Other": BLACK,
}
STAGE_NAMES = {"expert": "Expert (final)", "smart_net": "Smart Net (candidates)"}


def roc_figure(
    truth: np.ndarray,
    probability: np.ndarray,
    score: RsnaScore,
    intervals: Mapping[str, Interval] | None = None,
) -> Figure:
    """ROC curves: the scan-level label on the left, the locations on the right.

    Args:
        truth: (n, 14) 0, 1 or NaN, submission order.
        probability: (n, 14) in 0..1.
        score: of the same scans; its left-out labels are not drawn.
        intervals: of the AUC of each label, for the legend.
    """
    figure = new_figure(11, 4.9)
    left, right = figure.subplots(1, 2)
    for axes, title in ((left, PRESENT), (right, "By location")):
        dress(axes, "False positive rate (1 − specificity)", "True positive rate (sensitivity)", title)
        axes.plot([0, 1], [0, 1], color="#b8c0ca", linewidth=1, linestyle=(0, (4, 4)))
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    for column, name in enumerate(LABEL_COLUMNS):
        if name not in score.per_column:
            continue
        known = np.isfinite(truth[:, column])
        x, y, _ = roc_curve(truth[known, column], probability[known, column])
        text = f"{score.per_column[name]:.2f}"
        if name == PRESENT:
            interval = (intervals or {}).get(name)
            shown = f"AUC {text}{_span(interval)}"
            left.plot(x, y, color=BLUE, linewidth=2.4, label=shown)
            left.fill_between(x, y, color=BLUE, alpha=0.08, linewidth=0)
            legend(left, "lower right")
        else:
            style = "--" if name.startswith("Left") else "-"
            right.plot(
                x,
                y,
                color=_artery_colour(name),
                linewidth=1.6,
                linestyle=style,
                label=f"{_short(name)} {text}",
            )
    if PRESENT not in score.per_column:
        empty(left, dict(score.left_out)[PRESENT])
    if len(right.lines) > 1:
        right.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False, labelcolor=INK,
            title="AUC (dashed: left)", title_fontsize=8, alignment="left",
        )  # fmt: skip
    else:
        empty(right, "no location could be scored")
    return figure


def froc_figure(curves: Mapping[str, Froc], marked: Sequence[float] = (0.5, 1.0, 2.0)) -> Figure:
    """Sensitivity against false alarms per scan, one line per stage, with operating points marked."""
    figure = new_figure(6.4, 4.6)
    axes = dress(
        figure.subplots(), "False alarms per scan (log scale)", "Sensitivity (share of lesions found)",
        "Free-response ROC",
    )  # fmt: skip
    axes.set(xscale="log", xlim=(0.04, 16), ylim=(-0.02, 1.03))
    ticks = (0.05, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    for (stage, curve), colour in zip(curves.items(), CYCLE, strict=False):
        rate = np.append(np.maximum(curve.curve["fp_per_scan"], 1e-3), 100)
        found = np.append(curve.curve["sensitivity"], curve.curve["sensitivity"].iloc[-1])
        if not np.isfinite(found).all():
            continue
        end = float(curve.curve["fp_per_scan"].to_numpy().max())
        solid = rate <= max(end, 1e-3)
        name = f"{STAGE_NAMES.get(stage, stage)}, CPM {curve.cpm:.2f}"
        axes.plot(rate[solid], found[solid], color=colour, linewidth=2.2, label=name)
        axes.plot([end, 100], [found[-1]] * 2, color=colour, linewidth=1.2, linestyle=":")
        points = [rate_ for rate_ in marked if rate_ <= end]
        axes.plot(points, [curve.sensitivity_at(x) for x in points], "o", color=colour, markersize=5.5)
    if axes.lines:
        legend(axes, "lower right")
    else:
        empty(axes, "no lesion with a known position")
    return figure


def calibration_figure(reliability: Mapping[str, Calibration]) -> Figure:
    """Observed against predicted probability; a circle's area grows with the number of cases."""
    figure = new_figure(6.4, 4.6)
    axes = dress(figure.subplots(), "Predicted probability", "Observed share of positives", "Calibration")
    axes.plot([0, 1], [0, 1], color="#b8c0ca", linewidth=1, linestyle=(0, (4, 4)))
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    for (name, value), colour in zip(reliability.items(), CYCLE, strict=False):
        if value.cases == 0:
            continue
        label = f"{name}, {value.cases} cases, error {value.ece:.2f}"
        axes.plot(value.predicted, value.observed, color=colour, linewidth=1.6, label=label)
        size = 18 + 180 * np.sqrt(value.count / value.count.max())
        axes.scatter(value.predicted, value.observed, s=size, color=colour, alpha=0.35, linewidth=0)
        axes.scatter(value.predicted, value.observed, s=12, color=colour, linewidth=0)
    if len(axes.lines) > 1:
        legend(axes, "upper left")
    else:
        empty(axes, "no case with a known label")
    return figure


def location_figure(score: RsnaScore, intervals: Mapping[str, Interval] | None = None) -> Figure:
    """AUC of every label with its interval; labels that could not be scored are named with the reason."""
    figure = new_figure(9.2, 5.2)
    axes = dress(figure.subplots(), "AUC (0.5 is chance)", "", "AUC by location, with 95 % interval")
    axes.grid(axis="y", visible=False)
    lows = [*score.per_column.values(), *(i.low for i in (intervals or {}).values() if np.isfinite(i.low))]
    left = max(0.0, min([0.4, *(value - 0.05 for value in lows)]))
    axes.axvline(0.5, color="#b8c0ca", linewidth=1, linestyle=(0, (4, 4)))
    reasons = dict(score.left_out)
    order = (PRESENT, *LOCATIONS)
    for row, name in enumerate(order):
        y = len(order) - 1 - row
        if name in reasons:
            why = f"left out: {reasons[name]}"
            axes.text(left + 0.01, y, why, va="center", fontsize=8, color=SOFT_INK, style="italic")
            continue
        colour = INK if name == PRESENT else _artery_colour(name)
        area, interval = score.per_column[name], (intervals or {}).get(name)
        if interval is not None and np.isfinite(interval.low):
            axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=5, alpha=0.3)
        axes.plot(area, y, "o", color=colour, markersize=7, clip_on=False)
        axes.text(1.0 + 0.03 * (1 - left), y, f"{area:.2f}", va="center", fontsize=8.5, color=INK)
    names = [f"{name}  ({score.positives[name]} pos.)" for name in order]
    axes.set_yticks(range(len(order) - 1, -1, -1), names)
    axes.set(xlim=(left, 1.0), ylim=(-0.7, len(order) - 0.3))
    return figure


def candidate_figure(recall: CandidateRecall, curve: pd.DataFrame | None = None) -> Figure:
    """Share of lesions kept against the number of candidates kept per scan, all and by kind of lesion.

    Args:
        recall: of the candidates.
        curve: kept, recall, low, high of all lesions; without it no interval is drawn.
    """
    figure = new_figure(6.4, 4.6)
    axes = dress(
        figure.subplots(), "Candidates kept per scan", "Recall (share of lesions hit)", "Candidate recall"
    )
    axes.set_ylim(-0.02, 1.03)
    shown = recall.curve() if curve is None else curve
    if recall.rank.size:
        if curve is not None and np.isfinite(curve["low"]).all():
            axes.fill_between(
                curve["kept"], curve["low"], curve["high"], step="post", color=BLUE, alpha=0.15, linewidth=0
            )
        axes.step(
            shown["kept"], shown["recall"], where="post", color=BLUE, linewidth=2.2, label="all lesions"
        )
        axes.plot(shown["kept"], shown["recall"], "o", color=BLUE, markersize=4)
        kinds = [(name, part) for name, part in recall.groups() if name in KINDS]
        for (name, part), colour in zip(kinds, (GREEN, PURPLE), strict=False):
            values = [part.recall_when_keeping(int(k)) for k in shown["kept"]]
            label = f"{name} ({len(part.rank)})"
            axes.plot(shown["kept"], values, color=colour, linewidth=1.2, alpha=0.8, label=label)
        axes.axvline(recall.mean_per_scan, color=ORANGE, linewidth=1.4, linestyle=(0, (4, 4)))
        axes.text(
            recall.mean_per_scan, 0.02, f" mean {recall.mean_per_scan:.1f} per scan", color=INK, fontsize=8.5
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kinds:
            legend(axes, "lower right")
    else:
        empty(axes, "no lesion with a known position")
    return figure


def _artery_colour(name: str) -> str:
    return next(colour for part, colour in ARTERY_COLOURS.items() if part in name)


def _short(name: str) -> str:
    for long, short in (
        ("Left ", "L "), ("Right ", "R "), ("Internal Carotid Artery", "ICA"), ("Artery", ""),
        ("Middle Cerebral", "MCA"), ("Anterior Cerebral", "ACA"), ("Anterior Communicating", "ACom"),
        ("Posterior Communicating", "PCom"), ("Other Posterior Circulation", "Other posterior"),
    ):  # fmt: skip
        name = name.replace(long, short)
    return name.strip()


def _span(interval: Interval | None) -> str:
    if interval is None or not np.isfinite(interval.low):
        return ""
    return f" ({interval.low:.2f} to {interval.high:.2f})"
