"""How far long work has come and when it will be done: a bar on a terminal, plain log lines elsewhere."""

import logging
import time
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_LINES = 10  # plain lines over the whole work, about


class Counter(AbstractContextManager):
    """Counts cases that are done.

    Args:
        total: how many cases there are to do.
        console: where the bar goes; without a terminal behind it lines are logged instead.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.total, self.done, self.skipped = total, 0, 0
        self.started = time.monotonic()
        console = console or Console(stderr=True)
        self.bar = None
        if console.is_terminal and total:
            columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self.row = self.bar.add_task("preparing", total=total, note="")

    def __enter__(self) -> "Counter":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, skipped: bool) -> None:
        """One more case is done, or given up."""
        self.done += 1
        self.skipped += int(skipped)
        last = self.done == self.total
        if self.bar is not None:
            note = f"{self.skipped} skipped" if self.skipped else ""
            self.bar.update(self.row, advance=1, note=note)
        if last or (self.bar is None and self.done % max(self.total // _LINES, 1) == 0):
            rest = "" if last else f", about {duration(self.seconds_left)} left"
            log.info("prepared %d of %d cases, %d skipped%s", self.done, self.total, self.skipped, rest)

    @property
    def seconds_left(self) -> float:
        """Expected seconds until all is done, at the mean pace so far."""
        return (time.monotonic() - self.started) / max(self.done, 1) * (self.total - self.done)


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
