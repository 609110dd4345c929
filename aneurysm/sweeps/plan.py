"""The plan of a sweep: its command and its jobs, written when it starts and found again by the same command.

It lies in `outputs/<experiment>/sweeps/<id>/plan.json`; the id is a hash of the jobs, so neither the order of
the arguments nor the launcher changes it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing

# Arguments that say how to run and not what: the same sweep with and without them. `paths.outputs` is where
# the plan lies anyway.
_HOW = frozenset({"failed", "force", "paths.outputs", "trainer.progress", "upstream", "memory_gb"})


@dataclass(frozen=True)
class PlannedJob:
    """One job of a sweep."""

    id: str
    label: str  # what tells it from the other jobs, such as "oscillator_dim=2 fold=0"
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do."""

    folder: Path  # <experiment>/sweeps/<id>
    command: str
    began: str  # ISO 8601
    jobs: tuple[PlannedJob, ...]

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def experiment(self) -> Path:
        """Folder of the experiment."""
        return self.folder.parents[1]

    def job(self, overrides: Iterable[str]) -> PlannedJob:
        """The job with exactly these overrides, in any order; one that nobody planned is named after them."""
        wanted = sorted(overrides)
        for job in self.jobs:
            if sorted(job.overrides) == wanted:
                return job
        return planned_jobs([wanted])[0]


def planned_jobs(overrides: Sequence[Sequence[str]]) -> tuple[PlannedJob, ...]:
    """Name the jobs of a sweep; two that do the same are one.

    Args:
        overrides: `key=value` of every job.
    """
    swept = _swept(overrides)
    jobs: dict[str, PlannedJob] = {}
    for one in overrides:
        what = [o for o in one if _key(o) in swept or _key(o) not in _HOW]
        id = _digest(sorted(what))
        label = " ".join(sorted(o for o in one if _key(o) in swept)) or " ".join(what) or "as configured"
        jobs.setdefault(id, PlannedJob(id, label, tuple(one)))
    return tuple(jobs.values())


def open_plan(experiment: Path, command: str, overrides: Sequence[Sequence[str]]) -> Plan:
    """Write the plan of a sweep, or find the one that the same command wrote before.

    Args:
        experiment: folder of the experiment.
        overrides: of every job.
    """
    jobs = planned_jobs(overrides)
    folder = experiment.absolute() / "sweeps" / _digest(sorted(job.id for job in jobs))
    if (folder / "plan.json").is_file():
        before = read_plan(folder)
        # Labels and ids stay; the words of the overrides are this command's (failed=skip, force=true).
        return Plan(folder, before.command, before.began, jobs)
    plan = Plan(folder, command, datetime.now().astimezone().isoformat(timespec="seconds"), jobs)
    content = {
        "command": plan.command,
        "began": plan.began,
        "jobs": [{"id": j.id, "label": j.label, "overrides": list(j.overrides)} for j in jobs],
    }
    with replacing(folder / "plan.json") as part:
        part.write_text(json.dumps(content, indent=1))
    return plan


def read_plan(folder: Path) -> Plan:
    """Read a plan back.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "plan.json"
    try:
        content = json.loads(path.read_text())
        jobs = tuple(PlannedJob(j["id"], j["label"], tuple(j["overrides"])) for j in content["jobs"])
        return Plan(folder, content["command"], content["began"], jobs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): move it away, the command of the sweep writes it again."
        ) from error


def find_plans(experiment: Path) -> list[Plan]:
    """All sweeps of an experiment, oldest first."""
    plans = [read_plan(path.parent) for path in experiment.glob("sweeps/*/plan.json")]
    return sorted(plans, key=lambda plan: (plan.began, plan.id))


def _swept(overrides: Sequence[Sequence[str]]) -> set[str]:
    """Keys whose value is not the same in all jobs."""
    values: dict[str, set[str]] = {}
    for one in overrides:
        for o in one:
            values.setdefault(_key(o), set()).add(o)
    return {key for key, seen in values.items() if len(seen) > 1}


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _digest(content: list[str]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
