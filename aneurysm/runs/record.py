"""What is recorded about one fold of a stage, from its beginning to its end, whichever loggers are chosen.

The local files are the source of truth and are always written: `metrics.jsonl`, and figures and tables in
`figures/`. TensorBoard and W&B get the same. A finished fold opens no record: it is skipped before.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from omegaconf import DictConfig

from aneurysm.data.files import replacing
from aneurysm.report.style import write_png
from aneurysm.runs.folders import StageRun
from aneurysm.runs.loggers import (
    TensorBoardMetrics,
    WandbMetrics,
    open_wandb,
    require_tensorboard,
    staging_in,
)
from aneurysm.runs.metrics import FILE, CsvTable, JsonLines
from aneurysm.stages.processes import rank

log = logging.getLogger(__name__)

KINDS = ("csv", "tensorboard", "wandb")
INTERRUPTED = 130  # exit code of a command that was stopped by Ctrl-C
_offline: set[Path] = set()  # experiments with runs that wait for `wandb sync`


@dataclass(frozen=True, eq=False)
class RunLog:
    """Where the metrics, figures and tables of a fold go; on all processes but the first, nowhere."""

    folder: Path  # of the run
    kinds: tuple[str, ...] = ()  # of KINDS, beside the local files
    figures: int = 0  # how many scans, crops or candidates a stage draws; 0 none
    wandb_run: Any = None  # open, or None
    main: bool = True  # False on all processes of a training but the first

    def loggers(self, fit: str) -> list[Logger]:
        """What a Trainer logs one fit to."""
        made: list[Logger] = [JsonLines(self.folder / FILE, fit)]
        if "csv" in self.kinds:
            made.append(CsvTable(self.folder / FILE))
        if "tensorboard" in self.kinds:
            made.append(TensorBoardMetrics(self.folder, fit))
        if self.wandb_run is not None:
            made.append(WandbMetrics(self.wandb_run, fit))
        return made

    def figure(self, name: str, figure: Figure, caption: str = "") -> Path:
        """Keep a figure as `figures/<name>.png`, and show it in TensorBoard and W&B."""
        path = self.folder / "figures" / f"{name}.png"
        write_png(figure, path, dpi=100)
        if "tensorboard" in self.kinds:
            self._tensorboard_image(f"figures/{name}", path)
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({f"figures/{name}": wandb.Image(str(path), caption=caption or None)})
        return path

    def table(self, name: str, table: pd.DataFrame) -> Path:
        """Keep a table as `figures/<name>.csv`, and show it in W&B."""
        path = self.folder / "figures" / f"{name}.csv"
        with replacing(path) as part:
            table.to_csv(part, index=False)
        if self.wandb_run is not None:
            import wandb

            with staging_in(self.folder / "wandb"):
                self.wandb_run.log({f"tables/{name}": wandb.Table(dataframe=table.reset_index(drop=True))})
        return path

    def summary(self, figures: dict[str, Any]) -> None:
        """The figures of done.json, as the final ones of the run at W&B."""
        if self.wandb_run is not None:
            self.wandb_run.summary.update({k: v for k, v in figures.items() if v is not None})

    def close(self, exit_code: int) -> None:
        """End the W&B run, so that the next job of this process gets its own."""
        if self.wandb_run is None:
            return
        try:
            if exit_code not in (0, 1):
                self.wandb_run.mark_preempting()  # it will go on: not failed
            self.wandb_run.finish(exit_code=exit_code)
        except Exception as error:  # the training is done or failed already; its record is on disk
            log.warning(
                "W&B did not end cleanly (%s); its files in %s are kept.", error, self.folder / "wandb"
            )

    def _tensorboard_image(self, name: str, path: Path) -> None:
        from matplotlib.image import imread
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / "tensorboard" / "figures")) as writer:
            pixels = (imread(path)[..., :3] * 255).round().astype(np.uint8)
            writer.add_image(name, pixels, dataformats="HWC")


def open_log(run: StageRun, cfg: DictConfig) -> RunLog:
    """Open what `cfg.logger` names for a run that is about to train.

    Raises:
        UserError: a package is missing, or W&B cannot be used as configured.
    """
    kinds = tuple(kind for kind in KINDS if kind in cfg.logger)
    if "tensorboard" in kinds:
        require_tensorboard()
    if rank() or rank_zero_only.rank:
        return RunLog(run.folder, main=False)
    opened = open_wandb(run, cfg) if "wandb" in kinds else None
    if opened is not None and opened.offline:
        _offline.add(run.folder.parents[2])
    return RunLog(run.folder, kinds, int(cfg.logger.figures), opened)


@contextmanager
def recorded(run: StageRun, cfg: DictConfig) -> Iterator[StageRun]:
    """The run with its log open; the log is closed with the exit code that fits how the block ends.

    0: the block ended. 1: it failed. Anything else: it was told to stop and will go on, such as 75 after a
    preemption.
    """
    opened = open_log(run, cfg)
    code = 1
    try:
        yield replace(run, log=opened)
        code = 0
    except SystemExit as error:
        stopped = isinstance(error.__context__, KeyboardInterrupt)  # Lightning turns one into the other
        code = INTERRUPTED if stopped else error.code if isinstance(error.code, int) else 1
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        opened.close(code)


def log_of(run: StageRun) -> RunLog:
    """The open log of a run, or one with the local files only."""
    return run.log or RunLog(run.folder)


def illustrate(run: StageRun, draw: Callable[[RunLog], None]) -> None:
    """Let `draw` add figures and tables to the run's log, unless `logger.figures=0`.

    A figure that cannot be drawn costs a warning, never the training that it shows.
    """
    opened = log_of(run)
    if not opened.main or opened.figures < 1:
        return
    try:
        draw(opened)
    except Exception as error:
        log.warning(
            "%s fold %d: a figure could not be drawn (%r).", run.stage, run.fold, error, exc_info=True
        )


def mention_offline_runs() -> None:
    """Say once per process and experiment how the W&B runs that were recorded offline are uploaded."""
    for folder in sorted(_offline):
        runs = folder / "*" / "*" / "fold_*" / "wandb"
        log.info("W&B runs are recorded offline; to upload them: wandb sync %s", runs)
    _offline.clear()
