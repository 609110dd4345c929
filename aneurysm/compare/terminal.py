"""The comparison on a terminal: one line per variant, then what may be said about them."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aneurysm.compare.comparison import Ranking, StageComparison
from aneurysm.compare.metrics import Metric
from aneurysm.compare.read import State
from aneurysm.compare.settings import text
from aneurysm.compare.statistics import Difference, Verdict
from aneurysm.compare.tables import cost

_STYLE = {Verdict.BETTER: "bold green", Verdict.WORSE: "red", Verdict.NOISE: "yellow", Verdict.FEW: "dim"}


def print_stage(stage: StageComparison, metric: Metric | None, console: Console, most: int) -> None:
    """Table of the variants by one figure, best first, and a sentence that sums up.

    Args:
        metric: None as long as nothing is finished: then the states of the runs are shown alone.
        most: rows; the page and the CSV hold all.
    """
    ranking = stage.ranking(metric) if metric is not None else None
    order = ranked(stage, ranking)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for key in stage.keys or ("variant",):
        table.add_column(stage.shown.get(key, key), overflow="fold")
    several = len(stage.data_sets) > 1
    if several:
        table.add_column("data")
    if ranking is not None:
        for name in (f"{ranking.metric.name}", "± sd", "95 % interval", "n", "difference", "verdict"):
            table.add_column(name, justify="left" if name == "verdict" else "right")
    for name in ("runs", "time each", "memory"):
        table.add_column(name, justify="right")
    for i in order[:most]:
        table.add_row(*_row(stage, ranking, i, several))
    if order:
        console.print(table)
    if len(order) > most:
        console.print(f"{len(order) - most} more variants are on the page and in the CSV.", style="dim")
    for sentence in sentences(stage, ranking):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def ranked(stage: StageComparison, ranking: Ranking | None) -> list[int]:
    """Variants, best first within their data set; those without the figure last."""
    if ranking is None:
        return list(range(len(stage.variants)))
    sign = -1 if ranking.metric.higher else 1

    def place(i: int) -> tuple[int, int, float]:
        mean = ranking.estimates[i].mean
        return (
            stage.data_sets.index(stage.variants[i].data),
            math.isnan(mean),
            0.0 if math.isnan(mean) else sign * mean,
        )

    return sorted(range(len(stage.variants)), key=place)


def sentences(stage: StageComparison, ranking: Ranking | None) -> list[str]:
    """What may be said: the best, how many cannot be told from the reference, what is not finished."""
    said = []
    if ranking is not None:
        for reference in ranking.reference:
            said.append(_verdicts(stage, ranking, reference))
    elif stage.variants:
        said.append("Nothing to rank yet: no finished run has a figure.")
    runs = stage.runs()
    open_runs = [
        (state, sum(run.state == state for run in runs)) for state in State if state != State.FINISHED
    ]
    if counted := ", ".join(f"{n} {state}" for state, n in open_runs if n):
        said.append(f"Of {len(runs)} runs {counted}.")
    return [*said, *stage.remarks]


def _verdicts(stage: StageComparison, ranking: Ranking, reference: int) -> str:
    data = stage.variants[reference].data
    members = [i for i, v in enumerate(stage.variants) if v.data == data]
    where = f" (data {data})" if len(stage.data_sets) > 1 else ""
    best = next(i for i in ranking.best if i in members)
    if len(members) == 1:
        return f"One variant only{where}: {stage.label(best)}. Nothing to compare it with."
    counts = {v: sum(d.verdict == v for i in members if (d := ranking.differences[i])) for v in Verdict}
    parts = [f"{counts[v]} {v.value}" for v in Verdict if v != Verdict.REFERENCE and counts[v]]
    name = "baseline" if ranking.named else "best"
    sentence = f"Best{where}: {stage.label(best)}. Against the {name}"
    sentence += f" ({stage.label(reference)})" if reference != best else ""
    return f"{sentence}: {', '.join(parts)}."


def _row(stage: StageComparison, ranking: Ranking | None, i: int, several: bool) -> list[str | Text]:
    variant = stage.variants[i]
    star = "★" if ranking is not None and i in ranking.best else ""
    row: list[str | Text] = [star]
    row += [Text(text(stage.value(i, key))) for key in stage.keys] or [Text(variant.name)]
    if several:
        row.append(Text(variant.data))
    if ranking is not None:
        one = ranking.estimates[i]
        row += [number(one.mean), number(one.sd), _bounds(one.low, one.high), str(one.n)]
        row += _difference(ranking.differences[i])
    costs = cost(stage, i)
    done, everything = variant.count(State.FINISHED), len(variant.runs)
    row.append(str(done) if done == everything else f"{done} of {everything}")
    row.append(duration(costs["seconds_mean"]))
    memory = costs["peak_memory_mb"]
    row.append("–" if math.isnan(memory) else f"{memory:.0f} MB")
    return row


def _difference(difference: Difference | None) -> list[str | Text]:
    if difference is None:
        return ["–", Text("not measured", style="dim")]
    if difference.verdict == Verdict.REFERENCE:
        return ["", Text("reference", style="bold")]
    mean = difference.estimate.mean
    shown = "–" if math.isnan(mean) else ("+" if mean >= 0 else "−") + number(abs(mean))
    return [shown, Text(difference.verdict.value, style=_STYLE[difference.verdict])]


def number(value: float) -> str:
    """Three figures behind the point, more for small values; a dash when unknown."""
    if math.isnan(value):
        return "–"
    shown = f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
    if value and float(shown) == 0:
        shown = f"{value:.1e}"
    return shown.replace("-", "−")


def _bounds(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{number(low)} to {number(high)}"


def duration(seconds: float) -> str:
    """Seconds for reading."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{round(seconds) // 60}:{round(seconds) % 60:02d} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
