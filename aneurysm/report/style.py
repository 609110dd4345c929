"""The look that all figures share: colours that survive colour blindness, fonts, PNG bytes.

Figures are built on `Figure` and an Agg canvas, never through pyplot: nothing is kept between calls, no
window system is asked for, and figures can be made in worker processes.
Colours: Okabe and Ito, "Color Universal Design", 2008.
"""

import io
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aneurysm.data.files import replacing

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, BLACK = "#CC79A7", "#56B4E9", "#F0E442", "#1b2330"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
INK, SOFT_INK, GRID = "#1b2330", "#5b6675", "#e3e7ec"
NIGHT, NIGHT_INK = "#0d1117", "#d7dde5"  # behind scans, as on a reading screen
PANEL, PANEL_LINE = "#12171f", "#2b3440"


def new_figure(width: float, height: float, dark: bool = False) -> Figure:
    """An empty figure of a size in inches, light for charts, dark for scans."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=NIGHT if dark else "white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, x: str, y: str, title: str = "") -> Axes:
    """Name the axes (with units) and quieten everything that is not data."""
    axes.set_xlabel(x, color=SOFT_INK, fontsize=9)
    axes.set_ylabel(y, color=SOFT_INK, fontsize=9)
    axes.set_title(title, loc="left", color=INK, fontsize=10.5, fontweight="bold", pad=8)
    axes.tick_params(colors=SOFT_INK, labelsize=8.5, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0ca")
    return axes


def legend(
    axes: Axes, place: Literal["best", "lower right", "upper left"] = "best", columns: int = 1
) -> None:
    """A legend without a box that fights with the data."""
    axes.legend(
        loc=place, ncols=columns, fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none", labelcolor=INK
    )


def empty(axes: Axes, why: str) -> None:
    """Say in the middle of an empty chart why it is empty."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=SOFT_INK, fontsize=9.5)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Render a figure; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def write_png(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Render a figure into a file that is either whole or absent."""
    with replacing(path) as part:
        part.write_bytes(png(figure, dpi))
