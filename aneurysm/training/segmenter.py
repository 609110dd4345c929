"""Training of the first half of stage 3: the Smart Net's segmentation network."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from aneurysm.build import build_segmenter, build_segmenter_loss, segmenter_channels, view_settings
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.evaluation.segmentation import overlap
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import smart_net
from aneurysm.stages.heatmap import HEATMAP
from aneurysm.stages.processes import gathered, shared
from aneurysm.stages.stored import opened, read_probabilities, remembered, write_probabilities
from aneurysm.stages.volumes import aneurysm_target, vessel_target
from aneurysm.training.masks import chosen_rule, mean_figures, overlap_row, patch_settings, spread
from aneurysm.training.pictures import mask_pictures
from aneurysm.training.products import WEIGHTS, product_path, save_weights


def train_segmenter(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """The Smart Net's segmentation network; leaves lumen and sac probabilities per held-out scan."""
    cfg, s = experiment.cfg, experiment.cfg.smart_net
    seed_weights(cfg.seed, run)
    lumen = {
        uid: product_path(experiment.run("vessel", experiment.fold_of[uid]), uid)
        for uid in experiment.prepared
    }
    net = build_segmenter(cfg)
    module = smart_net.SegmenterModule(
        net, build_segmenter_loss(cfg), s.lr, s.weight_decay, s.epochs * s.steps
    )
    training, held_out = experiment.training(run.fold), experiment.held_out(run.fold)
    names = segmenter_channels(cfg)
    data = smart_net.SegmenterData(
        experiment.paths(training),
        experiment.paths(held_out),
        heatmap_sigma_mm=float(s.heatmap_sigma_mm) if HEATMAP in names else None,
        upstream=lumen,
        **patch_settings(cfg, s),
    )
    fit(run, module, data, s.epochs, cfg)

    def segmented(case: PreparedCase) -> dict[str, np.ndarray]:
        earlier = read_probabilities(lumen[case.series_uid])["vessel"]
        return smart_net.segment(net, case, earlier, view_settings(s), names)

    annotated = [p for p in experiment.paths(training) if "vessel" in opened(p).masks]
    some = spread(annotated, s.rule_scans)
    rule = chosen_rule([remembered(p) for p in some], lambda case: segmented(case)["vessel"], s)
    rows = []
    for uid in shared(held_out):
        case = remembered(experiment.prepared[uid])
        probability = segmented(case)
        write_probabilities(product_path(run, uid), probability)
        row = overlap_row(uid, rule(probability["vessel"], case.grid), vessel_target(case))
        sac = aneurysm_target(case)
        row["sac_recall"] = overlap(probability["aneurysm"] >= 0.5, sac).recall if sac is not None else np.nan
        rows.append(row)
    save_weights(run.folder / WEIGHTS, net)
    table = pd.DataFrame(gathered(rows))

    def lumen_mask(case: PreparedCase) -> np.ndarray:
        return rule(read_probabilities(product_path(run, case.series_uid))["vessel"], case.grid)

    def sac_mask(case: PreparedCase) -> np.ndarray:
        return read_probabilities(product_path(run, case.series_uid))["aneurysm"] >= 0.5

    illustrate(
        run, lambda log: mask_pictures(log, experiment, table, {"vessel": lumen_mask, "sac": sac_mask})
    )
    return {**asdict(rule), **mean_figures(table)}
