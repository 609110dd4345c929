"""Which stages and folds a command runs, in which order, and what is skipped."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from aneurysm.data.errors import UserError
from aneurysm.experiment import Experiment
from aneurysm.runs.folders import StageRun
from aneurysm.runs.memory import PeakMemory
from aneurysm.runs.record import log_of, recorded
from aneurysm.runs.settings import upstream
from aneurysm.stages.processes import from_first, rank
from aneurysm.sweeps.jobs import uses_run
from aneurysm.training.expert import train_expert
from aneurysm.training.pretrain import train_pretrain
from aneurysm.training.segmenter import train_segmenter
from aneurysm.training.smart_net import train_smart_net
from aneurysm.training.stacker import train_stacker
from aneurysm.training.vessel import train_vessel

log = logging.getLogger(__name__)

STAGES: dict[str, Callable[[Experiment, StageRun], dict[str, Any]]] = {
    "pretrain": train_pretrain,
    "vessel": train_vessel,
    "segmenter": train_segmenter,
    "smart_net": train_smart_net,
    "expert": train_expert,
    "stacker": train_stacker,
}
# Stages without a gradient to share: the first process does them, the others wait.
ALONE = frozenset({"stacker"})


def run_stage(experiment: Experiment, stage: str) -> list[dict[str, Any]]:
    """Train a stage over the chosen folds, and what it needs of earlier stages, skipping what is finished.

    Raises:
        UserError: `upstream=require` and an earlier stage is not finished.
    """
    # The Smart Net's graph learns on out-of-fold segmentations: its segmenter is part of the stage.
    inside = ("segmenter",) if stage == "smart_net" else ()
    for part in _missing(experiment, stage):
        if experiment.cfg.upstream == "require" and part not in inside:
            command = "smart_net" if part == "segmenter" else part
            raise UserError(
                f"stage={stage} reads {part}, which is not finished for this configuration. "
                f"Run `python train.py stage={command}` with the same settings, or upstream=run."
            )
    figures = []
    for part in _order(experiment, stage):
        # A stage reads every fold of what comes before it; only the asked-for stage itself can run one fold.
        folds = experiment.chosen_folds if part == stage else experiment.folds
        results = [_run_fold(experiment, part, fold, asked_for=part in (stage, *inside)) for fold in folds]
        if part == stage:
            figures = results
    return figures


def _order(experiment: Experiment, stage: str) -> list[str]:
    """The stages to run, earliest first, ending in `stage`."""
    order: list[str] = []

    def visit(name: str) -> None:
        for before in upstream(experiment.cfg, name):
            visit(before)
        if name not in order:
            order.append(name)

    visit(stage)
    return order


def _missing(experiment: Experiment, stage: str) -> list[str]:
    earlier = [s for s in _order(experiment, stage) if s != stage]
    return from_first(
        lambda: [s for s in earlier if any(experiment.run(s, k).finished() is None for k in experiment.folds)]
    )


def _run_fold(experiment: Experiment, stage: str, fold: int, asked_for: bool) -> dict[str, Any]:
    run = experiment.run(stage, fold)
    done = from_first(run.finished)
    force = asked_for and bool(experiment.cfg.force)
    if done is not None and not force:
        level = logging.INFO if asked_for else logging.DEBUG
        log.log(level, "%-9s fold %d  is finished, skipped (%s)", stage, fold, run.folder)
        uses_run(run.folder, trains=False)
        return done
    with run.alone() if rank() == 0 else nullcontext():
        # Two jobs of a sweep may both need what neither has: the second waits and then finds it finished.
        if (done := from_first(run.finished)) is not None and not force:
            uses_run(run.folder, trains=False)
            return done
        begun = from_first(lambda: _begun(experiment, stage, fold, force))
        uses_run(run.folder, trains=True)
        started = time.monotonic()
        train = STAGES[stage]
        with recorded(begun, experiment.cfg) as run:
            try:
                with PeakMemory() as memory:
                    figures = (
                        from_first(lambda: train(experiment, run))
                        if stage in ALONE
                        else train(experiment, run)
                    )
            except Exception as error:
                if rank() == 0:
                    run.fail(error, experiment.cfg)
                raise
            figures |= {"seconds": round(time.monotonic() - started, 1), **memory.figures()}
            log_of(run).summary(figures)
        shown = "  ".join(
            f"{k} {v:.3f}" for k, v in figures.items() if isinstance(v, float) and k != "seconds"
        )
        log.info("%-9s fold %d  done in %.0f s  %s", stage, fold, figures["seconds"], shown)
        return from_first(lambda: run.finish(figures))


def _begun(experiment: Experiment, stage: str, fold: int, force: bool) -> StageRun:
    run = experiment.run(stage, fold)
    if experiment.cfg.failed == "skip" and (failure := run.failure()) is not None:
        raise UserError(
            f"{stage} fold {fold} failed before ({failure['error']}) and failed=skip leaves it so; "
            "failed=retry tries again."
        )
    return experiment.begin(stage, fold, force)
