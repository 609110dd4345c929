"""Epoch means that survive an interruption within the epoch."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

Sums = dict[
    str, tuple[torch.Tensor, torch.Tensor]
]  # name -> sum of values times batch size, sum of batch sizes


class EpochMeans(Callback):
    """Keeps in the checkpoint what Lightning has summed up for the means of the running epoch.

    Lightning itself starts those sums anew when it resumes, and `train/loss` of that epoch would be the mean
    of its last part. The sums are added back when a figure is logged for the first time after the resumption;
    one that is never logged again in that epoch (a loss without labels, say) is missing from it.
    """

    def __init__(self) -> None:
        self.missing: Sums = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["epoch_sums"] = _over_processes({**self.missing, **_sums(trainer)})

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # They are summed over processes when the mean is taken, so one of them gets all.
        self.missing = dict(checkpoint["epoch_sums"]) if trainer.is_global_zero else {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.missing = {}  # only epochs from their start come here: the checkpoint was of the one before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.missing:
            return
        results = trainer.fit_loop.epoch_loop._results
        for name in [n for n in self.missing if n in results]:
            value, count = self.missing.pop(name)
            metric = results[name]
            metric.value = metric.value + value.to(metric.value.device)
            metric.cumulated_batch_size = metric.cumulated_batch_size + count.to(metric.value.device)


def _sums(trainer: Trainer) -> Sums:
    return {
        name: (metric.value.detach().cpu().clone(), metric.cumulated_batch_size.cpu().clone())
        for name, metric in trainer.fit_loop.epoch_loop._results.items()
        if metric.is_tensor and metric.meta.is_mean_reduction and not metric.has_reset
    }


def _over_processes(sums: Sums) -> Sums:
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, sums)
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: (
            torch.stack([part[name][0] for part in parts if name in part]).sum(0),
            torch.stack([part[name][1] for part in parts if name in part]).sum(0),
        )
        for name in names
    }
