"""Training of stage 2, vessel."""

from typing import Any

import numpy as np

from aneurysm.build import build, build_vessel, roi_settings, view_settings
from aneurysm.data.errors import UserError
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import vessel
from aneurysm.stages.processes import gathered, shared
from aneurysm.stages.roi import WHOLE, Roi, find_roi, share_of_lesions, within
from aneurysm.stages.stored import read_probabilities, remembered, write_labels, write_probabilities
from aneurysm.training.masks import (
    chosen_rules,
    overlap_row,
    patch_settings,
    rule_split,
    spread,
    write_overlap,
)
from aneurysm.training.pictures import mask_pictures
from aneurysm.training.products import WEIGHTS, artery_path, product_path, save_weights
from aneurysm.training.roi import train_roi, write_rois


def train_vessel(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Recall-first vessel net; leaves a probability volume per held-out scan."""
    cfg, s = experiment.cfg, experiment.cfg.vessel
    seed_weights(cfg.seed, run)
    net, loss, arteries = build_vessel(cfg), build(cfg.loss), vessel.names_arteries(s.classes)
    module = vessel.VesselModule(
        net, loss, s.lr, s.weight_decay, s.epochs * s.steps, artery_weight=s.artery_weight
    )
    held_out = experiment.held_out(run.fold)
    fitted, judged = rule_split(experiment, run.fold, float(s.validation_share))
    data = vessel.VesselData(
        experiment.paths(fitted),
        experiment.paths(held_out),
        arteries=arteries,
        **patch_settings(cfg, s, loss),
    )
    if not data.train:
        raise UserError(
            f"vessel fold {run.fold}: no training scan has a vessel mask (segmentations/<uid>_cowseg.nii). "
            "This stage needs some; bring a bundle trained elsewhere to use the others."
        )
    fit(run, module, data, s.epochs, cfg)
    coarse, regions = train_roi(experiment, run, data.train), roi_settings(s)

    places: dict[str, Roi] = {}  # by series: scans that choose the rule are looked at twice

    def looked_at(case: PreparedCase) -> Roi:
        if case.series_uid not in places:
            places[case.series_uid] = WHOLE if regions is None else find_roi(coarse, case, regions)
        return places[case.series_uid]

    def segmented(case: PreparedCase) -> np.ndarray:
        return vessel.vessel_probability(net, case, view_settings(s), looked_at(case).region)

    some = [remembered(p) for p in experiment.paths(spread(judged, s.rule_scans))]
    # Lumen outside the region is not this net's to find.
    known = [within(case, looked_at(case).box) for case in some]
    rules, chosen = chosen_rules(known, segmented, s)
    rows, rois = [], []
    for uid in shared(held_out):
        case = remembered(experiment.prepared[uid])
        roi = looked_at(case)
        probability, labels = vessel.vessels_and_names([net], case, view_settings(s), arteries, roi.region)
        write_probabilities(product_path(run, uid), {"vessel": probability})
        row = overlap_row(case, rules.of(case.modality)(probability, case.grid), roi.box)
        row["lesions_in_roi"] = share_of_lesions(case, roi.box)
        if labels is not None:
            write_labels(artery_path(run, uid), labels)
            row["artery_accuracy"] = vessel.artery_accuracy(labels, case)
        rows.append(row)
        rois.append((uid, roi))
    table, means = write_overlap(run, rows)
    write_rois(run, dict(gathered(rois)))
    save_weights(run.folder / WEIGHTS, net)

    def lumen_mask(case: PreparedCase) -> np.ndarray:
        probability = read_probabilities(product_path(run, case.series_uid))["vessel"]
        return rules.of(case.modality)(probability, case.grid)

    illustrate(run, lambda log: mask_pictures(log, experiment, table, {"vessel": lumen_mask}))
    return {**chosen, **means}
