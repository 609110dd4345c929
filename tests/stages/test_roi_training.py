"""A region of interest in training: learnt by the vessel stage, kept to by the segmenter."""

import json
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest

from aneurysm.build import view_settings
from aneurysm.data.preparation.prepared import load_prepared
from aneurysm.experiment import open_experiment
from aneurysm.stages.stored import read_probabilities
from aneurysm.stages.windows import place
from aneurysm.train import train
from aneurysm.training.products import product_path
from aneurysm.training.roi import ROI_WEIGHTS, ROIS, roi_of

CONF = str(Path(__file__).parents[2] / "conf")


@pytest.mark.slow
def test_the_stages_keep_to_the_region(tmp_path):
    # Scans of 42 mm hold regions of 25 x 25 x 30 mm more than twice; what is found there is taken as it is.
    settings = [
        "experiment=smoke",
        "stage=segmenter",
        f"paths.outputs={tmp_path}",
        "vessel.roi.size_mm=[25,25,30]",
        "vessel.roi.fallback=region",
        "vessel.roi.steps=25",
        "vessel.window=16",
        "smart_net.window=16",
    ]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        cfg = hydra.compose("train", overrides=settings)
    train(cfg)
    experiment = open_experiment(cfg)
    looked = 0
    for fold in experiment.folds:
        run = experiment.run("vessel", fold)
        assert (run.folder / ROI_WEIGHTS).is_file()
        assert set(json.loads((run.folder / ROIS).read_text())) == set(experiment.held_out(fold))
        table = pd.read_csv(run.folder / "overlap.csv")
        assert table.lesions_in_roi.dropna().between(0, 1).all()
        for uid in experiment.held_out(fold):
            roi = roi_of(experiment, uid)
            if roi.region is None:
                continue
            looked += 1
            case = load_prepared(experiment.prepared[uid])
            for stage in ("vessel", "segmenter"):
                found = read_probabilities(product_path(experiment.run(stage, fold), uid))
                s = cfg.vessel if stage == "vessel" else cfg.smart_net
                given = place(roi.region.box, case.grid.shape, view_settings(s), roi.region.exact).box
                outside = np.ones(case.grid.shape, bool)
                outside[given.slices] = False
                assert outside.any()
                for volume in found.values():
                    assert not volume[outside].any() and volume[given.slices].any()
    assert looked > 0
