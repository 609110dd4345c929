"""What the loggers recorded, as charts: metrics per stage and the weights that balance the losses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aneurysm.report.style import BLACK, BLUE, CYCLE, GREEN, RED, dress, legend, new_figure


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """What a logger recorded during one training."""

    stage: str  # pretrain, vessel, smart_net, expert, stacker
    fold: int
    metrics: pd.DataFrame  # epoch and/or step, and any metrics; a cell is NaN where nothing was logged


def training_figure(curves: Sequence[TrainingCurve], most: int = 6) -> Figure | None:
    """Metrics of one stage over training: one panel per metric, training and validation together.

    A metric is grouped by what follows the first slash: train/loss and val/loss share a panel. Losses
    come first; at most `most` panels are drawn. Loss weights have their own figure. None without metrics.
    """
    panels: dict[str, list[str]] = {}
    for column in _metrics(curves):
        if not _is_weight(column):
            panels.setdefault(column.split("/", 1)[-1], []).append(column)
    panels = {name: columns for name, columns in panels.items() if _length(curves, columns) > 0}
    chosen = sorted(panels, key=lambda name: ("loss" not in name, name))[:most]
    if not chosen:
        return None
    across = min(3, len(chosen))
    down = -(-len(chosen) // across)
    figure = new_figure(3.9 * across, 2.9 * down)
    grid = np.atleast_1d(figure.subplots(down, across)).ravel()
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, chosen, strict=False):
        for column in sorted(panels[name]):
            part = column.split("/", 1)[0] if "/" in column else ""
            colour = {"train": BLUE, "val": RED, "test": GREEN}.get(part, BLACK)
            _lines(axes, curves, column, colour, {"train": "training", "val": "validation"}.get(part, part))
        dress(axes, _clock(curves), name.replace("_", " "))
        if len(panels[name]) > 1:
            legend(axes)
    return figure


def loss_weight_figure(curves: Sequence[TrainingCurve]) -> Figure | None:
    """The weights that balance the loss terms over training, one line per term; None when none was logged.

    A metric counts as a weight when a part of its name, cut at slashes, starts with "weight".
    """
    columns = sorted(column for column in _metrics(curves) if _is_weight(column))
    columns = [column for column in columns if _length(curves, [column]) > 0]
    if not columns:
        return None
    figure = new_figure(7.2, 3.6)
    axes = dress(figure.subplots(), _clock(curves), "Weight of the term", "Balance of the loss terms")
    for column, colour in zip(columns, CYCLE * 4, strict=False):
        _lines(axes, curves, column, colour, column.rsplit("/", 1)[-1].replace("weight_", ""))
    legend(axes)
    return figure


def _metrics(curves: Sequence[TrainingCurve]) -> list[str]:
    seen = {str(column) for curve in curves for column in curve.metrics.select_dtypes("number")}
    return sorted(seen - {"epoch", "step"})


def _is_weight(column: str) -> bool:
    return any(part.startswith("weight") for part in column.split("/"))


def _clock(curves: Sequence[TrainingCurve]) -> str:
    return "epoch" if all("epoch" in curve.metrics for curve in curves) else "step"


def _length(curves: Sequence[TrainingCurve], columns: Sequence[str]) -> int:
    return sum(len(c.metrics[k].dropna()) for c in curves for k in columns if k in c.metrics)


def _lines(axes: Axes, curves: Sequence[TrainingCurve], column: str, colour: str, label: str) -> None:
    clock = _clock(curves)
    several = len({curve.fold for curve in curves}) > 1
    logged = [curve.metrics for curve in curves if column in curve.metrics and clock in curve.metrics]
    for number, metrics in enumerate(logged):
        values = metrics[[clock, column]].dropna().to_numpy(dtype=np.float64)
        ticks = np.unique(values[:, 0])
        means = [values[values[:, 0] == tick, 1].mean() for tick in ticks]
        axes.plot(
            ticks, means, color=colour, linewidth=1.1 if several else 1.8,
            alpha=0.65 if several else 1.0, marker="o" if len(ticks) < 3 else None, markersize=4,
            label=label if number == 0 else None,
        )  # fmt: skip
