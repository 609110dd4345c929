"""The neural stages of the demo, built as training builds them, for the training benchmarks.

They read what `python train.py` left in its outputs folder: prepared scans and products of earlier stages.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig

from aneurysm.command_line import config_folder
from aneurysm.experiment import Experiment, open_experiment
from aneurysm.training.order import STAGES

NEURAL = ("pretrain", "vessel", "segmenter", "smart_net", "expert")
_REQUIRES = {"segmenter": "vessel", "smart_net": "segmenter", "expert": "smart_net"}


@dataclass(frozen=True)
class StageFit:
    """What a stage hands to `runs.fit.fit`."""

    stage: str
    module: LightningModule
    data: LightningDataModule
    epochs: int
    cfg: DictConfig


class _Caught(Exception):
    def __init__(self, found: StageFit) -> None:
        super().__init__()
        self.found = found


def demo(outputs: Path, *overrides: str) -> Experiment:
    """The demo experiment in this outputs folder, which `python train.py` has filled."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose(
            "train", overrides=[f"paths.outputs={outputs}", "trainer.progress=none", *overrides]
        )
    return open_experiment(cfg)


def stage_fit(experiment: Experiment, stage: str, fold: int = 0) -> StageFit:
    """The module and the data of one stage, fresh, at the moment when their training would begin.

    Raises:
        SystemExit: the demo has not got far enough for this stage.
    """
    before = _REQUIRES.get(stage)
    if before and any(experiment.run(before, k).finished() is None for k in experiment.folds):
        raise SystemExit(
            f"{stage} reads {before}, which is not finished in {experiment.folder}: run `python train.py "
            f"paths.outputs={experiment.folder.parent}` first, or leave the stage out with --stages."
        )
    training = importlib.import_module(f"aneurysm.training.{stage}")

    def caught(
        run: Any, module: LightningModule, data: LightningDataModule, epochs: int, cfg: Any, *_: Any
    ) -> None:
        raise _Caught(StageFit(stage, module, data, epochs, cfg))

    fit, training.fit = training.fit, caught
    try:
        STAGES[stage](experiment, experiment.run(stage, fold))
    except _Caught as one:
        return one.found
    finally:
        training.fit = fit
    raise RuntimeError(f"{stage} trains without fit(); it cannot be measured here.")
