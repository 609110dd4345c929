"""What a fit says while it runs: lines for logs that are not terminals, and a file for `aneurysm.status`."""

import json
import logging
import math
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
        done: epochs that were done before, in an earlier process; parts of one count too.
    """

    def __init__(self, done: float) -> None:
        self.before, self.began = done, time.monotonic()

    def seconds_left(self, done: float, total: float) -> float | None:
        """At the mean pace of this process; None before it has done anything."""
        mine = done - self.before
        return (time.monotonic() - self.began) / mine * max(0.0, total - done) if mine > 0 else None


class PlainProgress(Callback):
    """A few lines per fit, for logs that are not terminals."""

    def __init__(self, run: StageRun) -> None:
        self.run, self.began, self.pace = run, 0.0, Pace(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pace = Pace(trainer.current_epoch)
        self.began = time.monotonic()  # an epoch that is gone on with does not start

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
        left = self.pace.seconds_left(done, last)
        log.info(
            "%-9s fold %d  epoch %d/%s  %s  (%.0f s%s)",
            self.run.stage,
            self.run.fold,
            done,
            trainer.max_epochs,
            figures,
            time.monotonic() - self.began,
            f", {duration(left)} left" if left else "",
        )


class ProgressFile(Callback):
    """Keep `progress.json` in the run folder up to date, at most every few seconds.

    Args:
        every: seconds between two writes.
    """

    def __init__(self, run: StageRun, every: float = 3.0) -> None:
        self.run, self.every = run, every
        self.pace: Pace | None = None
        self.steps = 0  # of this process
        self.written = float("-inf")
        self.command = command_line()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self.pace is None:  # the first step of this process tells how much came before
            self.pace = Pace(_epochs(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.steps += 1
        now = time.monotonic()
        last = _epochs(trainer, batch_idx + 1) == trainer.max_epochs
        if self.pace is None or not trainer.is_global_zero or (now - self.written < self.every and not last):
            return
        self.written = now
        epochs = trainer.max_epochs or 1
        left = self.pace.seconds_left(_epochs(trainer, batch_idx + 1), epochs)
        progress = Progress(
            stage=self.run.stage,
            fold=self.run.fold,
            epoch=trainer.current_epoch + 1,
            epochs=epochs,
            step=batch_idx + 1,
            steps=_steps(trainer),
            seconds_per_step=round((now - self.pace.began) / self.steps, 4),
            seconds_left=None if left is None else round(left, 1),
            updated=round(time.time(), 1),
            command=self.command,
        )
        with replacing(self.run.folder / "progress.json") as part:
            part.write_text(json.dumps(asdict(progress)))


def _steps(trainer: Trainer) -> int | None:
    """Steps per epoch; None for a loader that does not know its length."""
    steps = trainer.num_training_batches
    return int(steps) if math.isfinite(steps) else None


def _epochs(trainer: Trainer, steps_of_epoch: int) -> float:
    """How many epochs are done, with the share of the one under way."""
    steps = _steps(trainer)
    return trainer.current_epoch + (steps_of_epoch / steps if steps else 0.0)
