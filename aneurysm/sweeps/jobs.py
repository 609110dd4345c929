"""What became of every job of a sweep, one small file each, written by whoever runs the job.

`jobs/<id>.json` is replaced in one step whenever something changes, and a lock beside it is held as long as
the job runs. The process may be a launcher's worker on another host: all it needs is the folder.
"""

import json
import logging
import math
import os
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.sweeps.locks import is_held
from aneurysm.sweeps.marks import data_mark, settings_mark
from aneurysm.sweeps.plan import Plan, PlannedJob, read_plan

log = logging.getLogger(__name__)

_current: ContextVar["Job | None"] = ContextVar("current job of a sweep", default=None)
# Tells the processes that a job starts, to train together, whose work they do.
_PLACE = "ANEURYSM_SWEEP_JOB"


@dataclass(frozen=True)
class Record:
    """What is known of a job."""

    id: str
    label: str
    overrides: list[str]
    state: str  # running, done, failed, interrupted; `look` tells running from killed
    host: str = ""
    pid: int = 0
    began: str = ""  # ISO 8601, of the last attempt
    ended: str | None = None
    seconds: float | None = None  # of the last attempt
    attempts: int = 0
    score: float | None = None
    runs: list[str] = field(default_factory=list)  # run folders it needed, relative to the experiment
    trained: list[str] = field(default_factory=list)  # those of them that the last attempt worked on
    error: str | None = None  # one line
    traceback: str | None = None
    config: dict[str, Any] | None = None  # resolved, of a job that failed
    settings_mark: str = ""
    data_mark: str = ""


class Job:
    """One job of a sweep in the process that runs it."""

    def __init__(self, plan: Plan, planned: PlannedJob) -> None:
        self.plan, self.planned = plan, planned
        self.record = read_record(plan, planned) or Record(
            planned.id, planned.label, list(planned.overrides), state="new"
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the job against every other process; wait for one that runs it."""
        path = lock_path(self.plan, self.planned.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("%s: another process runs this job; waiting", self.planned.label)
            lock.acquire()
        try:
            # What another process wrote before it let go.
            self.record = read_record(self.plan, self.planned) or self.record
            yield
        finally:
            lock.release()

    def is_done(self, settings: dict[str, Any]) -> bool:
        """Whether the job is finished, with these settings, on these data, and its run folders are there."""
        record = self.record
        return (
            record.state == "done"
            and record.settings_mark == settings_mark(settings)
            and record.data_mark == data_mark(settings, self.plan.experiment)
            and all((self.plan.experiment / run / "done.json").is_file() for run in record.runs)
        )

    @contextmanager
    def running(self, settings: dict[str, Any]) -> Iterator[None]:
        """Note that the job runs; a job that is left by an exception is noted as failed or interrupted."""
        fresh = Record(self.planned.id, self.planned.label, list(self.planned.overrides), "running")
        self._save(
            replace(
                fresh,
                host=socket.gethostname(),
                pid=os.getpid(),
                began=_now(),
                attempts=self.record.attempts + 1,
                settings_mark=settings_mark(settings),
            )
        )
        started, token = time.monotonic(), _current.set(self)
        os.environ[_PLACE] = json.dumps([str(self.plan.folder), self.planned.id])

        def end(state: str, **more: Any) -> None:
            self._write(state=state, ended=_now(), seconds=round(time.monotonic() - started, 1), **more)

        try:
            yield
            end("done", data_mark=data_mark(settings, self.plan.experiment))
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            end("failed", error=error_line(error), traceback=trace, config=settings)
            raise
        except BaseException as error:  # Ctrl-C, or the cluster wants the node back
            end("interrupted", error=error_line(error))
            raise
        finally:
            _current.reset(token)
            os.environ.pop(_PLACE, None)

    def scored(self, score: float) -> None:
        """Note the figure by which the sweep compares its jobs."""
        self._write(score=None if math.isnan(score) else score)

    def uses(self, folder: Path, trains: bool) -> None:
        """Note a run folder that the job needs, and whether it works on it itself."""
        name = _inside(folder, self.plan.experiment)
        runs = self.record.runs if name in self.record.runs else [*self.record.runs, name]
        trained = [*self.record.trained, name] if trains else self.record.trained
        self._write(runs=runs, trained=trained)

    def _write(self, **changes: Any) -> None:
        # The run folders may have been noted by a process that trains for this one.
        now = read_record(self.plan, self.planned) or self.record
        self._save(replace(now, **changes))

    def _save(self, record: Record) -> None:
        self.record = record
        with replacing(record_path(self.plan, self.planned.id)) as part:
            part.write_text(json.dumps(asdict(record), indent=1, default=str))


def current_job() -> Job | None:
    """The job of a sweep that this process does, or that the process which started it does."""
    job = _current.get()
    place = os.environ.get(_PLACE)
    if job is None and place is not None:
        folder, id = json.loads(place)
        plan = read_plan(Path(folder))
        job = next((Job(plan, planned) for planned in plan.jobs if planned.id == id), None)
    return job


def uses_run(folder: Path, trains: bool) -> None:
    """Tell the sweep's record which run folder its job needs; outside a sweep nothing happens."""
    if is_first_process() and (job := current_job()) is not None:
        job.uses(folder, trains)


def is_first_process() -> bool:
    """Whether this is the process that speaks for those that train together; asked before they have met."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return not several or os.environ.get("SLURM_PROCID", "0") == "0"


def command_line() -> str:
    """The command that does again what this process does: the job of the sweep, or the whole command."""
    job = current_job()
    arguments = list(job.planned.overrides) if job is not None else sys.argv[1:]
    called = program_of(job.plan.command) if job is not None else None
    name = sys.argv[0]
    return shlex.join([*(called or (["python", name] if name.endswith(".py") else [name])), *arguments])


def program_of(command: str) -> list[str]:
    """The words of a command before its arguments, such as `python train.py`."""
    words = shlex.split(command)
    for n, word in enumerate(words):
        if n and (word.startswith("-") or "=" in word):
            return words[:n]
    return words


def read_record(plan: Plan, job: PlannedJob) -> Record | None:
    """What is known of a job, or None when it never began."""
    try:
        content = json.loads(record_path(plan, job.id).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("The record of job %s is damaged and starts anew.", job.label)
        return None
    return Record(**{k: v for k, v in content.items() if k in Record.__dataclass_fields__})


def look(plan: Plan, job: PlannedJob) -> tuple[Record | None, str]:
    """What is known of a job and its state: to do, running, done, failed, interrupted or killed."""
    record = read_record(plan, job)
    if record is None:
        return None, "to do"
    if record.state == "running" and not is_held(lock_path(plan, job.id)):
        record = read_record(plan, job) or record  # it may have ended between the two looks
        return record, "killed" if record.state == "running" else record.state
    return record, record.state


def record_path(plan: Plan, id: str) -> Path:
    """Where the record of a job lies."""
    return plan.folder / "jobs" / f"{id}.json"


def lock_path(plan: Plan, id: str) -> Path:
    """The lock that is held while a job runs."""
    return plan.folder / "jobs" / f".{id}.lock"


def error_line(error: BaseException) -> str:
    """An error in one line: what a user error says, or the kind and the first line of any other."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


def _inside(folder: Path, experiment: Path) -> str:
    absolute = folder.absolute()
    return str(absolute.relative_to(experiment)) if absolute.is_relative_to(experiment) else str(absolute)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
