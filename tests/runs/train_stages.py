"""Train fold 0 of stages: `<float32 | float64> <outputs> <folder> <name:stage:override;override;...> ...`.

Under torchrun it is one of two processes, else it is alone. What stages read of earlier ones are the products
of an experiment that two processes have trained, the same in both cases: so stages can be compared one by
one. Each ends with its fit. The override `graphs=n` is the number of graphs in a batch of this process.
"""

import functools
import importlib
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from torch_geometric.data import Data

from aneurysm.command_line import config_folder
from aneurysm.experiment import open_experiment
from aneurysm.runs.folders import StageRun
from aneurysm.runs.launch import joined_group
from aneurysm.stages.step import StageModule
from aneurysm.training.order import STAGES


class Trained(Exception):
    """What comes after the fit is not compared here."""


def doubled(batch: Any) -> Any:
    """A batch of any stage in float64."""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Data):
        return batch.apply(doubled)
    if is_dataclass(batch) and not isinstance(batch, type):
        return type(batch)(**{f.name: doubled(getattr(batch, f.name)) for f in fields(batch)})
    return type(batch)(map(doubled, batch)) if isinstance(batch, list | tuple) else batch


def _with_batch(make: Any, graphs: int, *arguments: Any, **settings: Any) -> Any:
    return make(*arguments, **{**settings, "batch": graphs})


def main() -> None:
    precision, outputs, folder, *specified = sys.argv[1:]
    if precision == "float64":
        torch.set_default_dtype(torch.float64)
        StageModule.on_before_batch_transfer = lambda self, batch, index: doubled(batch)  # type: ignore
    for one in specified:
        name, stage, overrides = one.split(":")
        fixed = [f"paths.outputs={outputs}", "experiment=smoke", "trainer.progress=none", "trainer=ddp"]
        two = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.workers=0"]
        chosen = [o for o in overrides.split(";") if o]
        graphs = [int(o.split("=")[1]) for o in chosen if o.startswith("graphs=")]
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = hydra.compose("train", overrides=[*fixed, *two, *(o for o in chosen if "graphs=" not in o)])
        OmegaConf.resolve(cfg)
        began = time.monotonic()
        training: Any = importlib.import_module(f"aneurysm.training.{stage}")
        fit = training.fit
        if graphs:
            part: Any = training.smart_net
            part.GraphData = functools.partial(_with_batch, part.GraphData, graphs[0])

        def fit_alone(*arguments: Any, fit: Any = fit) -> None:
            fit(*arguments)
            raise Trained

        training.fit = fit_alone
        with joined_group(cfg.trainer):
            try:
                STAGES[stage](open_experiment(cfg), StageRun(stage, 0, Path(folder) / name, "compared"))
            except Trained:
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        training.fit = fit


if __name__ == "__main__":
    main()
