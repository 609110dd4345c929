"""Collect a trained experiment into one folder that prediction can use anywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import aneurysm
from aneurysm.build import boosting, has_graph_net
from aneurysm.experiment import Experiment
from aneurysm.pipeline import FORMAT, weights_name
from aneurysm.stages import stacker
from aneurysm.training.products import WEIGHTS, expert_findings, fusion_of, lumen_rules
from aneurysm.training.roi import ROI_WEIGHTS
from aneurysm.training.stacker import stacker_rows

_NETWORKS = ("vessel", "segmenter", "smart_net", "expert")
_SETTINGS = (
    "prepare", "vessel", "smart_net", "expert", "stacker", "graph_net", "backbone", "fusion", "oscillator",
    "oscillator_dim", "metadata", "physics", "seed",
)  # fmt: skip


def write_bundle(experiment: Experiment, folder: Path) -> Path:
    """Collect what prediction needs from the finished runs of an experiment.

    The trees are fitted on the out-of-fold readings of all patients: the networks of a bundle are the
    fold models, so their averaged readings on a new scan are out-of-fold too.
    """
    cfg = experiment.cfg
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for stage in _NETWORKS:
        if stage == "smart_net" and not has_graph_net(cfg):
            continue
        for fold in experiment.folds:
            shutil.copyfile(
                experiment.run(stage, fold).read_product(WEIGHTS), part / weights_name(stage, fold)
            )
    for fold in experiment.folds:
        if (coarse := experiment.run("vessel", fold).folder / ROI_WEIGHTS).is_file():
            shutil.copyfile(coarse, part / weights_name("roi", fold))
    trees = stacker.StackerModule(boosting(cfg))
    rows, labels = stacker_rows(experiment)
    trees.fit(rows, labels)
    for name in ("present", "location"):
        booster = getattr(trees, name)
        if booster is not None:
            (part / f"stacker_{name}.ubj").write_bytes(bytes(booster.save_raw("ubj")))
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    first = next(
        iter(
            expert_findings(experiment, experiment.held_out(0))
            or expert_findings(experiment, experiment.training(0))
        )
    )
    note = {
        "format": FORMAT,
        "version": aneurysm.__version__,
        "experiment": cfg.experiment_name,
        "folds": int(cfg.folds),
        "lumen_rules": [lumen_rules(experiment, k).to_figures() for k in experiment.folds],
        "fusions": [
            {} if (fusion := fusion_of(experiment, k)) is None else fusion.figures() for k in experiment.folds
        ],
        "sizes": {
            "nodes": int(first.graph.node_features.shape[1]),
            "edges": int(first.graph.edge_features.shape[1]),
            "candidate": len(first.graph_features),
        },
        "trees": {name: getattr(trees, name) is not None for name in ("present", "location")},
        "trained_on": {
            "series": len(experiment.index),
            "patients": int(experiment.index.patient_id.nunique()),
            "modalities": experiment.index.modality.value_counts().to_dict(),
        },
        "settings": {name: plain[name] for name in _SETTINGS},
    }
    (part / "bundle.json").write_text(json.dumps(note, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    return folder
