"""What a fit says while it runs, for logs that are not terminals."""

import logging
import time

from lightning.pytorch import Callback, LightningModule, Trainer

from aneurysm.runs.folders import StageRun

log = logging.getLogger(__name__)


class PlainProgress(Callback):
    """A few lines per fit, for logs that are not terminals."""

    def __init__(self, run: StageRun) -> None:
        self.run, self.began = run, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()  # an epoch that is gone on with does not start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = trainer.max_epochs or 1
        if (trainer.current_epoch + 1) % max(1, last // 6) and trainer.current_epoch + 1 < last:
            return  # about six lines per fit say it all
        shown = ("train/loss", "val/loss")
        figures = "  ".join(
            f"{name} {float(trainer.callback_metrics[name]):.3f}"
            for name in shown
            if name in trainer.callback_metrics
        )
        log.info(
            "%-9s fold %d  epoch %d/%s  %s  (%.0f s)",
            self.run.stage,
            self.run.fold,
            trainer.current_epoch + 1,
            trainer.max_epochs,
            figures,
            time.monotonic() - self.began,
        )
