"""Run folders as a sweep leaves them, with figures of known truth."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

EXPERT: dict[str, Any] = {
    "oscillator": {
        "_target_": "aneurysm.nets.oscillators.akorn",
        "_partial_": True,
        "oscillator_dim": 4,
        "steps": 4,
    },
    "fusion": {"_target_": "aneurysm.nets.fusion.CrossAttentionFusion", "_partial_": True},
    "balance": {"_target_": "aneurysm.losses.balance.UwSo", "temperature": 20.0},
    "expert": {
        "epochs": 5,
        "lr": 0.0015,
        "net": {"_target_": "aneurysm.nets.expert.ExpertNet", "dropout": 0.2},
    },
    "folds": 4,
    "fold_seed": 0,
    "precision": "32-true",
}
VESSEL: dict[str, Any] = {
    "vessel": {"epochs": 5, "lr": 0.01},
    "folds": 4,
    "fold_seed": 0,
    "precision": "32-true",
}
DATA = "80698268"


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings with other values at dotted names (written with two underscores); None removes one."""
    settings = copy.deepcopy(settings)
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = settings
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return settings


def write_run(
    experiment: Path,
    stage: str,
    settings: dict[str, Any],
    fold: int,
    seed: int = 0,
    figures: dict[str, Any] | None = None,
    data: str = DATA,
    upstream: dict[str, str] | None = None,
) -> Path:
    """One run folder; without figures it is begun and not finished. Returns the folder."""
    note = {"stage": stage, "settings": {**settings, "seed": seed}, "data": data, "upstream": upstream or {}}
    key = key_of(note)
    folder = experiment / stage / f"variant-{key}" / f"fold_{fold}"
    folder.mkdir(parents=True)
    versions = {"aneurysm": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"}
    (folder / "run.json").write_text(json.dumps({"key": key, **note, "versions": versions}))
    if figures is not None:
        (folder / "done.json").write_text(json.dumps(figures))
    return folder


def key_of(note: dict[str, Any]) -> str:
    """Eight hexadecimal digits, as of a real run."""
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:8]


def sweep(
    experiment: Path,
    effect: dict[int, float],
    folds: int = 4,
    seeds: int = 2,
    noise: float = 0.008,
    base: dict[str, Any] = EXPERT,
) -> None:
    """oscillator_dim x folds x seeds: candidate_auc = 0.85 + effect + an easier or harder fold + noise."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 0.03, folds)
    for dim, gain in effect.items():
        for seed in range(seeds):
            for fold in range(folds):
                auc = 0.85 + gain + level[fold] + rng.normal(0, noise)
                figures = {
                    "candidates": 240,
                    "candidate_auc": float(auc),
                    "order_parameter": 0.9,
                    "seconds": round(30 + 5 * dim + float(rng.normal()), 1),
                    "peak_memory_mb": 900 + 20 * dim,
                }
                settings = changed(base, oscillator__oscillator_dim=dim, folds=folds)
                write_run(experiment, "expert", settings, fold, seed, figures)


# 8 and 16 are truly better than 4 by far more than the noise, 2 is truly worse, 6 is the same as 4.
EFFECT = {2: -0.08, 4: 0.0, 6: 0.0, 8: 0.06, 16: 0.06}
