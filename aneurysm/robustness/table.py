"""The rows of a robustness study as CSV, table and heat map, in units of the effect that matters."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.table import Table

from aneurysm.data.files import replacing
from aneurysm.report.style import INK, SOFT_INK, dress, new_figure, write_png
from aneurysm.robustness.study import NUMBERS

CSV, PNG = "robustness.csv", "robustness.png"
HEALTHY, SICK = "tube", "sac"  # the shapes whose difference is the unit
_FULL = 2.0  # change in units at which the colours end
_LEAST = 1e-3  # of the effect: less is none, and nothing can be measured in it


def unit(table: pd.DataFrame) -> pd.Series:
    """What each of NUMBERS is larger in the sac than in the tube, base case; NaN where they are equal."""
    base = table[table.kind == "base"].set_index("shape")[list(NUMBERS)]
    effect = base.loc[SICK] - base.loc[HEALTHY]
    return effect.where(effect.abs() > _LEAST)


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Value minus that of the shape's base case, over |sac - tube|; rows without the base cases."""
    base = table[table.kind == "base"].set_index("shape")[list(NUMBERS)]
    change = table[list(NUMBERS)] - base.loc[table["shape"]].to_numpy()
    made = pd.concat([table[["shape", "kind", "level"]], change / unit(table).abs()], axis=1)
    return pd.DataFrame(made[made.kind != "base"]).reset_index(drop=True)


def mean_changes(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over shapes of the size of the change, by kind and level in their order, with the flows lost."""
    change = changes(table)
    by = [change.kind, change.level]
    mean = change[list(NUMBERS)].abs().groupby(by, sort=False).mean()
    return mean.assign(lost=change[NUMBERS[0]].isna().groupby(by, sort=False).sum())


def write_all(table: pd.DataFrame, folder: Path) -> None:
    """CSV with every value, and the heat map."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CSV) as part:
        table.to_csv(part, index=False)
    write_png(heat_map(table), folder / PNG, dpi=90)


def shown(table: pd.DataFrame) -> Table:
    """`mean_changes` for the terminal, with the unit of every column as its last row."""
    effect, mean = unit(table), mean_changes(table)
    made = Table("change", *(name.replace("_", " ") for name in NUMBERS), "no flow")
    for (kind, level), row in mean.iterrows():  # type: ignore[misc]
        made.add_row(f"{kind} {level}", *(_number(row[name]) for name in NUMBERS), f"{row['lost']:.0f}")
    made.add_section()
    made.add_row(f"{SICK} - {HEALTHY}", *(_number(effect[name], 3) for name in NUMBERS), "")
    return made


def heat_map(table: pd.DataFrame) -> Figure:
    """Numbers by variations: the mean size of the change over all shapes, then the change of every shape."""
    change, mean = changes(table), mean_changes(table)
    shapes = list(dict.fromkeys(change["shape"]))
    columns = [f"{kind} {level}" for kind, level in mean.index]
    rows = (len(shapes) + 2) // 2
    figure = new_figure(2.5 + 0.95 * max(len(columns), 4), 1.2 + 2.9 * rows)
    axes = np.atleast_2d(figure.subplots(rows, 2, sharex=True, sharey=True)).ravel()
    grids = {f"Mean size over {len(shapes)} shapes": mean[list(NUMBERS)].to_numpy().T}
    for name in shapes:
        own = change[change["shape"] == name][list(NUMBERS)]
        grids[name.replace("_", " ").capitalize()] = own.to_numpy().T
    for place, (title, values) in zip(axes, grids.items(), strict=False):
        image = _panel(place, title, values, columns)
    for place in axes[len(grids) :]:
        place.set_visible(False)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.5, pad=0.01, extend="both")
    bar.set_label("Change from the base case over |sac - tube|; grey: no flow, or no effect", color=SOFT_INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _panel(axes: Axes, title: str, values: np.ndarray, columns: list[str]) -> AxesImage:
    dress(axes, "", "", title)
    axes.grid(False)
    axes.set_facecolor("#c9cfd6")
    image = axes.imshow(values, cmap="RdBu_r", vmin=-_FULL, vmax=_FULL, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(NUMBERS)), [name.replace("_", " ") for name in NUMBERS])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if abs(value) > 0.7 * _FULL else INK
            axes.text(column, row, _short(value), ha="center", va="center", fontsize=6.5, color=ink)
    return image


def _short(value: float) -> str:
    return f"{value:.1f}".replace("-0.0", "0.0") if abs(value) < 10 else f"{value:.0f}"


def _number(value: float, digits: int = 2) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"
