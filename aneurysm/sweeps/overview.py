"""What the folders of an experiment say: every sweep and run, how far it is, how long it takes yet."""

import json
import re
import shlex
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from aneurysm.data.errors import UserError
from aneurysm.sweeps.jobs import Record, look, program_of
from aneurysm.sweeps.locks import is_held
from aneurysm.sweeps.plan import Plan, PlannedJob, find_plans

_FOLD = re.compile(r"fold_\d+$")  # not fold_0.before-..., which force=true keeps aside


@dataclass(frozen=True)
class Progress:
    """How far a fit is; `runs/progress.py` writes it."""

    stage: str
    fold: int
    epoch: int  # counted from 1
    epochs: int
    step: int
    steps: int | None  # per epoch; None where the loader does not know its length
    seconds_per_step: float
    seconds_left: float | None  # of this fit
    updated: float  # Unix time
    command: str = ""

    @property
    def text(self) -> str:
        return (
            f"{self.stage} fold {self.fold}, epoch {self.epoch}/{self.epochs}, step {self.step}/{self.steps}"
        )


@dataclass(frozen=True)
class JobStatus:
    """One job of a sweep, or one run folder, as it stands."""

    label: str
    state: str  # to do, running, done, failed, interrupted, killed
    stage: str
    command: str  # that does it again
    seconds: float | None = None  # of the last attempt
    seconds_left: float | None = None  # while it runs; at least this long where nothing like it is finished
    attempts: int = 0
    score: float | None = None
    host: str = ""
    progress: Progress | None = None
    error: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class Group:
    """Jobs that belong together: a sweep, or the folds of one variant of a stage."""

    name: str
    command: str
    jobs: tuple[JobStatus, ...]

    def count(self, state: str) -> int:
        return sum(job.state == state for job in self.jobs)

    @property
    def states(self) -> Counter[str]:
        return Counter(job.state for job in self.jobs)

    def unfinished(self) -> list[JobStatus]:
        return [job for job in self.jobs if job.state != "done"]

    @property
    def seconds_left(self) -> float | None:
        """Until all is done with as many jobs at a time as run now; None when nothing tells."""
        waiting = [job for job in self.jobs if job.state in ("to do", "killed", "interrupted")]
        running = [job for job in self.jobs if job.state == "running"]
        if not waiting and not running:
            return 0.0
        work = 0.0
        for job in (*waiting, *running):
            usual = _usual(self.jobs, job.stage)
            left = job.seconds_left if job.state == "running" else usual
            if left is None:
                return None
            work += left
        return work / max(1, len(running))


@dataclass(frozen=True)
class ExperimentStatus:
    """Everything in one experiment."""

    folder: Path
    sweeps: tuple[Group, ...]
    runs: tuple[Group, ...]

    @property
    def failed(self) -> list[JobStatus]:
        """What failed: jobs of sweeps, and runs whose failure is not that of a job."""
        jobs = [job for group in self.sweeps for job in group.jobs if job.state == "failed"]
        told = {job.error for job in jobs}
        runs = [replace(j, label=f"{group.name}/{j.label}") for group in self.runs for j in group.jobs]
        return jobs + [job for job in runs if job.state == "failed" and job.error not in told]


def experiments(path: Path) -> list[Path]:
    """The experiment at a path, or all of those in a folder of experiments.

    Raises:
        UserError: nothing there was ever trained.
    """
    if not path.is_dir():
        near = sorted(str(p.parent) for p in path.parent.glob("*/sweeps")) if path.parent.is_dir() else []
        hint = f" Experiments nearby: {', '.join(near)}." if near else ""
        raise UserError(f"There is no folder {path}.{hint}")
    found = [p for p in (path, *sorted(p for p in path.iterdir() if p.is_dir())) if _is_experiment(p)]
    if not found:
        raise UserError(
            f"{path} is no experiment: it has neither sweeps nor runs (outputs/<experiment_name>)."
        )
    return found[:1] if found[0] == path else found


def experiment_status(folder: Path) -> ExperimentStatus:
    """Look at an experiment; takes nothing that a running process needs."""
    sweeps = tuple(sweep_status(plan) for plan in find_plans(folder))
    variants: dict[Path, list[Path]] = {}
    for note in sorted(folder.glob("*/*/fold_*/run.json")):
        if _FOLD.fullmatch(note.parent.name):
            variants.setdefault(note.parents[1], []).append(note.parent)
    runs = tuple(_variant(folder, variant, folds) for variant, folds in variants.items())
    return ExperimentStatus(folder, sweeps, runs)


def sweep_status(plan: Plan) -> Group:
    """Look at a sweep."""
    seen = [(job, *look(plan, job)) for job in plan.jobs]
    jobs = [_job(plan, *one) for one in seen]
    # A job that found all its runs finished says nothing about how long jobs take.
    timed = tuple(
        job for job, (_, record, _) in zip(jobs, seen, strict=True) if record is not None and record.trained
    )
    return Group(plan.id, plan.command, tuple(_with_time_left(job, timed) for job in jobs))


def _job(plan: Plan, job: PlannedJob, record: Record | None, state: str) -> JobStatus:
    stage = next((o.split("=", 1)[1] for o in job.overrides if o.startswith("stage=")), "all")
    command = shlex.join([*program_of(plan.command), *job.overrides])
    if record is None:
        return JobStatus(job.label, state, stage, command)
    progress = None
    if state in ("running", "killed", "interrupted") and record.trained:
        progress = read_progress(plan.experiment / record.trained[-1])
    seconds = record.seconds
    if state == "running":
        seconds = time.time() - datetime.fromisoformat(record.began).timestamp()
    return JobStatus(
        job.label,
        state,
        stage,
        command,
        seconds=seconds if record.trained or state == "running" else None,
        attempts=record.attempts,
        score=record.score,
        host=record.host,
        progress=progress,
        error=record.error,
        traceback=record.traceback,
    )


def _with_time_left(job: JobStatus, others: tuple[JobStatus, ...]) -> JobStatus:
    if job.state != "running":
        return job
    usual = _usual(others, job.stage)
    left = [job.progress.seconds_left] if job.progress and job.progress.seconds_left is not None else []
    if usual is not None:
        left.append(usual - (job.seconds or 0.0))
    return replace(job, seconds_left=max(0.0, *left) if left else None)


def _usual(jobs: tuple[JobStatus, ...], stage: str) -> float | None:
    """What finished jobs of a stage took, typically."""
    took = [j.seconds for j in jobs if j.state == "done" and j.stage == stage and j.seconds is not None]
    return median(took) if took else None


def _variant(experiment: Path, variant: Path, folds: list[Path]) -> Group:
    stage = variant.parent.name
    jobs = tuple(_run(stage, folder) for folder in folds)
    return Group(str(variant.relative_to(experiment)), "", tuple(_with_time_left(j, jobs) for j in jobs))


def _run(stage: str, folder: Path) -> JobStatus:
    done, failure = _json(folder / "done.json"), _json(folder / "failed.json")
    running = is_held(folder.with_name(f".{folder.name}.lock"))
    if done is not None and not running:
        return JobStatus(folder.name, "done", stage, "", seconds=done.get("seconds"))
    progress = read_progress(folder)
    command = progress.command if progress else ""
    if running:
        return JobStatus(folder.name, "running", stage, command, progress=progress)
    if failure is not None:
        return JobStatus(
            folder.name,
            "failed",
            stage,
            str(failure.get("command", command)),
            attempts=int(failure.get("attempt", 1)),
            error=failure.get("error"),
            traceback=failure.get("traceback"),
        )
    return JobStatus(folder.name, "killed", stage, command, progress=progress)


def read_progress(folder: Path) -> Progress | None:
    """How far the fit in a run folder is, or was when it ended."""
    content = _json(folder / "progress.json")
    if content is None:
        return None
    try:
        return Progress(**{k: v for k, v in content.items() if k in Progress.__dataclass_fields__})
    except TypeError:
        return None  # of another version


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_experiment(folder: Path) -> bool:
    found = (*folder.glob("sweeps/*/plan.json"), *folder.glob("*/*/fold_*/run.json"))
    return bool(found)
