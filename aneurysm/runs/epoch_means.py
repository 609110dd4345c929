"""Epoch means that survive an interruption within the epoch."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from aneurysm.stages.step import epoch_sums


class EpochMeans(Callback):
    """Keeps in the checkpoint what the steps have added up for the means of the running epoch.

    Without it `train/loss` of an epoch that is gone on with would be the mean of its last part. Every process
    of a training adds up the same values, those of the whole batch.
    """

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        sums = epoch_sums(pl_module, "train")
        checkpoint["epoch_sums"] = {name: (total.cpu(), weight) for name, (total, weight) in sums.items()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        epoch_sums(pl_module, "train").update(checkpoint["epoch_sums"])
