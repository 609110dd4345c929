"""Training of stage 2, vessel."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from aneurysm.build import build, roi_settings, view_settings
from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.experiment import Experiment
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import vessel
from aneurysm.stages.processes import gathered, rank, shared
from aneurysm.stages.roi import WHOLE, Roi, find_roi, share_of_lesions, within
from aneurysm.stages.stored import read_probabilities, remembered, write_probabilities
from aneurysm.stages.volumes import vessel_target
from aneurysm.training.masks import chosen_rule, mean_figures, overlap_row, patch_settings, spread
from aneurysm.training.pictures import mask_pictures
from aneurysm.training.products import WEIGHTS, product_path, save_weights
from aneurysm.training.roi import train_roi, write_rois


def train_vessel(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Recall-first vessel net; leaves a probability volume per held-out scan."""
    cfg, s = experiment.cfg, experiment.cfg.vessel
    seed_weights(cfg.seed, run)
    net = build(s.net, in_channels=vessel.INPUTS, out_channels=len(vessel.CHANNELS))
    module = vessel.VesselModule(net, build(cfg.loss), s.lr, s.weight_decay, s.epochs * s.steps)
    training, held_out = experiment.training(run.fold), experiment.held_out(run.fold)
    data = vessel.VesselData(experiment.paths(training), experiment.paths(held_out), **patch_settings(cfg, s))
    if not data.train:
        raise UserError(
            f"vessel fold {run.fold}: no training scan has a vessel mask (segmentations/<uid>_cowseg.nii). "
            "This stage needs some; bring a bundle trained elsewhere to use the others."
        )
    fit(run, module, data, s.epochs, cfg)
    coarse, regions = train_roi(experiment, run, data.train), roi_settings(s)

    def looked_at(case: PreparedCase) -> Roi:
        return WHOLE if regions is None else find_roi(coarse, case, regions)

    def segmented(case: PreparedCase, roi: Roi | None = None) -> np.ndarray:
        region = (roi or looked_at(case)).region
        return vessel.vessel_probability(net, case, view_settings(s), region)

    some = [remembered(p) for p in spread(data.train, s.rule_scans)]
    # Lumen outside the region is not this net's to find.
    rule = chosen_rule([within(case, looked_at(case).box) for case in some], segmented, s)
    rows, rois = [], []
    for uid in shared(held_out):
        case = remembered(experiment.prepared[uid])
        roi = looked_at(case)
        probability = segmented(case, roi)
        write_probabilities(product_path(run, uid), {"vessel": probability})
        row = overlap_row(uid, rule(probability, case.grid), vessel_target(within(case, roi.box)))
        rows.append({**row, "lesions_in_roi": share_of_lesions(case, roi.box)})
        rois.append((uid, roi))
    table = pd.DataFrame(gathered(rows))
    write_rois(run, dict(gathered(rois)))
    if rank() == 0:
        with replacing(run.folder / "overlap.csv") as part:
            table.to_csv(part, index=False)
    save_weights(run.folder / WEIGHTS, net)

    def lumen_mask(case: PreparedCase) -> np.ndarray:
        return rule(read_probabilities(product_path(run, case.series_uid))["vessel"], case.grid)

    illustrate(run, lambda log: mask_pictures(log, experiment, table, {"vessel": lumen_mask}))
    return {**asdict(rule), **mean_figures(table)}
