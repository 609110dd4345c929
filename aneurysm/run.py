"""Run folders: where the work of a stage lies, how it is resumed or skipped, and how a fit happens there.

The folder is `outputs/<experiment>/<stage>/<name>-<hash>/fold_<k>`. The hash covers what changes the
result: the settings the stage reads, the data, the folds and the hashes of the stages before it. The same
command therefore always lands in the same folder, and another configuration in another one.
"""

import hashlib
import json
import logging
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, OmegaConf

import aneurysm
from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing

log = logging.getLogger(__name__)
# Lightning reports devices and tips at every fit; a pipeline of many fits would drown in them.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# What Lightning says about its own insides, or about choices made here on purpose.
for _message in (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*does not have many workers.*",
    ".*You have overridden `transfer_batch_to_device`.*",
    ".*`LightningModule.configure_optimizers` returned `None`.*",
    ".*log_every_n_steps.*",
    ".*The number of training batches.*",
    ".*IterableDataset.*",
):
    warnings.filterwarnings("ignore", message=_message)

# What each part of the pipeline reads from the configuration, and which parts come before it.
READS: dict[str, tuple[str, ...]] = {
    "pretrain": ("backbone", "masking", "pretrain"),
    "vessel": ("loss", "vessel"),
    "segmenter": ("loss", "smart_net"),
    "smart_net": ("graph_net", "smart_net"),
    "expert": ("backbone", "oscillator", "fusion", "metadata", "physics", "balance", "loss", "expert"),
    "stacker": ("stacker",),
}
UPSTREAM: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "vessel": (),
    "segmenter": ("vessel",),
    "smart_net": ("segmenter",),
    "expert": ("pretrain", "smart_net"),
    "stacker": ("expert",),
}
# The part of the Smart Net that only its segmentation network reads, and the part that only its graph reads.
_GRAPH_KEYS = (
    "threshold",
    "graph_epochs",
    "graph_lr",
    "max_candidates",
    "min_distance_mm",
    "node_spacing_mm",
)
_ALWAYS = ("prepare", "folds", "seed")
_NO_EFFECT = frozenset({"root", "meshes", "jobs", "workers", "overlap"})


@dataclass(frozen=True)
class StageRun:
    """One fold of one stage."""

    stage: str
    fold: int
    folder: Path
    key: str  # hash of everything that changes the result

    @property
    def done_file(self) -> Path:
        return self.folder / "done.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.ckpt"

    def finished(self) -> dict[str, Any] | None:
        """The figures of a finished run, or None."""
        return json.loads(self.done_file.read_text()) if self.done_file.is_file() else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run against every other process; wait for one that holds it.

        The operating system lets go of the lock when a process dies, so a killed run blocks nobody.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_name(f".{self.folder.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("%s fold %d: another process is at it; waiting", self.stage, self.fold)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def begin(self, record: dict[str, Any], force: bool = False) -> None:
        """Make the folder and note what will run in it; with `force` an older run is moved aside first.

        Raises:
            UserError: the folder belongs to another configuration or was written by upstream products that
                are not the ones at hand.
        """
        if force and self.folder.exists():
            aside = self.folder.with_name(f"{self.folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            shutil.move(self.folder, aside)
            log.info("%s fold %d: starting over, the old run is kept in %s", self.stage, self.fold, aside)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "run.json"
        if note.is_file():
            before = json.loads(note.read_text())
            if before["upstream"] != record["upstream"] or before["key"] != self.key:
                raise UserError(
                    f"{self.folder} was begun as run {before['key']} on upstream {before['upstream']}, "
                    f"but this is run {self.key} on {record['upstream']}. Move that folder away or use "
                    "force=true."
                )
            return
        with replacing(note) as part:
            part.write_text(json.dumps({"key": self.key, **record}, indent=2))

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Mark the run as finished; from now on the same command skips it."""
        with replacing(self.done_file) as part:
            part.write_text(json.dumps(figures, indent=2))
        return figures

    def read_product(self, name: str) -> Path:
        """Path of a file that this run handed on.

        Raises:
            UserError: the run is not finished or the file is gone.
        """
        path = self.folder / name
        if self.finished() is None or not path.exists():
            raise UserError(
                f"{self.stage} fold {self.fold} (run {self.key}) has no {name} in {self.folder}. "
                f"Run stage={self.stage} first."
            )
        return path


def stage_key(cfg: DictConfig, stage: str, data_fingerprint: str) -> str:
    """Eight hexadecimal digits that name a configuration of a stage and of everything before it."""
    return _digest(
        {
            "settings": _settings(cfg, stage),
            "data": data_fingerprint,
            "upstream": {s: stage_key(cfg, s, data_fingerprint) for s in upstream(cfg, stage)},
        }
    )


def stage_run(cfg: DictConfig, stage: str, fold: int, data_fingerprint: str) -> StageRun:
    """Where fold `fold` of `stage` lives under this configuration."""
    key = stage_key(cfg, stage, data_fingerprint)
    folder = Path(cfg.paths.outputs) / cfg.experiment_name / stage / f"{_name(cfg, stage)}-{key}"
    return StageRun(stage, fold, folder / f"fold_{fold}", key)


def run_record(cfg: DictConfig, stage: str, data_fingerprint: str) -> dict[str, Any]:
    """What a run notes about itself: settings, upstream runs, versions."""
    return {
        "stage": stage,
        "settings": _settings(cfg, stage),
        "data": data_fingerprint,
        "upstream": {s: stage_key(cfg, s, data_fingerprint) for s in upstream(cfg, stage)},
        "versions": {
            "aneurysm": aneurysm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def fit(
    run: StageRun,
    module: LightningModule,
    data: LightningDataModule,
    epochs: int,
    cfg: DictConfig,
    name: str = "last",
) -> None:
    """Train to `epochs`, going on from the run's last checkpoint when there is one.

    Args:
        name: of the checkpoint file, for runs that fit two networks.
    """
    started = time.monotonic()
    seed_everything(cfg.seed * 1000 + run.fold, verbose=False)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    checkpoint = run.folder / f"{name}.ckpt"
    terminal = sys.stdout.isatty()
    bars = cfg.trainer.progress == "auto" and terminal
    callbacks: list[Callback] = [_LastCheckpoint(checkpoint)]
    if cfg.trainer.progress == "lines" or (cfg.trainer.progress == "auto" and not terminal):
        callbacks.append(_PlainProgress(run))
    loggers = _loggers(run, cfg, name)
    trainer = Trainer(
        default_root_dir=run.folder,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        precision=cfg.trainer.precision,
        max_epochs=epochs,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=bars,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        reload_dataloaders_every_n_epochs=1,  # data depend on (seed, epoch, index)
        gradient_clip_val=None if not module.automatic_optimization else 1.0,
    )
    resume = checkpoint if checkpoint.is_file() else None
    if resume:
        log.info("%s fold %d: going on from %s", run.stage, run.fold, resume)
    failed = True
    try:
        trainer.fit(module, data, ckpt_path=resume)
        failed = trainer.interrupted
    finally:
        _close(loggers, failed)
    if failed:
        raise KeyboardInterrupt
    module.eval()
    log.debug("%s fold %d trained in %.0f s", run.stage, run.fold, time.monotonic() - started)


class _LastCheckpoint(Callback):
    """Write the checkpoint at every epoch's end, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with replacing(self.path) as part:
            trainer.save_checkpoint(part, weights_only=False)  # with optimiser and schedule


class _PlainProgress(Callback):
    """A few lines per fit, for logs that are not terminals."""

    def __init__(self, run: StageRun) -> None:
        self.run, self.began = run, 0.0

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


def _loggers(run: StageRun, cfg: DictConfig, name: str) -> list[Logger]:
    metrics = run.folder / "metrics"
    attempt = len(list(metrics.glob(f"{name}_*"))) if metrics.is_dir() else 0
    made: list[Logger] = []
    for kind in cfg.logger.kinds:
        if kind == "csv":
            made.append(CSVLogger(run.folder, name="metrics", version=f"{name}_{attempt}"))
        elif kind == "wandb":
            # Imported only when asked for: it costs a second at start-up.
            from lightning.pytorch.loggers import WandbLogger

            made.append(
                WandbLogger(
                    name=f"fold_{run.fold}",
                    id=f"{run.key}-{run.stage}-{name}-fold{run.fold}",
                    group=run.folder.parent.name,
                    job_type=run.stage,
                    project=cfg.logger.project,
                    save_dir=run.folder,
                    mode=cfg.logger.mode,
                    resume="allow",
                    tags=[cfg.experiment_name, run.stage],
                    config=_settings(cfg, run.stage),
                )
            )
        else:
            raise UserError(f"logger.kinds knows csv and wandb, not {kind!r}.")
    return made


def _close(loggers: list[Any], failed: bool) -> None:
    for one in loggers:
        one.finalize("failed" if failed else "success")
        if type(one).__name__ == "WandbLogger":
            # Without this the next job of a sweep would log into this run.
            one.experiment.finish(exit_code=int(failed))


def pretrains(cfg: DictConfig) -> bool:
    """Whether the backbone is pretrained (`masking=none` says no)."""
    return not cfg.masking._target_.endswith(".absent")


def upstream(cfg: DictConfig, stage: str) -> tuple[str, ...]:
    """The stages whose products `stage` reads under this configuration."""
    return tuple(s for s in UPSTREAM[stage] if s != "pretrain" or pretrains(cfg))


def _settings(cfg: DictConfig, stage: str) -> dict[str, Any]:
    """The settings that change this stage's result, resolved to plain containers."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    chosen = {name: plain[name] for name in (*READS[stage], *_ALWAYS)}
    if stage == "segmenter":
        chosen["smart_net"] = {k: v for k, v in chosen["smart_net"].items() if k not in _GRAPH_KEYS}
    if stage == "smart_net":
        chosen["smart_net"] = {k: chosen["smart_net"][k] for k in _GRAPH_KEYS}
    chosen["precision"] = plain["trainer"]["precision"]
    return _without(chosen)


def _without(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without(v) for k, v in node.items() if k not in _NO_EFFECT}
    return [_without(v) for v in node] if isinstance(node, list) else node


def _name(cfg: DictConfig, stage: str) -> str:
    """A word or two that tell a person which variant this is."""

    def word(node: DictConfig) -> str:
        return node._target_.rsplit(".", 1)[-1].replace("absent", "none").lower()

    names = {
        "pretrain": lambda: word(cfg.masking),
        "vessel": lambda: f"{word(cfg.vessel.net)}-{word(cfg.loss)}",
        "segmenter": lambda: f"{word(cfg.smart_net.net)}-{word(cfg.loss)}",
        "smart_net": lambda: word(cfg.graph_net),
        "expert": lambda: "-".join(
            [word(cfg.oscillator) + str(cfg.oscillator_dim), word(cfg.physics), word(cfg.balance)]
        ),
        "stacker": lambda: "xgboost",
    }
    return names[stage]()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
