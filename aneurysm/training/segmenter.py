"""Training of the first half of stage 3: the Smart Net's segmentation network."""

from typing import Any

import numpy as np

from aneurysm.build import build_segmenter, build_segmenter_loss, segmenter_channels, view_settings
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.evaluation.segmentation import overlap
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import smart_net
from aneurysm.stages.heatmap import HEATMAP
from aneurysm.stages.processes import shared
from aneurysm.stages.roi import Roi, within
from aneurysm.stages.stored import read_probabilities, remembered, write_probabilities
from aneurysm.stages.volumes import aneurysm_target
from aneurysm.training.masks import (
    chosen_rules,
    overlap_row,
    patch_settings,
    rule_split,
    spread,
    write_overlap,
)
from aneurysm.training.pictures import mask_pictures
from aneurysm.training.products import WEIGHTS, product_path, save_weights
from aneurysm.training.roi import roi_of


def train_segmenter(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """The Smart Net's segmentation network; leaves lumen and sac probabilities per held-out scan."""
    cfg, s = experiment.cfg, experiment.cfg.smart_net
    seed_weights(cfg.seed, run)
    lumen = {
        uid: product_path(experiment.run("vessel", experiment.fold_of[uid]), uid)
        for uid in experiment.prepared
    }
    net = build_segmenter(cfg)
    loss = build_segmenter_loss(cfg)
    module = smart_net.SegmenterModule(net, loss, s.lr, s.weight_decay, s.epochs * s.steps)
    held_out = experiment.held_out(run.fold)
    fitted, judged = rule_split(experiment, run.fold, float(s.validation_share))
    names = segmenter_channels(cfg)
    data = smart_net.SegmenterData(
        experiment.paths(fitted),
        experiment.paths(held_out),
        heatmap_sigma_mm=float(s.heatmap_sigma_mm) if HEATMAP in names else None,
        upstream=lumen,
        **patch_settings(cfg, s, loss),
    )
    fit(run, module, data, s.epochs, cfg)

    def looked_at(case: PreparedCase) -> Roi:
        return roi_of(experiment, case.series_uid)

    def segmented(case: PreparedCase) -> dict[str, np.ndarray]:
        earlier = read_probabilities(lumen[case.series_uid])["vessel"]
        return smart_net.segment(net, case, earlier, view_settings(s), names, looked_at(case).region)

    some = [remembered(p) for p in experiment.paths(spread(judged, s.rule_scans))]
    known = [within(case, looked_at(case).box) for case in some]
    rules, chosen = chosen_rules(known, lambda case: segmented(case)["vessel"], s)
    rows = []
    for uid in shared(held_out):
        case = remembered(experiment.prepared[uid])
        probability = segmented(case)
        write_probabilities(product_path(run, uid), probability)
        row = overlap_row(
            case, rules.of(case.modality)(probability["vessel"], case.grid), looked_at(case).box
        )
        sac = aneurysm_target(case)  # also one that was never looked at
        row["sac_recall"] = overlap(probability["aneurysm"] >= 0.5, sac).recall if sac is not None else np.nan
        rows.append(row)
    save_weights(run.folder / WEIGHTS, net)
    table, means = write_overlap(run, rows)

    def lumen_mask(case: PreparedCase) -> np.ndarray:
        probability = read_probabilities(product_path(run, case.series_uid))["vessel"]
        return rules.of(case.modality)(probability, case.grid)

    def sac_mask(case: PreparedCase) -> np.ndarray:
        return read_probabilities(product_path(run, case.series_uid))["aneurysm"] >= 0.5

    illustrate(
        run, lambda log: mask_pictures(log, experiment, table, {"vessel": lumen_mask, "sac": sac_mask})
    )
    return {**chosen, **means}
