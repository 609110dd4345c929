"""Where the figures of a fit are written."""

from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig

from aneurysm.data.errors import UserError
from aneurysm.runs.folders import StageRun
from aneurysm.runs.preemption import EXIT_CODE
from aneurysm.runs.settings import settings_of


def open_loggers(run: StageRun, cfg: DictConfig, name: str) -> list[Logger]:
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
                    config=settings_of(cfg, run.stage),
                )
            )
        else:
            raise UserError(f"logger.kinds knows csv and wandb, not {kind!r}.")
    return made


def close_loggers(loggers: list[Any], outcome: str) -> None:
    """Close what `open_loggers` opened.

    Args:
        outcome: success, failed or preempted.
    """
    for one in loggers:
        one.finalize(outcome)
        if type(one).__name__ == "WandbLogger":
            if outcome == "preempted":
                one.experiment.mark_preempting()
            # Without this the next job of a sweep would log into this run.
            codes = {"success": 0, "preempted": EXIT_CODE}
            one.experiment.finish(exit_code=codes.get(outcome, 1))
