"""Sweeps and runs as tables: for a terminal in colour, for a log in plain lines."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aneurysm.data.preparation.progress import duration
from aneurysm.sweeps.overview import ExperimentStatus, Group, JobStatus

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "failed": "bold red",
    "killed": "yellow",
    "interrupted": "yellow",
    "to do": "dim",
}
_LOG_WIDTH = 160  # columns where no terminal says how wide it is


def print_status(status: ExperimentStatus, failed_only: bool = False) -> None:
    """Print an experiment: its sweeps job by job, its runs by stage, and what failed with the way out."""
    console = _console()
    if not failed_only:
        for sweep in status.sweeps:
            console.print(_sweep_table(sweep))
            console.print(f"{_counts(sweep)}{_left(sweep)}", markup=False)
            console.print(f"same sweep again: {sweep.command}\n", markup=False, soft_wrap=True)
        if status.runs:
            console.print(_runs_table(status))
    for job in status.failed:
        console.print(Text(f"failed: {job.label} ({job.stage})", style="bold red"))
        console.print(f"  {job.error}", markup=False, soft_wrap=True)
        if failed_only and job.traceback:
            console.print(job.traceback, markup=False, highlight=False, soft_wrap=True)
        if job.command:
            console.print(f"  again: {job.command}", markup=False, soft_wrap=True)


def failures_table(jobs: list[JobStatus]) -> Table:
    """Jobs that are not done, with the reason."""
    table = Table("job", "state", "attempts", "why", title="Not done")
    for job in jobs:
        table.add_row(Text(job.label), _state(job), str(job.attempts or ""), Text(job.error or ""))
    return table


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, or as a log can take."""
    _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_LOG_WIDTH)


def _sweep_table(sweep: Group) -> Table:
    table = Table("job", "state", "time", "left", "figure", "tries", "", title=f"Sweep {sweep.name}")
    for job in sweep.jobs:
        table.add_row(
            Text(job.label),
            _state(job),
            "" if job.seconds is None else duration(job.seconds),
            "" if job.seconds_left is None else duration(job.seconds_left),
            "" if job.score is None else f"{job.score:.4g}",
            str(job.attempts or ""),
            Text(_note(job)),
        )
    return table


def _runs_table(status: ExperimentStatus) -> Table:
    table = Table("run", "folds done", "not done", title=f"Runs in {status.folder}")
    for group in status.runs:
        others = Text("\n").join(
            Text.assemble(job.label, " ", _state(job), " ", _note(job)) for job in group.unfinished()
        )
        table.add_row(Text(group.name), str(group.count("done")), others)
    return table


def _state(job: JobStatus) -> Text:
    return Text(job.state, style=_COLOURS.get(job.state, ""))


def _note(job: JobStatus) -> str:
    if job.state == "failed":
        return job.error or ""
    if job.progress is not None and job.state != "done":
        left = job.progress.seconds_left if job.state == "running" else None
        return job.progress.text + ("" if left is None else f", fit has {duration(left)} left")
    return f"on {job.host}" if job.state == "running" and job.host else ""


def _counts(sweep: Group) -> str:
    states = sweep.states
    return ", ".join(f"{states[s]} {s}" for s in _COLOURS if states[s])


def _left(sweep: Group) -> str:
    left = sweep.seconds_left
    if left == 0:
        return ""
    at_once = max(1, sweep.count("running"))
    return (
        f"; about {duration(left)} left, {at_once} at a time"
        if left is not None
        else "; time left unknown yet"
    )
