"""Training of stage 4, expert."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torchmetrics.functional.classification import binary_auroc

from aneurysm.build import build, build_expert
from aneurysm.data.errors import UserError
from aneurysm.data.tables import EXPERT
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.runs.settings import pretrains
from aneurysm.stages import expert as expert_stage
from aneurysm.stages.findings import CropSettings, Finding, with_foreign_flow
from aneurysm.stages.processes import gathered, rank, shared
from aneurysm.training.pictures import expert_pictures
from aneurysm.training.products import WEIGHTS, expert_findings, save_weights

JUDGED = 16  # held-out candidates at a time


def train_expert(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """The expert on out-of-fold candidates; leaves a predictions table for the held-out patients."""
    cfg, s = experiment.cfg, experiment.cfg.expert
    train = expert_findings(experiment, experiment.training(run.fold), add_annotations=True)
    held_out = expert_findings(experiment, experiment.held_out(run.fold))
    if not train:
        raise UserError(f"expert fold {run.fold}: the Smart Net proposed no candidate in any training scan.")
    seed_weights(s.seed, run)
    net: Any = build_expert(cfg, graph_features=len(train[0].graph_features))
    if pretrains(cfg):
        net.load_pretrained(load_file(experiment.run("pretrain", run.fold).read_product(WEIGHTS)))
    if net.physics is not None and net.physics.foreign_flow:
        train, held_out = (with_foreign_flow(found, s.seed) for found in (train, held_out))
    settings = CropSettings(s.crop, flow=net.physics is not None, graph=s.graph_evidence)
    module = expert_stage.ExpertModule(
        net,
        build(cfg.balance),
        build(cfg.loss),
        s.lr,
        s.weight_decay,
        total_steps=s.epochs * s.steps,
        steps_per_epoch=s.steps,
        freeze_epochs=s.freeze_epochs,
        physics_optimiser=s.physics_optimiser,
        physics_lr=s.physics_lr,
    )
    data = expert_stage.ExpertData(
        train,
        held_out,
        settings,
        batch=s.batch,
        steps=s.steps,
        positive_share=s.positive_share,
        jitter_mm=s.jitter_mm,
        seed=s.seed,
        workers=cfg.trainer.workers,
    )
    fit(run, module, data, s.epochs, cfg)
    parts = [held_out[begin : begin + JUDGED] for begin in range(0, len(held_out), JUDGED)]
    tables = gathered(
        [expert_stage.judge(net, p, settings, run.fold, int(s.seed), JUDGED)[0] for p in shared(parts)]
    )
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(EXPERT.columns))
    if rank() == 0:
        EXPERT.write(table, run.folder / "predictions.parquet")
    save_weights(run.folder / WEIGHTS, net)
    uids = experiment.held_out(run.fold)

    def masks(some: list[Finding]) -> list[np.ndarray]:
        return expert_stage.judge(net, some, settings, run.fold, int(s.seed))[1]

    illustrate(run, lambda log: expert_pictures(log, experiment, uids, held_out, table, masks))
    return {
        "candidates": len(table),
        "order_parameter": _mean(table, "order_parameter"),
        **_hit_figures(held_out, table),
    }


def _mean(table: pd.DataFrame, column: str) -> float:
    return float(np.mean(table[column].to_numpy(np.float64))) if len(table) else float("nan")


def _hit_figures(held_out: list[Finding], table: pd.DataFrame) -> dict[str, float]:
    """How far the expert parts hits from misses among held-out candidates."""
    labels = np.array([f.is_aneurysm for f in held_out])
    known = np.isfinite(labels)
    if len(np.unique(labels[known])) < 2:
        return {}
    p = torch.from_numpy(table.p.to_numpy(np.float32)[known])
    return {"candidate_auc": float(binary_auroc(p, torch.from_numpy(labels[known].astype(np.int64))))}
