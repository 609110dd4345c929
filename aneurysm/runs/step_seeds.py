"""Random numbers of training as a function of where it is, so that no state of them need be kept.

Before every training step all generators are seeded from (seed, fold, epoch, step). Dropout, collocation
draws and dropped metadata of a step are then the same however often the training was interrupted before it.
The generators of all processes of a training agree: what is drawn for the whole batch (`global_batch.py`) is
what one process would draw.

Saving and restoring generator states instead would have to foresee who draws in between: data loaders draw a
seed whenever an iterator is made, and a resumed epoch makes another one. Validation draws nothing that is
kept: the next training step seeds again.
"""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeeds(Callback):
    """Seeds torch, numpy and random before every training step."""

    def __init__(self, seed: int, fold: int) -> None:
        self.key = (seed, fold)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = (*self.key, trainer.current_epoch, batch_idx)
        first, second = (int(n) for n in np.random.SeedSequence(key).generate_state(2))
        if pl_module.device.type == "cpu":
            torch.default_generator.manual_seed(first)  # a hundredth of the time of torch.manual_seed
        else:
            torch.manual_seed(first)
        np.random.seed(second)
        random.seed(second)
