"""One fit in its run folder, going on from the last checkpoint when there is one."""

import logging
import sys
import time
import warnings

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from aneurysm.runs.averaging import AveragedWeights
from aneurysm.runs.checkpoints import CheckpointFiles, Checkpoints, resume_from
from aneurysm.runs.epoch_means import EpochMeans
from aneurysm.runs.folders import StageRun
from aneurysm.runs.loggers import close_loggers, open_loggers
from aneurysm.runs.preemption import Preempted, deferred
from aneurysm.runs.progress import PlainProgress
from aneurysm.runs.step_seeds import StepSeeds

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
    ".*your dataloader is not resumable.*",  # a function of the epoch and of the batches done, draws.py
):
    warnings.filterwarnings("ignore", message=_message)


def fit(
    run: StageRun,
    module: LightningModule,
    data: LightningDataModule,
    epochs: int,
    cfg: DictConfig,
) -> None:
    """Train to `epochs`, going on from the run's newest undamaged checkpoint when there is one.

    The weights at the end are those of an undisturbed training, bit by bit on a CPU, whenever and however
    often it was killed: data and random numbers are functions of (seed, epoch, step), everything else is in
    the checkpoint.

    Raises:
        Preempted: SIGTERM asked this process to leave; a checkpoint is written.
        UserError: no checkpoint is undamaged, or it belongs to another network, or the last one could not be
            written.
    """
    started = time.monotonic()
    seed_everything(cfg.seed * 1000 + run.fold, verbose=False)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    terminal = sys.stdout.isatty()
    bars = cfg.trainer.progress == "auto" and terminal
    files = CheckpointFiles(run.folder)
    resume = resume_from(files, module)
    if resume:
        log.info("%s fold %d: going on from %s", run.stage, run.fold, resume)
    loggers = open_loggers(run, cfg, "last")
    with deferred() as request:
        callbacks: list[Callback] = [
            StepSeeds(cfg.seed, run.fold),
            EpochMeans(),
            Checkpoints(files, request, cfg.checkpoint.every_minutes, cfg.checkpoint.every_steps),
        ]
        if cfg.ema is not None and module.automatic_optimization:
            callbacks.append(AveragedWeights(float(cfg.ema)))
        if cfg.trainer.progress == "lines" or (cfg.trainer.progress == "auto" and not terminal):
            callbacks.append(PlainProgress(run))
        trainer = Trainer(
            default_root_dir=run.folder,
            accelerator=cfg.trainer.accelerator,
            devices=cfg.trainer.devices,
            precision=cfg.trainer.precision,
            max_epochs=epochs,
            logger=loggers,
            callbacks=callbacks,
            plugins=[files, *_cluster()],
            enable_progress_bar=bars,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            reload_dataloaders_every_n_epochs=1,  # data depend on (seed, epoch, index)
            use_distributed_sampler=False,  # the draws are dealt to the processes already
            gradient_clip_val=None if not module.automatic_optimization else 1.0,
        )
        outcome = "failed"
        try:
            trainer.fit(module, data, ckpt_path=resume)
            outcome = "success"
        except Preempted:
            outcome = "preempted"
            raise
        except SystemExit as leaving:  # what Lightning makes of Ctrl-C
            if isinstance(leaving.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        finally:
            close_loggers(loggers, outcome)
    module.eval()
    log.debug("%s fold %d trained in %.0f s", run.stage, run.fold, time.monotonic() - started)


def _cluster() -> list[SLURMEnvironment]:
    """Under SLURM: the environment that Lightning would find itself, without its own way of requeueing."""
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []


def seed_weights(seed: int, run: StageRun) -> None:
    """Initial weights depend on seed and fold only, not on what ran before in this process."""
    torch.manual_seed(seed * 1000 + run.fold)
