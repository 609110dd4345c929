"""The rows of a robustness study as CSV, table and heat map, in units of the effect that matters."""

from pathlib import Path
from typing import Any

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
_ABREAST = 3  # shapes in a row
_NOTHING = "#c9cfd6"
_LEAST = 1e-3  # of the effect: less is none, and nothing can be measured in it


def unit(table: pd.DataFrame) -> pd.Series:
    """What each of NUMBERS is larger in the sac than in the tube, base case; NaN where they are equal."""
    base: Any = _base(table)
    effect = base.loc[SICK] - base.loc[HEALTHY]
    return effect.where(effect.abs() > _LEAST)


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Value minus that of the shape's base case, over |sac - tube|; rows without the base cases."""
    base: Any = _base(table).loc[table["shape"]]
    change: Any = table[list(NUMBERS)] - base.to_numpy()
    made: Any = pd.concat([table[["shape", "kind", "level"]], change / unit(table).abs()], axis=1)
    return made[made.kind != "base"].reset_index(drop=True)


def mean_changes(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over shapes of the size of the change, by kind and level in their order, with the flows lost."""
    change: Any = changes(table)
    by = [change.kind, change.level]
    mean = change[list(NUMBERS)].abs().groupby(by, sort=False).mean()
    return mean.assign(lost=change[NUMBERS[0]].isna().groupby(by, sort=False).sum())


def write_all(table: pd.DataFrame, folder: Path) -> None:
    """CSV with every value, and the heat map."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CSV) as part:
        table.to_csv(part, index=False)
    write_png(heat_map(table), folder / PNG, dpi=88)


def shown(table: pd.DataFrame) -> Table:
    """`mean_changes` for the terminal, with the unit of every column as its last row."""
    effect: Any = unit(table)
    mean = mean_changes(table)
    made = Table("change", *(name.replace("_", " ") for name in NUMBERS), "no flow")
    for row in mean.reset_index().to_dict("records"):
        values = (_number(row[name]) for name in NUMBERS)
        made.add_row(f"{row['kind']} {row['level']}", *values, f"{row['lost']}")
    made.add_section()
    made.add_row(f"{SICK} - {HEALTHY}", *(_number(effect[name], 3) for name in NUMBERS), "")
    return made


def heat_map(table: pd.DataFrame) -> Figure:
    """Numbers (sac - tube) by variations: mean size of the change over the shapes, and that of each shape."""
    change, mean, effect = changes(table), pd.DataFrame(mean_changes(table)[list(NUMBERS)]), unit(table)
    shapes = list(dict.fromkeys(change["shape"]))
    columns = [" ".join(of) for of in mean.index]  # type: ignore[arg-type]
    rows = -(-len(shapes) // _ABREAST)
    figure = new_figure(13.0, 4.6 + 3.3 * rows)
    places = figure.add_gridspec(1 + rows, _ABREAST, height_ratios=[1.2, *[1.0] * rows])
    wide = figure.add_subplot(places[0, :])
    image = _panel(wide, f"Mean size over {len(shapes)} shapes", mean, columns)
    for (row, column), value in np.ndenumerate(mean.to_numpy().T):
        if np.isfinite(value):
            ink = "white" if value > 0.7 * _FULL else INK
            text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
            wide.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    labels = [f"{name.replace('_', ' ')} ({effect[name]:+.2g})" for name in NUMBERS]
    wide.set_yticks(range(len(NUMBERS)), labels)
    for number, name in enumerate(shapes):
        row, column = divmod(number, _ABREAST)
        axes = figure.add_subplot(places[1 + row, column])
        own = change[change["shape"] == name][list(NUMBERS)]
        _panel(axes, name.replace("_", " ").capitalize(), pd.DataFrame(own), columns)
        axes.tick_params(labelleft=column == 0, labelsize=7)
    bar = figure.colorbar(image, ax=wide, pad=0.01, extend="both")
    bar.set_label("Change over (sac - tube)", color=SOFT_INK, fontsize=9)
    return figure


def _panel(axes: Axes, title: str, values: pd.DataFrame, columns: list[str]) -> AxesImage:
    """Signed changes in red and blue; grey where there is no flow, or nothing to measure it by."""
    dress(axes, "", "", title).grid(False)
    axes.set_facecolor(_NOTHING)
    image = axes.imshow(values.to_numpy().T, cmap="RdBu_r", vmin=-_FULL, vmax=_FULL, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(NUMBERS)), [name.replace("_", " ") for name in NUMBERS])
    return image


def _base(table: pd.DataFrame) -> pd.DataFrame:
    """NUMBERS of every shape in the base case, by shape."""
    return pd.DataFrame(table[table.kind == "base"].set_index("shape")[list(NUMBERS)])


def _number(value: float, digits: int = 2) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"
