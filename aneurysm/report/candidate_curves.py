"""Candidate recall of several Smart Nets in one chart."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aneurysm.report.style import CYCLE, dress, legend, new_figure

_STYLES = ("-", "--", ":")


def candidate_comparison_figure(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Recall against candidates kept per scan, one line per variant; the interval of the first is shaded.

    Args:
        curves: kept, recall, low, high of each variant.
    """
    figure = new_figure(8.4, 5.4)
    title = "Candidate recall, out-of-fold"
    axes = dress(figure.subplots(), "Candidates kept per scan", "Recall (share of lesions hit)", title)
    axes.set_ylim(-0.02, 1.03)
    for number, (name, curve) in enumerate(curves.items()):
        colour = CYCLE[number % len(CYCLE)]
        style = _STYLES[number // len(CYCLE) % len(_STYLES)]
        if number == 0 and bool(np.isfinite(curve["low"].to_numpy()).all()):
            axes.fill_between(
                curve["kept"], curve["low"], curve["high"], color=colour, alpha=0.12, linewidth=0
            )
        axes.plot(curve["kept"], curve["recall"], color=colour, linestyle=style, linewidth=1.6, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, "lower right")
    return figure
