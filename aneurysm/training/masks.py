"""What the two segmentation stages share: patches, the rule that makes a mask, and its overlap."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from aneurysm.build import build
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.evaluation.segmentation import overlap
from aneurysm.losses.present import beside_of
from aneurysm.stages.processes import from_first, gathered_by_first, shared
from aneurysm.stages.volumes import vessel_target
from aneurysm.vessels.lumen_rule import LumenRule


def patch_settings(cfg: Any, s: Any, loss: nn.Module) -> dict[str, Any]:
    """Settings of the patches that a segmentation stage trains on, for this loss."""
    return {
        "patch": s.patch,
        "batch": s.batch,
        "steps": s.steps,
        "sampling": build(s.sampling),
        "seed": cfg.seed,
        "workers": cfg.trainer.workers,
        "augmentation": build(s.augmentation),
        "beside": beside_of(loss),
    }


def chosen_rule(
    cases: list[PreparedCase], probability: Callable[[PreparedCase], np.ndarray], s: Any
) -> LumenRule:
    """The rule that a segmentation stage is set to, chosen on these scans: training scans, annotated."""
    known = [(case, target) for case in cases if (target := vessel_target(case)) is not None]
    probabilities = gathered_by_first([probability(case) for case, _ in shared(known)])
    return from_first(
        lambda: LumenRule.for_recall(
            probabilities,
            [target for _, target in known],
            [case.grid for case, _ in known],
            s.target_recall,
            s.precision,
        )
    )


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly taken."""
    return (
        [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]
        if items
        else []
    )


def overlap_row(uid: str, predicted: np.ndarray, target: np.ndarray | None) -> dict[str, Any]:
    """Overlap of one scan; NaN where its vessels are not annotated."""
    if target is None:
        return {"series_uid": uid, "recall": np.nan, "precision": np.nan, "dice": np.nan}
    result = overlap(predicted, target)
    return {"series_uid": uid, "recall": result.recall, "precision": result.precision, "dice": result.dice}


def mean_figures(table: pd.DataFrame) -> dict[str, float]:
    """Mean of every figure that is known for at least one scan."""
    values = table.drop(columns="series_uid").astype(float).mean()
    return {str(name): float(value) for name, value in values.items() if np.isfinite(value)}
