"""One fit in its run folder, going on from the last checkpoint when there is one."""

import copy
import logging
import sys
import time
import warnings

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from aneurysm.runs.checkpoints import LastCheckpoint
from aneurysm.runs.folders import StageRun
from aneurysm.runs.loggers import close_loggers, open_loggers
from aneurysm.runs.progress import PlainProgress
from aneurysm.runs.strategy import is_sharded, placement
from aneurysm.stages.processes import barrier, rank

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
    ".*`srun` command is available.*",
    "Grad strides do not match bucket view strides.*",
):
    warnings.filterwarnings("ignore", message=_message)


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
    whole = module
    if is_sharded(cfg.trainer):
        module = copy.deepcopy(whole)  # what has been sharded stays so
    seed_everything(cfg.seed * 1000 + run.fold, verbose=False)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    checkpoint = run.folder / f"{name}.ckpt"
    terminal = sys.stdout.isatty()
    bars = cfg.trainer.progress == "auto" and terminal and rank() == 0
    callbacks: list[Callback] = [LastCheckpoint(checkpoint)]
    if cfg.trainer.progress == "lines" or (cfg.trainer.progress == "auto" and not terminal):
        callbacks.append(PlainProgress(run))
    loggers = open_loggers(run, cfg, name) if rank() == 0 else []
    trainer = Trainer(
        default_root_dir=run.folder,
        **placement(cfg.trainer, module),
        precision=cfg.trainer.precision,
        max_epochs=epochs,
        logger=loggers or False,
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
        close_loggers(loggers, failed)
    if failed:
        raise KeyboardInterrupt
    if module is not whole:
        barrier()  # the first process has written the checkpoint, which holds the whole of it
        whole.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    whole.eval()
    log.debug("%s fold %d trained in %.0f s", run.stage, run.fold, time.monotonic() - started)


def seed_weights(seed: int, run: StageRun) -> None:
    """Initial weights depend on seed and fold only, not on what ran before in this process."""
    torch.manual_seed(seed * 1000 + run.fold)
