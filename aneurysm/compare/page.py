"""The comparison as one HTML file: its data, style and script inside, nothing asked from any network."""

import base64
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aneurysm.compare.comparison import Ranking, StageComparison
from aneurysm.compare.curves import loss_curve
from aneurysm.compare.metrics import Metric
from aneurysm.compare.read import Run, State
from aneurysm.compare.scans import ScanLevel
from aneurysm.compare.settings import ABSENT, Value, text
from aneurysm.compare.statistics import Difference
from aneurysm.compare.tables import cost
from aneurysm.data.files import replacing

# In the order in which they build on each other; one script, so that one hash admits it.
_SCRIPTS = ("state", "filter", "axis", "table", "parallel", "scatter", "bars", "runs", "main")
_CURVES = 2000  # runs; more of them are listed without their learning curve


def write_comparison(
    stages: Sequence[StageComparison], shown: StageComparison, metric: Metric | None, path: Path
) -> Path:
    """Write the page of all stages, opened at one of them.

    The page may run its own script and nothing else: its content security policy names the script's hash and
    forbids every request.
    """
    folder = Path(__file__).parent / "templates"
    script = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f"\n(() => {{\n{script}}})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    experiments = list(dict.fromkeys(run.experiment for stage in stages for run in stage.runs()))
    content = {
        "title": f"Compare {', '.join(experiments)}",
        "experiments": experiments,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "style": Markup((folder / "compare.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "digest": digest,
        "data": Markup(embedded(payload(stages, shown, metric))),
    }
    page = _templates().get_template("compare.html.j2").render(content)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def embedded(content: Any) -> str:
    """JSON that is safe inside a script element: no `<` can end it, NaN and infinity become null."""
    plain = json.dumps(_plain(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        plain = plain.replace(letter, f"\\u{ord(letter):04x}")
    return plain


def payload(
    stages: Sequence[StageComparison], shown: StageComparison, metric: Metric | None
) -> dict[str, Any]:
    """What the page's script reads."""
    many = sum(len(stage.runs()) for stage in stages) > _CURVES
    found = [_stage(stage, not many) for stage in stages]
    for content, stage in zip(found, stages, strict=True):
        asked = metric if stage is shown else None
        first = stage.rankings[0].metric.name if stage.rankings else None
        content["metric"] = asked.name if asked else first
    return {"stages": found, "shown": stages.index(shown)}


def _stage(stage: StageComparison, curves: bool) -> dict[str, Any]:
    variants = range(len(stage.variants))
    values = {key: [stage.value(i, key) for i in variants] for key in stage.keys}
    return {
        "stage": stage.stage,
        "keys": [
            {"name": stage.shown[key], "full": key, "numeric": _numeric(values[key])} for key in stage.keys
        ],
        "metrics": [
            {"name": r.metric.name, "higher": r.metric.higher, "cost": r.metric.cost} for r in stage.rankings
        ],
        "data": stage.data_sets,
        "remarks": stage.remarks,
        "variants": [
            {
                "label": stage.label(i),
                "name": v.name,
                "experiment": v.experiment,
                "data": stage.data_sets.index(v.data),
                "values": [_value(values[key][i]) for key in stage.keys],
                "notes": v.notes,
                "finished": v.count(State.FINISHED),
                "runs": len(v.runs),
                "cost": cost(stage, i),
            }
            for i, v in enumerate(stage.variants)
        ],
        "rankings": {r.metric.name: _ranking(stage, r) for r in stage.rankings},
        "runs": [
            _run(run, i, curves) for i, v in enumerate(stage.variants) for run in v.runs
        ] + [_run(run, None, False) for run in stage.damaged],
        "scans": {str(i): _scan_level(level) for i, level in stage.scans.items()},
    }  # fmt: skip


def _numeric(values: Sequence[Value]) -> bool:
    present = [value for value in values if value != ABSENT]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)


def _value(value: Value) -> Any:
    """Numbers stay numbers, the rest is text; an absent setting is null."""
    if value == ABSENT:
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text(value)


def _ranking(stage: StageComparison, ranking: Ranking) -> dict[str, Any]:
    return {
        "best": ranking.best,
        "reference": ranking.reference,
        "named": ranking.named,
        "rows": [
            [e.mean, e.sd, e.low, e.high, e.n, *_difference(d)]
            for e, d in zip(ranking.estimates, ranking.differences, strict=True)
        ],
    }


def _difference(d: Difference | None) -> list[Any]:
    """In the order in which state.js takes them apart."""
    if d is None:
        return []
    e = d.estimate
    return [e.mean, e.low, e.high, e.n, d.corrected, d.verdict]


def _run(run: Run, variant: int | None, curve: bool) -> dict[str, Any]:
    return {
        "v": variant,
        "fold": run.fold,
        "seed": run.seed,
        "state": run.state,
        "figures": run.figures,
        "problem": run.problem,
        "progress": run.progress,
        "folder": f"{run.variant}/{run.folder.name}",
        "curve": [float(f"{v:.4g}") for v in loss_curve(run.folder)] if curve else [],
    }


def _scan_level(level: ScanLevel) -> dict[str, Any]:
    return {
        "scans": level.scans,
        "seeds": level.seeds,
        "resamples": level.resamples,
        "value": level.value,
        "interval": {name: [b.low, b.high] for name, b in level.interval.items()},
        "difference": level.difference,
        "difference_interval": {name: [b.low, b.high] for name, b in level.difference_interval.items()},
    }


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(k): _plain(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(v) for v in node]
    if isinstance(node, float):
        return float(f"{node:.10g}") if math.isfinite(node) else None
    return node


@cache
def _templates() -> jinja2.Environment:
    """This package's template on the frame that all pages share."""
    loaders = [jinja2.PackageLoader("aneurysm.compare"), jinja2.PackageLoader("aneurysm.report")]
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
