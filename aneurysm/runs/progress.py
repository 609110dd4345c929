"""What a fit says while it runs: lines for logs that are not terminals, and a file for `aneurysm.status`."""

import json
import logging
import time
from dataclasses import asdict

from lightning.pytorch import Callback, LightningModule, Trainer

from aneurysm.data.files import replacing
from aneurysm.data.preparation.progress import duration
from aneurysm.runs.folders import StageRun
from aneurysm.sweeps.jobs import command_line
from aneurysm.sweeps.overview import Progress

log = logging.getLogger(__name__)


class Pace:
    """How fast a fit goes in this process, validation and data included.

    Args:
        done: steps that were done before, in an earlier process.
    """

    def __init__(self, done: int) -> None:
        self.before, self.began = done, time.monotonic()

    def seconds_per_step(self, done: int) -> float:
        """Mean over the steps of this process."""
        return (time.monotonic() - self.began) / max(1, done - self.before)


class PlainProgress(Callback):
    """A few lines per fit, for logs that are not terminals."""

    def __init__(self, run: StageRun) -> None:
        self.run, self.began, self.pace = run, 0.0, Pace(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pace = Pace(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = trainer.max_epochs or 1
        done = trainer.current_epoch + 1
        if done % max(1, last // 6) and done < last:
            return  # about six lines per fit say it all
        shown = ("train/loss", "val/loss")
        figures = "  ".join(
            f"{name} {float(trainer.callback_metrics[name]):.3f}"
            for name in shown
            if name in trainer.callback_metrics
        )
        left = (last - done) * self.pace.seconds_per_step(done)
        log.info(
            "%-9s fold %d  epoch %d/%s  %s  (%.0f s%s)",
            self.run.stage,
            self.run.fold,
            done,
            trainer.max_epochs,
            figures,
            time.monotonic() - self.began,
            f", {duration(left)} left" if done < last else "",
        )


class ProgressFile(Callback):
    """Keep `progress.json` in the run folder up to date, at most every few seconds.

    Args:
        every: seconds between two writes.
    """

    def __init__(self, run: StageRun, every: float = 3.0) -> None:
        self.run, self.every = run, every
        self.pace: Pace | None = None
        self.written = float("-inf")
        self.command = command_line()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self.pace is None:  # the first step of this process tells how many came before
            self.pace = Pace(self._done(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        now = time.monotonic()
        steps = int(trainer.num_training_batches)
        last = batch_idx + 1 >= steps and trainer.current_epoch + 1 == trainer.max_epochs
        if self.pace is None or not trainer.is_global_zero or (now - self.written < self.every and not last):
            return
        self.written = now
        done, epochs = self._done(trainer, batch_idx + 1), trainer.max_epochs or 1
        pace = self.pace.seconds_per_step(done)
        progress = Progress(
            stage=self.run.stage,
            fold=self.run.fold,
            epoch=trainer.current_epoch + 1,
            epochs=epochs,
            step=batch_idx + 1,
            steps=steps,
            seconds_per_step=round(pace, 4),
            seconds_left=round(max(0, epochs * steps - done) * pace, 1),
            updated=round(time.time(), 1),
            command=self.command,
        )
        with replacing(self.run.folder / "progress.json") as part:
            part.write_text(json.dumps(asdict(progress)))

    @staticmethod
    def _done(trainer: Trainer, steps_of_epoch: int) -> int:
        """Steps since the first epoch began."""
        return trainer.current_epoch * int(trainer.num_training_batches) + steps_of_epoch
