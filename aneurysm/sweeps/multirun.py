"""A multirun command: its plan, its jobs one by one wherever a launcher runs them, and its end."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from aneurysm.sweeps.expand import expand
from aneurysm.sweeps.jobs import Job, command_line, is_first_process, look
from aneurysm.sweeps.overview import sweep_status
from aneurysm.sweeps.plan import Plan, open_plan
from aneurysm.sweeps.tables import failures_table, print_table

log = logging.getLogger(__name__)


def begin(config_folder: Path, config_name: str, arguments: list[str]) -> Plan:
    """Write the plan of a multirun command, or find the one it wrote before.

    Args:
        arguments: overrides of the command line.

    Raises:
        UserError: the sweep has no fixed list of jobs.
    """
    asked = expand(config_folder, config_name, arguments)
    plan = open_plan(asked.experiment, command_line(), asked.overrides)
    status = sweep_status(plan)
    log.info("Sweep of %d jobs, %d of them done (%s)", len(plan.jobs), status.count("done"), plan.folder)
    return plan


def run_job(
    plan: Plan,
    run: Callable[[DictConfig], float],
    cfg: DictConfig,
    overrides: Sequence[str],
    died: Mapping[str, int],
) -> float:
    """Run one job of a sweep and record what becomes of it; a finished one is only named.

    Args:
        overrides: of this job, as Hydra gave them to the launcher.
        died: how often the process of a job died since the command began; after twice it is left alone.

    Returns:
        The job's figure; NaN where it has none.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    job = Job(plan, plan.job(overrides))
    first = is_first_process()  # of several that train together; only it holds the job and writes
    with job.alone() if first else nullcontext():
        if (reason := _why_not(job, settings, died)) is not None:
            if first:
                log.info("%s  %s", job.planned.label, reason)
            return math.nan if job.record.score is None else job.record.score
        if not first:
            return float(run(cfg))
        log.info("%s", job.planned.label)
        with job.running(settings):
            score = float(run(cfg))
            job.scored(score)
        return score


def _why_not(job: Job, settings: dict[str, Any], died: Mapping[str, int]) -> str | None:
    """Why a job is not run now, or None."""
    if not settings["force"] and job.is_done(settings):
        return "is finished, skipped"
    if settings["failed"] == "skip" and job.record.state == "failed":
        return f"failed before and is skipped (failed=skip): {job.record.error}"
    if died.get(job.planned.id, 0) > 1:
        return "is left: its process died twice"
    return None


def goes_on(plan: Plan, arguments: Sequence[str], died: Counter[str]) -> bool:
    """Whether the command should launch its jobs again, because one took a worker down.

    joblib gives up all jobs when a process dies (killed for its memory, a crash in a library). They are
    launched again; finished ones are skipped, and those that were under way in two such deaths are left.
    The other launchers do not need this: their jobs do not share processes.
    """
    if "hydra/launcher=joblib" not in arguments:
        return False
    killed = [job for job in plan.jobs if look(plan, job)[1] == "killed"]
    died.update(job.id for job in killed)
    if killed:
        log.warning("A worker died while these ran; going on: %s", ", ".join(job.label for job in killed))
    return bool(killed)


def conclude(plan: Plan) -> bool:
    """Say how a sweep ended; whether all its jobs are done."""
    status = sweep_status(plan)
    done = status.count("done")
    if not is_first_process():
        return done == len(status.jobs)
    log.info("Sweep: %d of %d jobs done", done, len(status.jobs))
    if done == len(status.jobs):
        return True
    print_table(failures_table(status.unfinished()))
    log.info("The same command tries them again; what is finished is kept.")
    return False
