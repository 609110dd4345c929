"""Averaged weights: what validation sees and what training leaves behind."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from aneurysm.data.preparation.prepared import PreparedCase, save_prepared
from aneurysm.data.scan import Grid
from aneurysm.losses.tversky import TverskyLoss
from aneurysm.nets.unet import UNet3D
from aneurysm.runs.averaging import AveragedWeights
from aneurysm.stages.sampling import Sampling
from aneurysm.stages.segmentation import SegmentationModule
from aneurysm.stages.vessel import VesselData

SHAPE = (24, 24, 24)


@pytest.fixture
def data(tmp_path):
    paths = []
    for i in range(2):
        rng = np.random.default_rng(i)
        vessel = np.zeros(SHAPE, np.uint8)
        vessel[:, 8 + i : 12, 9:13] = 14
        image = (2 * vessel / 14 + rng.normal(0, 0.3, SHAPE)).astype(np.float32)
        grid = Grid(SHAPE, np.diag([0.5, 0.5, 0.5, 1.0]))
        unknown = np.full(13, np.nan, np.float32)
        case = PreparedCase(
            f"s{i}", "p", "CTA", image, grid, vessel, None, (), 50.0, "F", False, unknown, grid, -4.0
        )
        paths.append(tmp_path / f"{i}.blosc2")
        save_prepared(case, paths[-1])
    return VesselData(paths[:1], paths[1:], patch=16, batch=2, steps=5, sampling=Sampling(), seed=0)


def fitted(data, tmp_path, decay: float | None):
    torch.manual_seed(0)
    module = SegmentationModule(UNet3D(1, 1, (4, 8)), TverskyLoss(), 3e-2, 0.0, 10)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[] if decay is None else [AveragedWeights(decay)],
    )  # fmt: skip
    trainer.fit(module, data)
    seen = float(trainer.callback_metrics["val/loss"])
    again = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    return module, seen, again


def test_validation_looks_at_the_average_that_training_leaves(data, tmp_path):
    raw, plain, plain_again = fitted(data, tmp_path, None)
    averaged, smooth, smooth_again = fitted(data, tmp_path, 0.9)
    assert plain_again == pytest.approx(plain, rel=1e-5)
    assert smooth_again == pytest.approx(smooth, rel=1e-5)
    assert abs(smooth - plain) > 1e-3
    assert any(
        (a - b).abs().max() > 1e-4 for a, b in zip(raw.parameters(), averaged.parameters(), strict=True)
    )
