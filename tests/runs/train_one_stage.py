"""Train fold 0 of one stage on products that are there: `<outputs> <stage> <folder> [overrides]`.

Under torchrun it is one of several processes. Stages before it are those of one process, so that stages can
be compared one by one.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import OmegaConf

from aneurysm.command_line import config_folder
from aneurysm.experiment import open_experiment
from aneurysm.runs.folders import StageRun
from aneurysm.runs.launch import joined_group
from aneurysm.training.order import STAGES


def main() -> None:
    outputs, stage, folder, *overrides = sys.argv[1:]
    fixed = [f"paths.outputs={outputs}", "experiment=smoke", "trainer.progress=none"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*fixed, *overrides])
    OmegaConf.resolve(cfg)
    with joined_group(cfg.trainer):
        experiment = open_experiment(cfg)
        STAGES[stage](experiment, StageRun(stage, 0, Path(folder), "compared"))


if __name__ == "__main__":
    main()
