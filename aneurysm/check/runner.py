"""Runs the checks over a data set: in parallel, with a progress bar, whatever happens to single cases."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aneurysm.check.across import check_across
from aneurysm.check.case import Outcome, check_case
from aneurysm.check.findings import Collector, Facts, Finding, Severity
from aneurysm.check.items import Item
from aneurysm.check.layout import Layout

Work = Callable[[Item], Outcome]


@dataclass(frozen=True)
class Result:
    """What the checks say about a data set."""

    root: Path
    kind: str
    cases: tuple[Facts, ...]  # in the order of the data set
    findings: tuple[Finding, ...]  # worst first
    seconds: float
    cases_in_all: int  # more than `cases` where a limit was set

    @property
    def fatal(self) -> bool:
        """Whether anything is fatal."""
        return any(finding.severity == Severity.FATAL for finding in self.findings)

    def count(self, severity: Severity) -> int:
        """Findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)


def check_data(
    layout: Layout,
    folds: Path | None = None,
    jobs: int = 1,
    limit: int | None = None,
    console: Console | None = None,
    work: Work = check_case,
) -> Result:
    """Check all cases of a layout, then compare them with each other.

    Args:
        folds: fold file to check as well.
        jobs: processes; each holds one case.
        limit: check only the first cases.
        console: where a progress bar is drawn; None for none.
        work: what is done with one case.
    """
    started = time.perf_counter()
    items = layout.items[:limit]
    outcomes: dict[int, Outcome] = {}
    bar = Progress(
        TextColumn("Checking"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[case]}", style="dim"),
        console=console or Console(quiet=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("cases", total=len(items), case="")
        for number, outcome in _outcomes(items, jobs, work):
            outcomes[number] = outcome
            bar.update(task, advance=1, case=items[number].series_uid[-40:])
    found = list(layout.before) if limit is None else [c for c in layout.before if c.series_uid == ""]
    facts: list[Facts] = []
    for _, outcome in sorted(outcomes.items()):
        for collector, case in outcome:
            found.append(collector)
            facts.append(case)
    # With a limit, patients of the other cases would seem to be without anything.
    found += check_across(facts, folds)
    findings = [finding for collector in found for finding in collector.findings]
    findings.sort(key=lambda f: (f.severity.rank, f.code, f.series_uid))
    seconds = time.perf_counter() - started
    return Result(layout.root, layout.kind, tuple(facts), tuple(findings), seconds, len(layout.items))


def _outcomes(items: Sequence[Item], jobs: int, work: Work) -> Iterator[tuple[int, Outcome]]:
    """(number, outcome) as cases finish.

    When a process dies, the few cases that were under way are run again one by one, so that the one that
    killed it is known and the others are not lost.
    """
    if jobs <= 1 or len(items) <= 1:
        for number, item in enumerate(items):
            yield number, _guarded(work, item)
        return
    waiting = dict(enumerate(items))
    while waiting:
        suspects: dict[int, Item] = {}
        yield from _pooled(waiting, jobs, work, suspects)
        while suspects:
            alone: dict[int, Item] = {}
            yield from _pooled(suspects, 1, work, alone)
            for number, item in alone.items():
                collector = Collector(item.series_uid, item.patient_id)
                collector.add("worker-died", f"The process that read {item.files[0].parent} was killed.")
                yield number, [(collector, Facts(item.series_uid, item.patient_id))]


def _pooled(
    waiting: dict[int, Item], jobs: int, work: Work, lost: dict[int, Item]
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of a pool of processes; takes them out of `waiting`.

    Ends early when a process dies: the cases under way are then moved from `waiting` to `lost`.
    """
    # The workers' own threads would fight for the same cores.
    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    under_way: dict[Any, int] = {}
    with ProcessPoolExecutor(min(jobs, len(waiting)), env=env) as pool:
        queue = iter(list(waiting))
        while True:
            # One more than there are processes keeps them busy; alone means alone.
            for number in islice(queue, jobs + (jobs > 1) - len(under_way)):
                under_way[pool.submit(_guarded, work, waiting[number])] = number
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                if not isinstance(future.exception(), BrokenProcessPool):
                    number = under_way.pop(future)
                    del waiting[number]
                    yield number, future.result()
            if any(future in under_way for future in done):
                lost.update({number: waiting.pop(number) for number in under_way.values()})
                return


def _guarded(work: Work, item: Item) -> Outcome:
    """The outcome of one case; what a check did not foresee is a finding too."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        with _quiet("aneurysm", "pydicom"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work(item)
    except Exception as error:  # one broken case must not stop the others
        collector = Collector(item.series_uid, item.patient_id)
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "unknown"
        collector.add(
            "check-failed", f"{type(error).__name__} in {where}: {' '.join(str(error).split())[:200]}"
        )
        return [(collector, Facts(item.series_uid, item.patient_id))]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Errors only from these loggers for a while: the readers' warnings are findings here."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
