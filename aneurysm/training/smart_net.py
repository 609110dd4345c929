"""Training of the second half of stage 3: graph attention and candidates."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from aneurysm.build import build_graph_net, graph_settings, has_graph_net
from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.tables import CANDIDATES
from aneurysm.evaluation.candidates import BUDGET, candidate_recall
from aneurysm.evaluation.lesion_kinds import lesion_sacs
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import smart_net
from aneurysm.stages.processes import barrier, gathered, rank, shared
from aneurysm.stages.stored import remembered
from aneurysm.training.pictures import candidate_pictures
from aneurysm.training.products import (
    WEIGHTS,
    arteries_of,
    graph_item,
    lumen_rule,
    repairs_of,
    save_weights,
    segmentation_of,
)


def train_smart_net(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Graph attention on out-of-fold segmentations; leaves graphs and a candidates table."""
    cfg, s = experiment.cfg, experiment.cfg.smart_net
    settings = graph_settings(s)
    for uid in shared(list(experiment.prepared)):
        graph_item(experiment, uid, settings)  # every process makes a part of the graphs, all read all
    barrier()
    items = {uid: graph_item(experiment, uid, settings) for uid in experiment.prepared}
    training, held_out = experiment.training(run.fold), experiment.held_out(run.fold)
    parts = smart_net.patient_parts(_patients(experiment, training), int(s.graph_members), cfg.seed)
    data = smart_net.GraphData(
        [items[uid] for uid in training],
        [items[uid] for uid in held_out],
        batch=4,
        seed=cfg.seed,
        parts=parts,
    )
    if not data.train and settings.source != "heatmap":
        raise UserError(
            f"smart_net fold {run.fold}: every vessel mask of the training scans is empty: no graph. "
            "Train the segmenter longer (smart_net.epochs), or lower smart_net.precision or .threshold."
        )
    seed_weights(cfg.seed, run)
    net = None
    if has_graph_net(cfg):
        net = _fitted(run, data, cfg)
        save_weights(run.folder / WEIGHTS, net)
    honest = getattr(net, "members", None) is not None
    fusion = smart_net.fitted_fusion(
        [items[uid] for uid in training],
        [
            smart_net.node_scores(net, items[uid].graph, member=part if honest else None)
            for uid, part in zip(training, parts, strict=True)
        ],
        settings,
    )
    tables = []
    for uid in shared(held_out):
        item = items[uid]
        scores = smart_net.node_scores(net, item.graph)
        found = smart_net.candidates(
            item.graph, scores, item.peaks, item.grid, settings, fusion, arteries_of(experiment, uid)
        )
        tables.append(smart_net.candidate_rows(uid, found, run.fold))
    tables = gathered(tables)
    rows = [t for t in tables if len(t)]
    table = pd.concat(rows) if rows else pd.DataFrame(columns=list(CANDIDATES.columns))
    repairs = repairs_of(experiment, experiment.held_out(run.fold))
    if rank() == 0:
        CANDIDATES.write(table, run.folder / "candidates.parquet")
        with replacing(run.folder / "repairs.csv") as part:
            repairs.to_csv(part, index=False)
    known = CANDIDATES.conform(table)

    def lumen_mask(case: PreparedCase) -> np.ndarray:
        uid = case.series_uid
        return lumen_rule(experiment, uid)(segmentation_of(experiment, uid)["vessel"], case.grid)

    illustrate(run, lambda log: candidate_pictures(log, experiment, held_out, known, lumen_mask))
    lesions = {uid: items[uid].lesions for uid in held_out if items[uid].lesions}
    facts = {uid: lesion_sacs(remembered(experiment.prepared[uid])) for uid in lesions}
    hit = candidate_recall(known, lesions, tuple(lesions), facts=facts) if lesions else None
    return {
        "candidates_per_scan": len(table) / max(1, len(tables)),
        **{name: int(repairs[name].to_numpy().sum()) for name in ("bridged", "joined", "dropped", "filled")},
        **({} if fusion is None else fusion.figures()),
        **(
            {}
            if hit is None
            else {
                "candidate_recall": float(hit.recall),
                f"candidate_recall_{BUDGET}": hit.recall_when_keeping(BUDGET),
            }
        ),
    }


def _patients(experiment: Experiment, uids: list[str]) -> list[str]:
    patient = dict(zip(experiment.index.series_uid, experiment.index.patient_id, strict=True))
    return [str(patient[uid]) for uid in uids]


def _fitted(run: StageRun, data: smart_net.GraphData, cfg: Any) -> nn.Module:
    """The net that scores nodes, trained."""
    nodes: Any = torch.cat([d.x for d in data.train if d.x is not None])
    edges: Any = torch.cat([d.edge_attr for d in data.train if d.edge_attr is not None])
    net: Any = build_graph_net(cfg, nodes.shape[1], edges.shape[1])
    net.calibrate(nodes, edges)
    epochs = cfg.smart_net.graph_epochs
    fit(run, smart_net.GraphModule(net, cfg.smart_net.graph_lr, epochs * data.steps), data, epochs, cfg)
    return net
