"""Which figures of a run can be ranked, and which way is better."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from aneurysm.data.errors import UserError

# In the order of the pipeline.
STAGES = ("pretrain", "vessel", "segmenter", "smart_net", "expert", "stacker")
# What a stage is judged by unless --metric names another figure.
HEADLINE = {
    "pretrain": "val/loss",
    "vessel": "dice",
    "segmenter": "dice",
    "smart_net": "candidate_recall",
    "expert": "candidate_auc",
    "stacker": "rsna_score",
}
COSTS = ("seconds", "peak_memory_mb", "peak_gpu_memory_mb")
# They describe a run; more of them is neither better nor worse.
_DESCRIPTIVE = frozenset(
    {"threshold", "core", "candidates", "candidates_per_scan", "scans", "order_parameter"}
)
_LOWER = frozenset(
    {"loss", "error", "residual", "distance", "hd95", "brier", "ece", "seconds", "memory", "mm"}
)


@dataclass(frozen=True)
class Metric:
    """A figure that runs are ranked by."""

    name: str
    higher: bool  # a higher value is better

    @property
    def cost(self) -> bool:
        """Time or memory: shown in columns of its own."""
        return self.name in COSTS

    @property
    def direction(self) -> str:
        """For reading."""
        return "higher is better" if self.higher else "lower is better"


def metrics_of(names: Iterable[str], stage: str) -> list[Metric]:
    """The rankable ones among the figures of a stage: its headline first, costs last."""
    found = [Metric(name, _higher(name)) for name in set(names) - _DESCRIPTIVE]
    order = {name: i for i, name in enumerate(COSTS)}
    return sorted(found, key=lambda m: (m.name != HEADLINE.get(stage), order.get(m.name, -1), m.name))


def chosen_metric(metrics: list[Metric], stage: str, asked: str | None) -> Metric:
    """The metric a user asked for, or the stage's headline.

    Raises:
        UserError: no finished run of the stage has it; the message lists those that exist.
    """
    if asked is None:
        return metrics[0]
    for metric in metrics:
        if metric.name == asked:
            return metric
    known = ", ".join(m.name for m in metrics)
    if asked in _DESCRIPTIVE:
        raise UserError(f"{asked} describes a run but no value of it is better. Rank by one of: {known}.")
    raise UserError(f"No finished run of stage {stage} has a figure {asked!r}. There are: {known}.")


def stage_order(stage: str) -> tuple[int, str]:
    """Sorts stages as the pipeline runs them."""
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _higher(name: str) -> bool:
    return not _LOWER.intersection(re.split(r"[/_\s]+", name.lower()))
