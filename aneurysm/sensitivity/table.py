"""The table of a sensitivity study as CSV, figure and page; a study that was stopped goes on from its CSV."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.report.style import BLACK, CYCLE, dress, legend, new_figure, write_png
from aneurysm.sensitivity.errors import UNITS, MaskError

CSV, PNG, PAGE = "sensitivity.csv", "sensitivity.png", "sensitivity.md"
LOSSES = {
    "candidate_recall": "Candidate recall",
    "expert_auc_with_missed": "Expert's AUC, missed aneurysms last",
}
_SHOWN = (
    "mask_recall", "mask_precision", "aneurysm_in_mask", "candidate_recall", "expert_auc",
    "expert_auc_with_missed", "sensitivity_1fp",
)  # fmt: skip


def read_rows(path: Path, run: str, seed: int) -> pd.DataFrame:
    """The rows of an earlier start of the same study; none where there is no file.

    Raises:
        UserError: they are those of another expert, or of other errors.
    """
    if not path.is_file():
        return pd.DataFrame(columns=["run", "seed", "base", "kind", "level"])
    table = pd.read_csv(path)
    if set(table.run.astype(str)) - {run} or set(table.seed) - {seed}:
        raise UserError(
            f"{path} holds figures of the expert {table.run.iloc[0]} with seed {table.seed.iloc[0]}; these "
            f"would be of {run} with seed {seed}. Choose another folder with --out, or delete it."
        )
    return table


def has(table: pd.DataFrame, base: str, error: MaskError, scans: int) -> bool:
    """Whether a row of this error over so many scans is there."""
    same = (table.base == base) & (table.kind == error.kind) & (np.isclose(table.level, error.level))
    return bool(same.any()) and bool((table.loc[same, "scans"] == scans).any())


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """By base, then by kind in the order of UNITS, then by level."""
    kind = [list(UNITS).index(name) for name in table.kind]
    return table.iloc[
        np.lexsort((table.level.to_numpy(np.float64), kind, table.base == "truth"))
    ].reset_index(drop=True)


def write_all(table: pd.DataFrame, folder: Path, title: str) -> None:
    """CSV, PNG and a page in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CSV) as part:
        table.to_csv(part, index=False)
    write_png(losses_figure(table), folder / PNG, dpi=110)
    with replacing(folder / PAGE) as part:
        part.write_text(page(table, title))


def losses_figure(table: pd.DataFrame) -> Figure:
    """What is lost against recall and precision of the mask, a line per kind of error from none of it."""
    figure = new_figure(10.5, 7.2)
    axes = figure.subplots(2, 2, sharey="row")
    kinds = [kind for kind in UNITS if kind != "none" and (table.kind == kind).any()]
    solid = {base: style for base, style in zip(table.base.unique(), ("-", "--"), strict=False)}
    for row, (column, name) in enumerate(LOSSES.items()):
        for place, (x, label) in enumerate((("mask_recall", "recall"), ("mask_precision", "precision"))):
            one = dress(axes[row, place], f"Mask {label}, mean over scans", name if place == 0 else "")
            for base, part in table.groupby("base", sort=False):
                start = part[part.kind == "none"]
                for number, kind in enumerate(kinds):
                    own = pd.DataFrame(part[part.kind == kind]).sort_values(by="level")
                    line = pd.concat([pd.DataFrame(start), own])
                    if len(line) <= len(start):
                        continue
                    suffix = f", on {base} masks" if len(solid) > 1 else ""
                    one.plot(
                        line[x], line[column], solid[base], marker="o", markersize=4.5,
                        color=CYCLE[number], label=f"{kind}{suffix}",
                    )  # fmt: skip
                one.plot(start[x], start[column], "s", color=BLACK, markersize=7, label="_")
    if kinds:
        legend(axes[0, 0], "lower right")
    return figure


def page(table: pd.DataFrame, title: str) -> str:
    """The table in words and Markdown."""
    lines = [
        f"# Sensitivity to the lumen mask: {title}",
        "",
        "Errors of growing size are put into the held-out lumen masks; graph, candidates and the expert's "
        "verdict are then made anew by the models that had not seen the scan.",
        "",
        f"![What mask errors cost]({PNG})",
        "",
        "| masks | error | amount | " + " | ".join(name.replace("_", " ") for name in _SHOWN) + " |",
        "|---" * (3 + len(_SHOWN)) + "|",
    ]
    for row in table.to_dict("records"):
        amount = f"{row['level']:g} {UNITS[row['kind']]}" if row["kind"] != "none" else ""
        figures = " | ".join(_number(row[name]) for name in _SHOWN)
        lines.append(f"| {row['base']} | {row['kind']} | {amount} | {figures} |")
    first = table.iloc[0]
    lines += [
        "",
        f"{int(first['scans'])} scans, {int(first['aneurysms'])} aneurysms with a known place. Mask recall "
        "and precision are means over scans, before the mask is mended for the graph. An aneurysm is in the "
        "mask when half of its voxels are. A candidate hits within the expert's hit_mm of the centre, or "
        "inside the sac. The expert's AUC is over the candidates that there are; in the other one every "
        "aneurysm without a candidate counts as a positive that is ranked last, which is what a miss is. "
        "sensitivity 1fp: share of aneurysms found by the expert at one false alarm per scan.",
        "",
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3f}"
