"""All stages on a vessel net that names arteries, deeply supervised by a sum of losses; then a prediction."""

import hydra
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from aneurysm.build import build
from aneurysm.command_line import config_folder
from aneurysm.data.labels import VESSEL_LABEL
from aneurysm.experiment import open_experiment
from aneurysm.pipeline import Detector
from aneurysm.predict import write_scan
from aneurysm.stages.stored import opened, read_labels
from aneurysm.train import train
from aneurysm.training.products import artery_path
from aneurysm.vessels.arteries import artery_at

CHOSEN = (
    "loss=sum",
    "vessel.classes=arteries",
    "vessel.net.deep_supervision=2",
    "vessel.ema=0.5",
    "vessel.sampling.vessel=0.4",
    "vessel.sampling.thin=0.4",
    "smart_net.net.deep_supervision=2",
    "smart_net.sampling.bright=0.2",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_named_arteries_from_training_to_prediction(tmp_path):
    fixed = [f"paths.outputs={tmp_path}", "experiment=smoke", "trainer.progress=none"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*fixed, *CHOSEN])
    train(cfg)
    experiment = open_experiment(cfg)
    for uid, path in experiment.prepared.items():
        run = experiment.run("vessel", experiment.fold_of[uid])
        labels = read_labels(artery_path(run, uid))
        assert labels.shape == opened(path).grid.shape and set(np.unique(labels)) <= {0, *VESSEL_LABEL}
    table = pd.read_csv(experiment.run("vessel", 0).folder / "overlap.csv")
    known = table.artery_accuracy.dropna()  # of a net this small some scans have no lumen at all
    assert len(known) and known.between(0, 1).all()

    detector = Detector.load(tmp_path / "smoke" / "bundle")
    uid = next(iter(experiment.prepared))
    found = detector(build(cfg.data).case(uid).scan)
    assert found.arteries is not None and found.arteries.shape == found.case.grid.shape
    if found.arteries.any():
        index, distance = artery_at(found.arteries, found.case.grid, found.graph.position)
        assert (index >= 0).all() and np.isfinite(distance).all()
    folder = tmp_path / "report"
    folder.mkdir()
    write_scan(folder, found, detector, 0.5, {})
    written = np.asarray(nib.load(folder / "arteries.nii.gz").dataobj)
    assert set(np.unique(written)) == set(np.unique(found.arteries))
    mask = nib.load(folder / "vessels.nii.gz")
    volume = np.asarray(mask.dataobj).sum() * float(np.prod(mask.header.get_zooms()))  # mm^3
    assert volume == pytest.approx(found.mended.mask.sum() * found.case.grid.voxel_mm3, rel=0.1)
