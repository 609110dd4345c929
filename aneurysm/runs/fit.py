"""One fit in its run folder, going on from the last checkpoint when there is one."""

import copy
import logging
import sys
import time
import warnings

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from aneurysm.runs.averaging import AveragedWeights
from aneurysm.runs.checkpoints import CheckpointFiles, Checkpoints, resume_from
from aneurysm.runs.compilation import compiling
from aneurysm.runs.epoch_means import EpochMeans
from aneurysm.runs.folders import StageRun
from aneurysm.runs.preemption import deferred
from aneurysm.runs.progress import PlainProgress, ProgressFile
from aneurysm.runs.record import log_of
from aneurysm.runs.settings import ema
from aneurysm.runs.step_seeds import StepSeeds
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
    ".*your dataloader is not resumable.*",  # a function of the epoch and of the batches done, draws.py
    "Grad strides do not match bucket view strides.*",
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
            written, or the network cannot be compiled here.
    """
    started = time.monotonic()
    whole = module
    if is_sharded(cfg.trainer):
        module = copy.deepcopy(whole)  # what has been sharded stays so
    seed_everything(cfg.seed * 1000 + run.fold, verbose=False)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    terminal = sys.stdout.isatty()
    bars = cfg.trainer.progress == "auto" and terminal and rank() == 0
    files = CheckpointFiles(run.folder)
    resume = resume_from(files, module)
    if resume:
        log.info("%s fold %d: going on from %s", run.stage, run.fold, resume)
    with deferred() as request, compiling(module, cfg.trainer.compile) as compiled:
        callbacks: list[Callback] = [
            *compiled,
            StepSeeds(cfg.seed, run.fold),
            EpochMeans(),
            Checkpoints(files, request, cfg.checkpoint.every_minutes, cfg.checkpoint.every_steps),
            ProgressFile(run),
        ]
        if (decay := ema(cfg, run.stage)) is not None and module.automatic_optimization:
            callbacks.append(AveragedWeights(decay))
        if cfg.trainer.progress == "lines" or (cfg.trainer.progress == "auto" and not terminal):
            callbacks.append(PlainProgress(run))
        trainer = Trainer(
            default_root_dir=run.folder,
            **placement(cfg.trainer, module, files),
            precision=cfg.trainer.precision,
            deterministic=cfg.trainer.deterministic,
            max_epochs=epochs,
            logger=log_of(run).loggers("last") if rank() == 0 else False,
            callbacks=callbacks,
            enable_progress_bar=bars,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            reload_dataloaders_every_n_epochs=1,  # data depend on (seed, epoch, index)
            gradient_clip_val=None if not module.automatic_optimization else 1.0,
        )
        try:
            trainer.fit(module, data, ckpt_path=resume)
        except SystemExit as leaving:  # what Lightning makes of Ctrl-C
            if isinstance(leaving.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    if module is not whole:
        barrier()  # the first process has written the checkpoint, which holds the whole of it
        whole.load_state_dict(torch.load(files.last, map_location="cpu", weights_only=True)["state_dict"])
    # Lightning hands networks back on the CPU; what follows looks at whole scans of the held-out patients.
    whole.to(trainer.strategy.root_device).eval()
    log.debug("%s fold %d trained in %.0f s", run.stage, run.fold, time.monotonic() - started)


def seed_weights(seed: int, run: StageRun) -> None:
    """Initial weights depend on seed and fold only, not on what ran before in this process."""
    torch.manual_seed(seed * 1000 + run.fold)
