"""How each stage is trained in its run folder, and what it leaves there for the next one.

Every function trains one fold and writes products for the patients that fold held out. Later stages read
the products of all folds, so nothing they learn from was predicted by a model that had seen the patient.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.classification import binary_auroc

from aneurysm.build import boosting, build, build_expert, build_segmenter, graph_settings, view_settings
from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.preparation.prepared import SUFFIX, PreparedCase
from aneurysm.data.tables import CANDIDATES, EXPERT, LOCATION_KEYS, SCANS
from aneurysm.evaluation.candidates import candidate_recall
from aneurysm.evaluation.segmentation import overlap
from aneurysm.experiment import Experiment
from aneurysm.nets.reconstruction import MaskedReconstruction
from aneurysm.run import StageRun, fit, pretrains, upstream
from aneurysm.stages import expert as expert_stage
from aneurysm.stages import pretrain, smart_net, stacker, vessel
from aneurysm.stages.findings import CropSettings, Finding, list_findings
from aneurysm.stages.stored import (
    case_at,
    fit_in_memory,
    opened,
    probabilities_at,
    read_probabilities,
    remembered,
    write_probabilities,
)
from aneurysm.stages.volumes import aneurysm_target, vessel_target
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.lumen_rule import LumenRule

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"


def run_stage(experiment: Experiment, stage: str) -> list[dict[str, Any]]:
    """Train a stage over the chosen folds, and what it needs of earlier stages, skipping what is finished.

    Raises:
        UserError: `upstream=require` and an earlier stage is not finished.
    """
    # The Smart Net's graph learns on out-of-fold segmentations: its segmenter is part of the stage.
    inside = ("segmenter",) if stage == "smart_net" else ()
    for part in _missing(experiment, stage):
        if experiment.cfg.upstream == "require" and part not in inside:
            command = "smart_net" if part == "segmenter" else part
            raise UserError(
                f"stage={stage} reads {part}, which is not finished for this configuration. "
                f"Run `python train.py stage={command}` with the same settings, or upstream=run."
            )
    figures = []
    for part in _order(experiment, stage):
        # A stage reads every fold of what comes before it; only the asked-for stage itself can run one fold.
        folds = experiment.chosen_folds if part == stage else experiment.folds
        results = [_run_fold(experiment, part, fold, asked_for=part in (stage, *inside)) for fold in folds]
        if part == stage:
            figures = results
    return figures


def _order(experiment: Experiment, stage: str) -> list[str]:
    """The stages to run, earliest first, ending in `stage`."""
    order: list[str] = []

    def visit(name: str) -> None:
        for before in upstream(experiment.cfg, name):
            visit(before)
        if name not in order:
            order.append(name)

    visit(stage)
    return order


def _missing(experiment: Experiment, stage: str) -> list[str]:
    earlier = [s for s in _order(experiment, stage) if s != stage]
    return [s for s in earlier if any(experiment.run(s, k).finished() is None for k in experiment.folds)]


def _run_fold(experiment: Experiment, stage: str, fold: int, asked_for: bool) -> dict[str, Any]:
    run = experiment.run(stage, fold)
    done = run.finished()
    force = asked_for and bool(experiment.cfg.force)
    if done is not None and not force:
        level = logging.INFO if asked_for else logging.DEBUG
        log.log(level, "%-9s fold %d  is finished, skipped (%s)", stage, fold, run.folder)
        return done
    with run.alone():
        # Two jobs of a sweep may both need what neither has: the second waits and then finds it finished.
        if (done := run.finished()) is not None and not force:
            return done
        run = experiment.begin(stage, fold, force)
        started = time.monotonic()
        figures = STAGES[stage](experiment, run)
        figures["seconds"] = round(time.monotonic() - started, 1)
        shown = "  ".join(
            f"{k} {v:.3f}" for k, v in figures.items() if isinstance(v, float) and k != "seconds"
        )
        log.info("%-9s fold %d  done in %.0f s  %s", stage, fold, figures["seconds"], shown)
        return run.finish(figures)


def train_pretrain(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Masked reconstruction on the training patients; leaves backbone weights."""
    cfg, s = experiment.cfg, experiment.cfg.pretrain
    _seed_weights(cfg.seed, run)
    masking = build(cfg.masking)
    if masking is None:
        raise UserError("masking=none turns pretraining off, so there is nothing to train in stage=pretrain.")
    net = MaskedReconstruction(build(cfg.backbone), s.decoder_width, mode=s.mode, block=masking.block)
    module = pretrain.PretrainModule(
        net, masking, s.lr, s.weight_decay, total_steps=s.epochs * s.steps, seed=cfg.seed
    )
    data = pretrain.PretrainData(
        experiment.paths(experiment.training(run.fold)),
        experiment.paths(experiment.held_out(run.fold)),
        patch=s.patch,
        batch=s.batch,
        steps=s.steps,
        seed=cfg.seed,
        workers=cfg.trainer.workers,
    )
    fit(run, module, data, s.epochs, cfg)
    save_weights(run.folder / WEIGHTS, net.backbone)
    return {}


def train_vessel(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Recall-first vessel net; leaves a probability volume per held-out scan."""
    cfg, s = experiment.cfg, experiment.cfg.vessel
    _seed_weights(cfg.seed, run)
    net = build(s.net, in_channels=vessel.INPUTS, out_channels=len(vessel.CHANNELS))
    module = vessel.VesselModule(net, build(cfg.loss), s.lr, s.weight_decay, s.epochs * s.steps)
    training, held_out = experiment.training(run.fold), experiment.held_out(run.fold)
    data = vessel.VesselData(experiment.paths(training), experiment.paths(held_out), **_patches(cfg, s))
    if not data.train:
        raise UserError(
            f"vessel fold {run.fold}: no training scan has a vessel mask (segmentations/<uid>_cowseg.nii). "
            "This stage needs some; bring a bundle trained elsewhere to use the others."
        )
    fit(run, module, data, s.epochs, cfg)
    some = _spread(data.train, s.rule_scans)

    def segmented(case: PreparedCase) -> np.ndarray:
        return vessel.vessel_probability(net, case, view_settings(s))

    rule = _lumen_rule([remembered(p) for p in some], segmented, s)
    rows = []
    for uid in held_out:
        case = remembered(experiment.prepared[uid])
        probability = segmented(case)
        write_probabilities(_product(run, uid), {"vessel": probability})
        rows.append(_overlap_row(uid, rule(probability, case.grid), vessel_target(case)))
    table = pd.DataFrame(rows)
    with replacing(run.folder / "overlap.csv") as part:
        table.to_csv(part, index=False)
    save_weights(run.folder / WEIGHTS, net)
    return {**asdict(rule), **_means(table)}


def train_segmenter(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """The Smart Net's segmentation network; leaves lumen and sac probabilities per held-out scan."""
    cfg, s = experiment.cfg, experiment.cfg.smart_net
    _seed_weights(cfg.seed, run)
    lumen = {
        uid: _product(experiment.run("vessel", experiment.fold_of[uid]), uid) for uid in experiment.prepared
    }
    net = build_segmenter(cfg)
    module = smart_net.SegmenterModule(net, build(cfg.loss), s.lr, s.weight_decay, s.epochs * s.steps)
    training, held_out = experiment.training(run.fold), experiment.held_out(run.fold)
    data = smart_net.SegmenterData(
        experiment.paths(training), experiment.paths(held_out), upstream=lumen, **_patches(cfg, s)
    )
    fit(run, module, data, s.epochs, cfg)

    def segmented(case: PreparedCase) -> dict[str, np.ndarray]:
        earlier = read_probabilities(lumen[case.series_uid])["vessel"]
        return smart_net.segment(net, case, earlier, view_settings(s))

    annotated = [p for p in experiment.paths(training) if "vessel" in opened(p).masks]
    some = _spread(annotated, s.rule_scans)
    rule = _lumen_rule([remembered(p) for p in some], lambda case: segmented(case)["vessel"], s)
    rows = []
    for uid in held_out:
        case = remembered(experiment.prepared[uid])
        probability = segmented(case)
        write_probabilities(_product(run, uid), probability)
        row = _overlap_row(uid, rule(probability["vessel"], case.grid), vessel_target(case))
        sac = aneurysm_target(case)
        row["sac_recall"] = overlap(probability["aneurysm"] >= 0.5, sac).recall if sac is not None else np.nan
        rows.append(row)
    save_weights(run.folder / WEIGHTS, net)
    return {**asdict(rule), **_means(pd.DataFrame(rows))}


def train_smart_net(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Graph attention on out-of-fold segmentations; leaves graphs and a candidates table."""
    cfg, s = experiment.cfg, experiment.cfg.smart_net
    settings = graph_settings(s)
    items = {uid: _graph_item(experiment, uid, settings) for uid in experiment.prepared}
    data = smart_net.GraphData(
        [items[uid] for uid in experiment.training(run.fold)],
        [items[uid] for uid in experiment.held_out(run.fold)],
        batch=4,
        seed=cfg.seed,
    )
    if not data.train:
        raise UserError(
            f"smart_net fold {run.fold}: every vessel mask of the training scans is empty: no graph. "
            "Train the segmenter longer (smart_net.epochs) or lower smart_net.target_recall's threshold."
        )
    _seed_weights(cfg.seed, run)
    nodes: Any = torch.cat([d.x for d in data.train if d.x is not None])
    edges = len(items[experiment.training(run.fold)[0]].graph.edge_names)
    net = build(cfg.graph_net, in_features=nodes.shape[1], edge_features=edges)
    net.calibrate(nodes)
    module = smart_net.GraphModule(net, s.graph_lr, s.graph_epochs * data.steps)
    fit(run, module, data, s.graph_epochs, cfg)
    tables = []
    for uid in experiment.held_out(run.fold):
        item, probability = items[uid], segmentation_of(experiment, uid)
        scores = smart_net.node_scores(net, item.graph)
        found = smart_net.candidates(item.graph, scores, probability, item.grid, settings)
        tables.append(smart_net.candidate_rows(uid, found, run.fold))
    rows = [t for t in tables if len(t)]
    table = pd.concat(rows) if rows else pd.DataFrame(columns=list(CANDIDATES.columns))
    CANDIDATES.write(table, run.folder / "candidates.parquet")
    save_weights(run.folder / WEIGHTS, net)
    lesions = {uid: items[uid].lesions for uid in experiment.held_out(run.fold) if items[uid].lesions}
    hit = candidate_recall(CANDIDATES.conform(table), lesions, tuple(lesions)) if lesions else None
    return {
        "candidates_per_scan": len(table) / max(1, len(tables)),
        **({} if hit is None else {"candidate_recall": float(hit.recall)}),
    }


def train_expert(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """The expert on out-of-fold candidates; leaves a predictions table for the held-out patients."""
    cfg, s = experiment.cfg, experiment.cfg.expert
    train = expert_findings(experiment, experiment.training(run.fold), add_annotations=True)
    held_out = expert_findings(experiment, experiment.held_out(run.fold))
    if not train:
        raise UserError(f"expert fold {run.fold}: the Smart Net proposed no candidate in any training scan.")
    _seed_weights(cfg.seed, run)
    net: Any = build_expert(cfg, graph_features=len(train[0].graph_features))
    if pretrains(cfg):
        net.load_pretrained(load_file(experiment.run("pretrain", run.fold).read_product(WEIGHTS)))
    settings = CropSettings(s.crop, flow=net.physics is not None)
    module = expert_stage.ExpertModule(
        net,
        build(cfg.balance),
        build(cfg.loss),
        s.lr,
        s.weight_decay,
        total_steps=s.epochs * s.steps,
        steps_per_epoch=s.steps,
        freeze_epochs=s.freeze_epochs,
    )
    data = expert_stage.ExpertData(
        train,
        held_out,
        settings,
        batch=s.batch,
        steps=s.steps,
        positive_share=s.positive_share,
        jitter_mm=s.jitter_mm,
        seed=cfg.seed,
        workers=cfg.trainer.workers,
    )
    fit(run, module, data, s.epochs, cfg)
    table, _ = expert_stage.judge(net, held_out, settings, run.fold, int(cfg.seed))
    if table.empty:
        table = pd.DataFrame(columns=list(EXPERT.columns))
    EXPERT.write(table, run.folder / "predictions.parquet")
    save_weights(run.folder / WEIGHTS, net)
    return {
        "candidates": len(table),
        "order_parameter": _mean(table, "order_parameter"),
        **_hit_figures(held_out, table),
    }


def train_stacker(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Trees on the other folds' out-of-fold readings; leaves the 14 probabilities of the held-out scans."""
    cfg = experiment.cfg
    expert = expert_table(experiment)
    training, held_out = experiment.training(run.fold), experiment.held_out(run.fold)
    module = stacker.StackerModule(boosting(cfg))
    fit(
        run,
        module,
        stacker.StackerData(_rows(experiment, expert, training), _rows(experiment, expert, held_out)),
        1,
        cfg,
    )
    rows, _ = _rows(experiment, expert, held_out)
    by_uid = experiment.index.set_index("series_uid")
    table = pd.DataFrame(module.probabilities(rows), columns=[f"p_{k}" for k in (*LOCATION_KEYS, "present")])
    table.insert(0, "series_uid", rows.series_uid)
    table.insert(1, "patient_id", [by_uid.patient_id[uid] for uid in rows.series_uid])
    table.insert(2, "fold", run.fold)
    SCANS.write(table, run.folder / "scans.parquet")
    return {"scans": len(table)}


STAGES: dict[str, Callable[[Experiment, StageRun], dict[str, Any]]] = {
    "pretrain": train_pretrain,
    "vessel": train_vessel,
    "segmenter": train_segmenter,
    "smart_net": train_smart_net,
    "expert": train_expert,
    "stacker": train_stacker,
}


def segmentation_of(experiment: Experiment, uid: str) -> dict[str, np.ndarray]:
    """Out-of-fold lumen and sac probabilities of a scan."""
    return read_probabilities(_product(experiment.run("segmenter", experiment.fold_of[uid]), uid))


def lumen_rule(experiment: Experiment, uid: str) -> LumenRule:
    """What is lumen for the graph: as set, or as chosen by the segmenter that had not seen this scan."""
    if (threshold := experiment.cfg.smart_net.threshold) is not None:
        return LumenRule(float(threshold), float(threshold))
    done = experiment.run("segmenter", experiment.fold_of[uid]).finished()
    if done is None:
        raise UserError(
            f"The segmenter of fold {experiment.fold_of[uid]} is not finished. Run stage=segmenter."
        )
    return LumenRule(float(done["threshold"]), float(done["core"]))


def expert_findings(experiment: Experiment, uids: list[str], add_annotations: bool = False) -> list[Finding]:
    """Candidates of these scans, each from the models that had not seen it."""
    settings = graph_settings(experiment.cfg.smart_net)
    tables = {
        fold: CANDIDATES.read(experiment.run("smart_net", fold).read_product("candidates.parquet"))
        for fold in {experiment.fold_of[uid] for uid in uids}
    }
    whole = fit_in_memory(experiment.paths(uids), 2, int(experiment.cfg.trainer.workers))
    found: list[Finding] = []
    for uid in uids:
        segmented = _product(experiment.run("segmenter", experiment.fold_of[uid]), uid)
        rows = tables[experiment.fold_of[uid]]
        found += list_findings(
            case_at(experiment.prepared[uid], whole),
            probabilities_at(segmented, whole),
            _graph_item(experiment, uid, settings).graph,
            pd.DataFrame(rows[rows.series_uid == uid]),
            lumen_rule(experiment, uid).threshold,
            hit_mm=experiment.cfg.expert.hit_mm,
            add_annotations=add_annotations,
        )
    return found


def expert_table(experiment: Experiment) -> pd.DataFrame:
    """Out-of-fold expert predictions of every fold."""
    tables = [
        EXPERT.read(experiment.run("expert", k).read_product("predictions.parquet")) for k in experiment.folds
    ]
    return pd.concat([t for t in tables if len(t)] or tables[:1])


def stacker_rows(experiment: Experiment) -> tuple[stacker.ScanRows, np.ndarray]:
    """Features and labels of every scan, for the trees that a bundle ships."""
    return _rows(experiment, expert_table(experiment), list(experiment.index.series_uid))


def save_weights(path: Path, net: nn.Module) -> None:
    """Weights as safetensors, atomically; extra state that is not a tensor stays in the checkpoint."""
    state = {
        k: v.detach().cpu().contiguous() for k, v in net.state_dict().items() if isinstance(v, torch.Tensor)
    }
    with replacing(path) as part:
        save_file(state, part)


def _rows(
    experiment: Experiment, expert: pd.DataFrame, uids: list[str]
) -> tuple[stacker.ScanRows, np.ndarray]:
    table = experiment.index.set_index("series_uid").loc[uids]
    rows = stacker.scan_rows(pd.DataFrame(expert[expert.series_uid.isin(uids)]), table.modality.to_dict())
    return rows, table[[*LOCATION_KEYS, "present"]].to_numpy(np.float64)


def _graph_item(experiment: Experiment, uid: str, settings: smart_net.GraphSettings) -> smart_net.GraphItem:
    """A scan's graph, built on first use and kept beside the folds of the stage."""
    case = opened(experiment.prepared[uid])
    path = experiment.run("smart_net", 0).folder.parent / "graphs" / f"{uid}.safetensors"
    if not path.is_file():
        rule = lumen_rule(experiment, uid)
        graph = smart_net.vessel_graph(segmentation_of(experiment, uid), rule, case.grid, settings)
        with replacing(path) as part:
            graph.save(part)
    return smart_net.GraphItem(uid, VesselGraph.load(path), case.grid, case.lesions, case.present)


def _patches(cfg: Any, s: Any) -> dict[str, Any]:
    return {
        "patch": s.patch,
        "batch": s.batch,
        "steps": s.steps,
        "foreground": s.foreground,
        "seed": cfg.seed,
        "workers": cfg.trainer.workers,
        "augmentation": build(s.augmentation),
    }


def _seed_weights(seed: int, run: StageRun) -> None:
    """Initial weights depend on seed and fold only, not on what ran before in this process."""
    torch.manual_seed(seed * 1000 + run.fold)


def _product(run: StageRun, uid: str) -> Path:
    return run.folder / "products" / f"{uid}{SUFFIX}"


def _lumen_rule(
    cases: list[PreparedCase], probability: Callable[[PreparedCase], np.ndarray], s: Any
) -> LumenRule:
    """The rule that a segmentation stage is set to, chosen on these scans: training scans, annotated."""
    known = [(case, target) for case in cases if (target := vessel_target(case)) is not None]
    return LumenRule.for_recall(
        [probability(case) for case, _ in known],
        [target for _, target in known],
        [case.grid for case, _ in known],
        s.target_recall,
        s.precision,
    )


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly taken."""
    return (
        [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]
        if items
        else []
    )


def _overlap_row(uid: str, predicted: np.ndarray, target: np.ndarray | None) -> dict[str, Any]:
    if target is None:
        return {"series_uid": uid, "recall": np.nan, "precision": np.nan, "dice": np.nan}
    result = overlap(predicted, target)
    return {"series_uid": uid, "recall": result.recall, "precision": result.precision, "dice": result.dice}


def _means(table: pd.DataFrame) -> dict[str, float]:
    """Mean of every figure that is known for at least one scan."""
    values = table.drop(columns="series_uid").astype(float).mean()
    return {str(name): float(value) for name, value in values.items() if np.isfinite(value)}


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
