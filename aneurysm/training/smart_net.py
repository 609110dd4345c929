"""Training of the second half of stage 3: graph attention and candidates."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from aneurysm.build import build, graph_settings
from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.tables import CANDIDATES
from aneurysm.evaluation.candidates import candidate_recall
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import smart_net
from aneurysm.stages.processes import barrier, gathered, rank, shared
from aneurysm.training.pictures import candidate_pictures
from aneurysm.training.products import (
    WEIGHTS,
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
    data = smart_net.GraphData(
        [items[uid] for uid in experiment.training(run.fold)],
        [items[uid] for uid in experiment.held_out(run.fold)],
        batch=4,
        seed=cfg.seed,
    )
    if not data.train:
        raise UserError(
            f"smart_net fold {run.fold}: every vessel mask of the training scans is empty: no graph. "
            "Train the segmenter longer (smart_net.epochs), or lower smart_net.precision or .threshold."
        )
    seed_weights(cfg.seed, run)
    nodes: Any = torch.cat([d.x for d in data.train if d.x is not None])
    edges = len(items[experiment.training(run.fold)[0]].graph.edge_names)
    net = build(cfg.graph_net, in_features=nodes.shape[1], edge_features=edges)
    net.calibrate(nodes)
    module = smart_net.GraphModule(net, s.graph_lr, s.graph_epochs * data.steps)
    fit(run, module, data, s.graph_epochs, cfg)
    tables = []
    for uid in shared(experiment.held_out(run.fold)):
        item, probability = items[uid], segmentation_of(experiment, uid)
        scores = smart_net.node_scores(net, item.graph)
        found = smart_net.candidates(item.graph, scores, probability, item.grid, settings)
        tables.append(smart_net.candidate_rows(uid, found, run.fold))
    tables = gathered(tables)
    rows = [t for t in tables if len(t)]
    table = pd.concat(rows) if rows else pd.DataFrame(columns=list(CANDIDATES.columns))
    repairs = repairs_of(experiment, experiment.held_out(run.fold))
    if rank() == 0:
        CANDIDATES.write(table, run.folder / "candidates.parquet")
        with replacing(run.folder / "repairs.csv") as part:
            repairs.to_csv(part, index=False)
    save_weights(run.folder / WEIGHTS, net)
    known = CANDIDATES.conform(table)
    held_out = experiment.held_out(run.fold)

    def lumen_mask(case: PreparedCase) -> np.ndarray:
        uid = case.series_uid
        return lumen_rule(experiment, uid)(segmentation_of(experiment, uid)["vessel"], case.grid)

    illustrate(run, lambda log: candidate_pictures(log, experiment, held_out, known, lumen_mask))
    lesions = {uid: items[uid].lesions for uid in experiment.held_out(run.fold) if items[uid].lesions}
    hit = candidate_recall(known, lesions, tuple(lesions)) if lesions else None
    return {
        "candidates_per_scan": len(table) / max(1, len(tables)),
        **{name: int(repairs[name].to_numpy().sum()) for name in ("bridged", "joined", "dropped", "filled")},
        **({} if hit is None else {"candidate_recall": float(hit.recall)}),
    }
