"""Compare what the Smart Nets of an experiment propose: `python -m aneurysm.candidates outputs/<experiment>`.

Reads the finished variants of the stage (graph nets, sources of candidates, heat maps), measures their
out-of-fold candidate recall, and leaves `candidates/recall.csv` and `candidates/recall.png` there.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.preparation.prepared import SUFFIX, load_prepared, open_prepared
from aneurysm.data.scan import Lesion
from aneurysm.data.tables import CANDIDATES
from aneurysm.evaluation.candidates import BUDGET, candidate_recall
from aneurysm.evaluation.lesion_kinds import LesionFacts, lesion_facts
from aneurysm.report.candidate_curves import candidate_comparison_figure
from aneurysm.report.style import write_png


@dataclass(frozen=True, eq=False)
class Variant:
    """One configuration of the stage whose folds are all finished."""

    folder: Path  # holds its folds
    name: str  # graph net, source, and what feeds the source
    data: str  # fingerprint of labels, patients and folds
    candidates: pd.DataFrame  # of all folds


def variants(experiment: Path) -> Iterator[Variant]:
    """The finished variants of an experiment's Smart Net, by the name of their folder."""
    for folder in sorted((experiment / "smart_net").glob("*-*")):
        notes = [json.loads(p.read_text()) for p in sorted(folder.glob("fold_*/run.json"))]
        done = [p.parent for p in sorted(folder.glob("fold_*/done.json")) if p.parent.name[5:].isdigit()]
        if not notes or len(done) < int(notes[0]["settings"]["folds"]):
            continue
        tables = [CANDIDATES.read(fold / "candidates.parquet") for fold in done]
        rows = [t for t in tables if len(t)] or tables[:1]
        yield Variant(folder, _name(experiment, folder, notes[0]), notes[0]["data"], pd.concat(rows))


def _name(experiment: Path, folder: Path, note: dict[str, Any]) -> str:
    settings = note["settings"]
    net = str(settings["graph_net"]["_target_"]).rsplit(".", 1)[-1].replace("absent", "no graph net")
    source = settings["smart_net"].get("candidates", {}).get("source", "before fusion")
    key = note["upstream"].get("segmenter", "")
    upstream = next(iter((experiment / "segmenter").glob(f"*-{key}/fold_*/run.json")), None)
    head = "none"
    if upstream is not None:
        head = json.loads(upstream.read_text())["settings"]["smart_net"].get("heatmap", "none")
    return (
        f"{net}, {source}, {'sac mask' if head == 'none' else 'heat map'} ({folder.name.rsplit('-', 1)[-1]})"
    )


def known_lesions(
    experiment: Path, data: str, prepared: Path
) -> tuple[dict[str, str], dict[str, tuple[Lesion, ...]], dict[str, tuple[LesionFacts, ...]]]:
    """Patient, lesions, and facts of the lesions, of every series whose lesions' positions are all known.

    Raises:
        UserError: the labels or the prepared scans are gone.
    """
    labels = experiment / f"labels-{data}.csv"
    if not labels.is_file():
        raise UserError(f"{labels} is missing: give the folder of an experiment as train.py left it.")
    table = pd.read_csv(labels, dtype={"series_uid": str, "patient_id": str})
    patients, lesions, facts = {}, {}, {}
    for row in table.to_dict("records"):
        uid = str(row["series_uid"])
        files = sorted(prepared.glob(f"{uid}-*{SUFFIX}"), key=lambda p: p.stat().st_mtime)
        if not files:
            raise UserError(
                f"{uid} is not among the prepared scans in {prepared}: say where with --prepared."
            )
        found = open_prepared(files[-1]).lesions
        if not found and row["present"] != 0:
            continue  # a candidate may well hit an aneurysm whose position nobody noted
        patients[uid] = str(row["patient_id"])
        if found:
            lesions[uid], facts[uid] = found, lesion_facts(load_prepared(files[-1]))
    return patients, lesions, facts


def compare(experiment: Path, prepared: Path) -> pd.DataFrame:
    """Measure every variant, write the table and the figure, and return the table.

    Raises:
        UserError: no variant is finished, or nothing is known of their lesions.
    """
    found = list(variants(experiment))
    if not found:
        raise UserError(f"{experiment} holds no finished Smart Net. Run `python train.py stage=smart_net`.")
    known: dict[str, Any] = {}
    tables, curves = [], {}
    for variant in found:
        if variant.data not in known:
            known[variant.data] = known_lesions(experiment, variant.data, prepared)
        patients, lesions, facts = known[variant.data]
        if not lesions:
            raise UserError(f"No lesion of {experiment} has a known position: recall cannot be measured.")
        recall = candidate_recall(variant.candidates, lesions, tuple(patients), facts=facts)
        own = list(patients.values())
        tables.append(recall.table(own).assign(variant=variant.name, per_scan=recall.mean_per_scan))
        curves[variant.name] = recall.curve_with_intervals(own)
    table = pd.concat(tables, ignore_index=True)
    table = pd.DataFrame(table[["variant", *(c for c in table.columns if c != "variant")]])
    out = experiment / "candidates"
    out.mkdir(exist_ok=True)
    with replacing(out / "recall.csv") as part:
        table.to_csv(part, index=False)
    write_png(candidate_comparison_figure(curves), out / "recall.png")
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m aneurysm.candidates",
        description="Compare what the Smart Nets of an experiment propose.",
    )
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>")
    parser.add_argument(
        "--prepared", type=Path, help="prepared scans; default: prepared/ beside the experiment"
    )
    given = parser.parse_args(arguments)
    try:
        table = compare(given.experiment, given.prepared or given.experiment.parent / "prepared")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    shown = Table(
        "variant", "lesions", "n", *(c for c in table.columns if c.startswith("recall_")), f"95 % at {BUDGET}"
    )
    for row in table.to_dict("records"):
        values = [f"{v:.3f}" for k, v in row.items() if k.startswith("recall_")]
        bounds = f"{row[f'low_{BUDGET}']:.3f} .. {row[f'high_{BUDGET}']:.3f}"
        shown.add_row(row["variant"], row["lesions"], str(row["n"]), *values, bounds)
    Console(width=None if Console().is_terminal else 160).print(shown)
    print(given.experiment / "candidates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
