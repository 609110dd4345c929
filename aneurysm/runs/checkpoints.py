"""Checkpoints of a fit: whole or not at all, and never the only one.

A run keeps two of them. The new one is written beside them under another name, brought to the disk, and
only then takes its place: `last.ckpt` becomes `previous.ckpt`, the new file `last.ckpt`. Killed at any
moment, even between the two renames, at least one complete checkpoint is left. What the disk did to a file
later is noticed by the checksums (CRC-32) that the format, a zip archive, keeps of every record: `torch.load`
itself loads a tensor with a flipped bit without a word.
"""

import io
import logging
import os
import pickle
import shutil
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from aneurysm.data.errors import UserError
from aneurysm.data.files import part_of
from aneurysm.runs.preemption import Preempted, Request

log = logging.getLogger(__name__)


class CheckpointFiles(CheckpointIO):
    """The checkpoint files of one run, as Lightning writes and reads them; only process 0 writes.

    A checkpoint that cannot be written, for want of space or for whatever reason the system gives, is
    reported and leaves the older ones as they were; `problem` says why until one is written again.
    """

    def __init__(self, folder: Path) -> None:
        self.last, self.previous = folder / "last.ckpt", folder / "previous.ckpt"
        self.problem: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any = None, storage_options: Any = None
    ) -> None:
        """Write `last.ckpt`; the path is ignored, a run has one place for its checkpoints."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        part = part_of(self.last)
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if self.last.exists():
                os.replace(self.last, self.previous)
            os.replace(part, self.last)
            _sync_folder(self.last.parent)
            self.problem = None
        except OSError as error:
            part.unlink(missing_ok=True)
            free = shutil.disk_usage(self.last.parent).free / 2**20
            kept = next((p.name for p in (self.last, self.previous) if p.exists()), None)
            self.problem = (
                f"The checkpoint {self.last} ({buffer.tell() / 2**20:.1f} MiB) could not be written: "
                f"{error.strerror or error}; {free:.1f} MiB are free there."
            )
            log.error("%s %s", self.problem, f"The one before is kept, {kept}." if kept else "There is none.")

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint: plain containers and tensors, nothing that runs."""
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint, None when the run has none yet.

        A damaged one is moved aside, so that it does not push a good one out at the next write.

        Raises:
            UserError: there are checkpoints, and all of them are damaged; training does not begin anew over
                them.
        """
        for part in self.last.parent.glob(f".*.part.{self.last.name}"):
            part.unlink(missing_ok=True)  # of a process that was killed while it wrote
        found: list[str] = []
        for path in (self.last, self.previous):
            if not path.is_file():
                continue
            problem = damage(path)
            if problem is None:
                if found:
                    log.warning("%s Going on from the one before, %s.", " ".join(found), path)
                    self._set_aside()
                return path
            found.append(f"The checkpoint {path} is damaged ({problem}).")
        if found:
            raise UserError(
                f"{' '.join(found)} There is no other to go on from. Bring back a copy of it, or start over "
                "with force=true, which keeps this folder aside."
            )
        return None

    def _set_aside(self) -> None:
        aside = self.last.with_name(f"damaged-{time.strftime('%Y%m%d-%H%M%S')}.ckpt")
        with suppress(FileNotFoundError):  # another process of the same training was faster
            os.replace(self.last, aside)
            log.warning("The damaged one is kept as %s.", aside)


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None. Reads the whole file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                return f"its record {bad} does not have the checksum it was written with"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # looks at more of the headers
    except pickle.UnpicklingError:
        return None  # whole, but not what this program writes
    except Exception as error:  # a flipped byte in a header can make a reader stumble over anything
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def misfit(checkpoint: dict[str, Any], module: LightningModule) -> str | None:
    """Why a checkpoint cannot be taken up by this network and this version of the program, or None."""
    if Checkpoints.__qualname__ not in checkpoint.get("callbacks", {}):
        return "it was written by another version of this program"
    saved = checkpoint.get("current_model_state", checkpoint["state_dict"])
    wanted = module.state_dict()
    for name in sorted(saved.keys() ^ wanted.keys()):
        return f"it {'holds' if name in saved else 'lacks'} {name}"
    for name, value in wanted.items():
        if isinstance(value, Tensor) and saved[name].shape != value.shape:
            return f"its {name} is {tuple(saved[name].shape)}, not {tuple(value.shape)}"
    return None


def resume_from(files: CheckpointFiles, module: LightningModule) -> Path | None:
    """The checkpoint that a fit of `module` goes on from, None for a fresh start.

    Raises:
        UserError: it does not fit, or all are damaged.
    """
    path = files.newest()
    if path is None:
        return None
    try:
        problem = misfit(torch.load(path, map_location="cpu", weights_only=True, mmap=True), module)
    except pickle.UnpicklingError as error:
        problem = str(error).splitlines()[0]
    if problem is not None:
        raise UserError(
            f"{path} does not fit this training: {problem}. It cannot be gone on from; use force=true to "
            "start over, which keeps the old folder aside."
        )
    return path


class Checkpoints(Checkpoint):
    """Decides when a checkpoint is written, and leaves when the process has been asked to.

    After the last step of an epoch it waits for the epoch's end, so that validation is never half done in a
    checkpoint. Lightning calls `Checkpoint` callbacks after all others, so what they count in a step is in
    the file; what a module does in its own `on_train_batch_end` would come too late.

    Args:
        every_minutes: of training; None: only at the end of epochs.
        every_steps: None for no such rule.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        request: Request,
        every_minutes: float | None = None,
        every_steps: int | None = None,
    ) -> None:
        self.files, self.request = files, request
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self.steps, self.since = 0, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.request.reinstall()
        self.steps, self.since = 0, time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _flush(trainer)  # the figures of the epoch before, which were logged after its checkpoint
        if _any(trainer, self.request.made)[0]:
            raise Preempted

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        if trainer.is_last_batch:
            return
        leave, due = _any(trainer, self.request.made, self._due())
        if leave or due:
            self._save(trainer)
        if leave:
            raise Preempted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        final = trainer.current_epoch + 1 >= (trainer.max_epochs or 1)
        failed = trainer.strategy.broadcast(self.files.problem)
        if final and failed is not None:
            raise UserError(
                f"{failed} It was the last one of this training. Everything before is kept: make room and "
                "run the same command again."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _flush(trainer)
        if _any(trainer, self.request.made)[0]:
            raise Preempted

    def state_dict(self) -> dict[str, Any]:
        return {"format": 1}

    def _due(self) -> bool:
        minutes = (time.monotonic() - self.since) / 60
        return (self.every_steps is not None and self.steps >= self.every_steps) or (
            self.every_minutes is not None and minutes >= self.every_minutes
        )

    def _save(self, trainer: Trainer) -> None:
        _flush(trainer)
        trainer.save_checkpoint(self.files.last, weights_only=False)  # with optimiser and schedule
        self.steps, self.since = 0, time.monotonic()


def _any(trainer: Trainer, *flags: bool) -> list[bool]:
    """Each flag, true when it is true in any of the processes that train together."""
    if trainer.world_size == 1:
        return list(flags)
    counted = torch.tensor(flags, dtype=torch.float32, device=trainer.strategy.root_device)
    return [n > 0 for n in trainer.strategy.reduce(counted, reduce_op="sum").tolist()]


def _flush(trainer: Trainer) -> None:
    """Bring the logged figures to the disk, so that none is missing before the step of a checkpoint."""
    for logger in trainer.loggers:
        logger.save()


def _sync_folder(folder: Path) -> None:
    """Bring the renames to the disk as well; not every file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        log.debug("%s cannot be synced: %s", folder, error)
    finally:
        os.close(handle)
