"""The comparison as CSV: one row per variant, one row per run; UTF-8, columns declared here."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from aneurysm.compare.comparison import StageComparison
from aneurysm.compare.metrics import COSTS, Metric
from aneurysm.compare.read import State
from aneurysm.compare.settings import text
from aneurysm.data.files import replacing

# Between `data` and `metric` stand the swept settings, by their names on the command line; behind the
# columns of VARIANT_COLUMNS the mean of every other figure, as mean:<figure>.
VARIANT_COLUMNS: Mapping[str, str] = {
    "experiment": "folder of the experiment",
    "stage": "of the pipeline",
    "variant": "folder of the variant, <name>-<hash>",
    "data": "fingerprint of labels, patients and folds; rows of different data are not compared",
    "metric": "the figure of the following columns",
    "higher_is_better": "true or false",
    "repeats": "finished folds x seeds with this figure",
    "mean": "over the repeats",
    "sd": "over the repeats, empty below two",
    "low": "95 % t interval of the mean over the repeats",
    "high": "its upper bound",
    "best": "true for the best variant of its data",
    "reference": "variant that this row is compared with",
    "difference": "mean over the shared folds and seeds, this variant less the reference",
    "difference_low": "95 % interval, corrected for overlapping training sets, of this comparison alone",
    "difference_high": "its upper bound",
    "shared_repeats": "folds and seeds that both have",
    "p": "two-sided, corrected resampled t-test, of this comparison alone",
    "p_corrected": "by Holm, for all comparisons made; the verdict follows it at 0.05",
    "verdict": "reference, better, worse, inside the noise, or too few repeats",
    "finished": "runs",
    "running": "runs",
    "unfinished": "runs",
    "failed": "runs",
    "damaged": "runs whose done.json cannot be read",
    "seconds_mean": "of a finished run",
    "seconds_total": "of all finished runs",
    "peak_memory_mb": "most resident memory of a run's process, MiB",
    "peak_gpu_memory_mb": "most memory of tensors on the GPU, MiB",
    "notes": "what to know before believing the row",
}
RUN_COLUMNS: Mapping[str, str] = {
    "experiment": "folder of the experiment",
    "stage": "of the pipeline",
    "variant": "folder of the variant",
    "fold": "held out",
    "seed": "of weights, data order and augmentation; empty when the notes are damaged",
    "state": "finished, running, unfinished, failed or damaged",
    "data": "fingerprint of labels, patients and folds",
    "key": "hash of everything that changes the result",
    "problem": "why it failed or what is damaged",
    "folder": "path",
}


def write_variants(stage: StageComparison, metric: Metric | None, path: Path) -> Path:
    """One row per variant of a stage, with the statistics of one figure.

    Args:
        metric: None as long as nothing is finished; the columns of the figure stay empty.
    """
    settings = [stage.shown[k] for k in stage.keys if k != "experiment"]
    names = list(VARIANT_COLUMNS)
    others = [r.metric.name for r in stage.rankings if r.metric != metric and not r.metric.cost]
    columns = [*names[:4], *settings, *names[4:], *(f"mean:{name}" for name in others)]
    rows = (_variant_row(stage, i, metric, others) for i in range(len(stage.variants)))
    return _write(path, columns, rows)


def write_runs(stages: Sequence[StageComparison], path: Path) -> Path:
    """One row per run of all stages, damaged ones included, with every figure as a column."""
    found = [run for stage in stages for run in stage.runs()]
    figures = sorted({name for run in found for name in run.figures})
    rows = (
        {
            "experiment": run.experiment,
            "stage": run.stage,
            "variant": run.variant,
            "fold": run.fold,
            "seed": "" if run.seed is None else run.seed,
            "state": run.state.value,
            "data": run.data,
            "key": run.key,
            "problem": run.problem,
            "folder": run.folder,
            **run.figures,
        }
        for run in found
    )
    return _write(path, [*RUN_COLUMNS, *figures], rows)


def cost(stage: StageComparison, variant: int) -> dict[str, float]:
    """seconds_mean, seconds_total and the largest peaks of a variant's finished runs; NaN where unknown."""
    done = [run.figures for run in stage.variants[variant].runs if run.state == State.FINISHED]
    known = {name: [figures[name] for figures in done if name in figures] for name in COSTS}
    seconds = known["seconds"]
    return {
        "seconds_mean": float(np.mean(seconds)) if seconds else math.nan,
        "seconds_total": float(np.sum(seconds)) if seconds else math.nan,
        "peak_memory_mb": max(known["peak_memory_mb"], default=math.nan),
        "peak_gpu_memory_mb": max(known["peak_gpu_memory_mb"], default=math.nan),
    }


def _variant_row(
    stage: StageComparison, i: int, metric: Metric | None, others: Sequence[str]
) -> dict[str, object]:
    variant = stage.variants[i]
    row: dict[str, object] = {
        "experiment": variant.experiment,
        "stage": stage.stage,
        "variant": variant.name,
        "data": variant.data,
        **{stage.shown[k]: text(stage.value(i, k)) for k in stage.keys if k != "experiment"},
        **{state.value: variant.count(state) for state in State},
        **cost(stage, i),
        "notes": "; ".join(variant.notes),
    }
    if metric is not None:
        ranking = stage.ranking(metric)
        one, difference = ranking.estimates[i], ranking.differences[i]
        row |= {
            "metric": metric.name,
            "higher_is_better": str(metric.higher).lower(),
            "repeats": one.n,
            **{name: getattr(one, name) for name in ("mean", "sd", "low", "high")},
            "best": str(i in ranking.best).lower(),
        }
        if difference is not None:
            reference = next(r for r in ranking.reference if stage.variants[r].data == variant.data)
            row |= {
                "reference": stage.variants[reference].name,
                "difference": difference.estimate.mean,
                "difference_low": difference.estimate.low,
                "difference_high": difference.estimate.high,
                "shared_repeats": difference.estimate.n,
                "p": difference.p,
                "p_corrected": difference.corrected,
                "verdict": difference.verdict.value,
            }
    row |= {f"mean:{r.metric.name}": r.estimates[i].mean for r in stage.rankings if r.metric.name in others}
    return row


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Path:
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})
    return path


def _cell(value: object) -> object:
    """Unknown numbers are empty, others keep every digit that means something."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return value
