"""The comparison itself: per stage its variants, what differs between them, and every figure's verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from aneurysm.compare.curves import CURVE, loss_curve
from aneurysm.compare.metrics import COSTS, Metric, metrics_of, stage_order
from aneurysm.compare.read import Run, State
from aneurysm.compare.reference import Baseline
from aneurysm.compare.scans import FIGURES, ScanLevel, scan_levels, with_scan_figures
from aneurysm.compare.settings import ABSENT, Value, short_name, swept, text
from aneurysm.compare.statistics import Difference, Estimate, Repeat, against, best_of, estimate
from aneurysm.compare.variants import Variant, find_variants


@dataclass(frozen=True, eq=False)
class Ranking:
    """One figure over the variants of one stage."""

    metric: Metric
    estimates: tuple[Estimate, ...]  # of each variant
    differences: tuple[Difference | None, ...]  # to the reference of its own data; None without one
    best: tuple[int, ...]  # one per data set, by index
    reference: tuple[int, ...]  # one per data set: the named baseline, or the best
    named: bool  # the reference was named beforehand


@dataclass(frozen=True, eq=False)
class StageComparison:
    """All variants of one stage side by side."""

    stage: str
    variants: tuple[Variant, ...]
    keys: tuple[str, ...]  # full names of the settings that differ
    rankings: tuple[Ranking, ...]  # the headline first; empty as long as nothing is finished
    damaged: tuple[Run, ...]  # runs that belong to no variant
    scans: dict[int, ScanLevel] = field(default_factory=dict)  # stacker only
    remarks: tuple[str, ...] = ()

    @cached_property
    def shown(self) -> dict[str, str]:
        """Full name -> name on the command line, as long as that is unambiguous."""
        short = [short_name(key) for key in self.keys]
        return {key: s if short.count(s) == 1 else key for key, s in zip(self.keys, short, strict=True)}

    @cached_property
    def data_sets(self) -> list[str]:
        """Fingerprints; runs of one are never compared with those of another."""
        return list(dict.fromkeys(v.data for v in self.variants))

    def value(self, variant: int, key: str) -> Value:
        """A setting of a variant; ABSENT when it belongs to an option not in use."""
        one = self.variants[variant]
        return one.experiment if key == "experiment" else one.settings.get(key, ABSENT)

    def label(self, variant: int) -> str:
        """The variant in words: what differs, or its folder when nothing does."""
        words = [
            f"{self.shown[k]}={text(self.value(variant, k))}" for k in self.keys if self._has(variant, k)
        ]
        return ", ".join(words) or self.variants[variant].name

    def _has(self, variant: int, key: str) -> bool:
        return key == "experiment" or key in self.variants[variant].settings

    def ranking(self, metric: Metric) -> Ranking:
        """Of a metric that is among the rankings."""
        return next(r for r in self.rankings if r.metric.name == metric.name)

    def runs(self) -> list[Run]:
        """Every run of the stage, damaged ones last."""
        return [run for v in self.variants for run in v.runs] + list(self.damaged)

    def changes(self, variant: int, other: int) -> list[str]:
        """Settings in which two variants differ; what an option brings along counts with the option."""
        differ = [k for k in self.keys if self.value(variant, k) != self.value(other, k)]
        return [k for k in differ if not any(k.startswith(f"{above}.") for above in differ)]


def compare(runs: Sequence[Run], baseline: Baseline | None = None) -> list[StageComparison]:
    """Compare all variants of all stages, in the order of the pipeline.

    Args:
        baseline: the variant that the others are compared with; else the best of each figure.

    Raises:
        UserError: the baseline names no variant, or several.
    """
    runs, unscored = with_scan_figures(_with_losses(runs))
    variants = find_variants(runs)
    damaged = [run for run in runs if not run.settings]
    found = []
    for stage in sorted({run.stage for run in runs}, key=stage_order):
        own = [v for v in variants if v.stage == stage]
        remarks = unscored if stage == "stacker" else []
        found.append(_compare_stage(stage, own, [d for d in damaged if d.stage == stage], remarks, baseline))
    if baseline is not None:
        baseline.must_be_used()
    return found


def _compare_stage(
    stage: str,
    variants: list[Variant],
    damaged: list[Run],
    remarks: list[str],
    baseline: Baseline | None,
) -> StageComparison:
    keys = _keys(variants)
    names = {name for v in variants for run in v.runs for name in run.figures}
    bare = StageComparison(stage, tuple(variants), tuple(keys), (), tuple(damaged))
    named = baseline.find(bare) if baseline is not None else None
    if named is None:
        named = _without_ablation(bare)
    rankings = tuple(_rank(bare, metric, named or {}) for metric in metrics_of(names, stage))
    scans: dict[int, ScanLevel] = {}
    score = next((r for r in rankings if r.metric.name == FIGURES[0]), None)
    for reference in score.reference if score and stage == "stacker" else ():
        members = [i for i, v in enumerate(variants) if v.data == variants[reference].data]
        levels = scan_levels([variants[i] for i in members], members.index(reference))
        scans |= {members[i]: level for i, level in levels.items()}
    if len(bare.data_sets) > 1:
        remarks = [
            f"The runs of this stage come from {len(bare.data_sets)} different sets of labels, patients or "
            "folds. "
            "Variants of one set are compared with each other, never with those of another.",
            *remarks,
        ]
    return replace(bare, rankings=rankings, scans=scans, remarks=tuple(remarks))


def _keys(variants: list[Variant]) -> list[str]:
    options = sorted({o for v in variants for o in v.options})
    keys = swept([v.settings for v in variants], options)
    return ["experiment", *keys] if len({v.experiment for v in variants}) > 1 else keys


def _without_ablation(stage: StageComparison) -> dict[str, int] | None:
    """Of an ablation, the whole network is the reference: data -> variant with ablation=none."""
    if "ablation" not in stage.keys:
        return None
    found: dict[str, list[int]] = {}
    for i, variant in enumerate(stage.variants):
        if stage.value(i, "ablation") in ("none", None):
            found.setdefault(variant.data, []).append(i)
    return {data: members[0] for data, members in found.items() if len(members) == 1}


def _rank(stage: StageComparison, metric: Metric, named: dict[str, int]) -> Ranking:
    variants = stage.variants
    values = [v.values(metric.name) for v in variants]
    estimates = tuple(estimate(_array(x)) for x in values)
    differences: list[Difference | None] = [None] * len(variants)
    best, references = [], []
    for data in stage.data_sets:
        members = [i for i, v in enumerate(variants) if v.data == data]
        winner = best_of([values[i] for i in members], metric.higher)
        if winner is None:
            continue
        best.append(members[winner])
        reference = named.get(data, members[winner])
        references.append(reference)
        folds = variants[reference].folds
        compared = against(
            [values[i] for i in members], members.index(reference), folds, metric.higher, data in named
        )
        for i, difference in zip(members, compared, strict=True):
            differences[i] = difference
    return Ranking(metric, estimates, tuple(differences), tuple(best), tuple(references), bool(named))


def _array(values: dict[Repeat, float]) -> np.ndarray:
    return np.array([values[r] for r in sorted(values)], dtype=np.float64)


def _with_losses(runs: Sequence[Run]) -> list[Run]:
    """Stages that leave no figure of their own (pretraining) are judged by their last validation loss."""
    found = []
    for run in runs:
        if run.state == State.FINISHED and not set(run.figures) - set(COSTS):
            curve = loss_curve(run.folder)
            run = replace(run, figures={**run.figures, CURVE: curve[-1]}) if curve else run
        found.append(run)
    return found
