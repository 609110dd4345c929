"""Checkpoints of a fit, whole or not at all."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from aneurysm.data.files import replacing


class LastCheckpoint(Callback):
    """Write the checkpoint at every epoch's end, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With optimiser and schedule. All processes take part, the first one writes.
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.path, weights_only=False)
            return
        with replacing(self.path) as part:
            trainer.save_checkpoint(part, weights_only=False)
