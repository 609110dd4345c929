"""The metrics of a run, line by line in a file of its own: what every chart and table of training reads.

`metrics.jsonl` is written whatever other loggers are chosen, and survives kills: a line is flushed as soon as
it is known, a half-written last one is cut off by the next attempt, and what a killed attempt logged beyond
the step that the next one went on from is overruled when the file is read.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from aneurysm.data.files import replacing

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
CLOCKS = ("fit", "attempt", "epoch", "step", "seconds")  # the columns of a table that are not metrics


class JsonLines(Logger):
    """Append every logged metric to `metrics.jsonl`.

    A line is `{"fit": "last", "attempt": 0, "epoch": 3, "step": 47, "seconds": 12.3, "metrics": {...}}`:
    step counts optimiser steps from 0, seconds are those spent on this fit by all attempts so far. A value
    that is not finite is the word "nan", "inf" or "-inf", so that every line is strict JSON.
    """

    def __init__(self, file: Path, fit: str) -> None:
        super().__init__()
        self.file, self.fit = file, fit
        self._stream: TextIO | None = None
        self._attempt, self._before = 0, 0.0
        self._opened = time.monotonic()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return self.fit

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings are in run.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._stream is None:
            self._stream = self._open()
        values = {name: _plain(value) for name, value in metrics.items() if name != "epoch"}
        line = {
            "fit": self.fit,
            "attempt": self._attempt,
            "epoch": int(metrics["epoch"]) if "epoch" in metrics else None,
            "step": step,
            "seconds": round(self._before + time.monotonic() - self._opened, 3),
            "metrics": values,
        }
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> TextIO:
        """Cut off what a kill left half written, and count on from the attempts before."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            content = self.file.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                with self.file.open("r+b") as stream:
                    stream.truncate(whole)
        earlier = [line for line in _lines(self.file) if line["fit"] == self.fit]
        if earlier:
            self._attempt = earlier[-1]["attempt"] + 1
            self._before = earlier[-1]["seconds"]
        return self.file.open("a", encoding="utf-8")


class CsvTable(Logger):
    """`metrics.csv`, the same table for spreadsheets: brought up to date every few seconds and at the end."""

    def __init__(self, source: Path, every_s: float = 5.0) -> None:
        super().__init__()
        self.source, self.file, self.every_s = source, source.with_suffix(".csv"), every_s
        self._due, self._written = False, -math.inf

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings are in run.json."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._due = True

    def save(self) -> None:
        if self._due and time.monotonic() - self._written >= self.every_s:
            self._write()

    def finalize(self, status: str) -> None:
        if self._due:
            self._write()

    @rank_zero_only
    def _write(self) -> None:
        table = read_metrics(self.source)
        with replacing(self.file) as part:
            table.to_csv(part, index=False)
        self._due, self._written = False, time.monotonic()


def read_metrics(file: Path) -> pd.DataFrame:
    """What a run logged: columns fit, attempt, epoch, step, seconds and one per metric, NaN where not logged.

    Lines that cannot be read are left out with a warning: a curve is not worth a report. Empty when there is
    no file.
    """
    kept: list[dict[str, Any]] = []
    attempt: dict[str, int] = {}
    for line in _lines(file, warn=True):
        fit = line["fit"]
        if attempt.get(fit, line["attempt"]) != line["attempt"]:
            # The new attempt went on from an earlier step: what the killed one did beyond it never was.
            kept = [k for k in kept if k["fit"] != fit or _step(k) < _step(line)]
        attempt[fit] = line["attempt"]
        kept.append(line)
    rows = [
        {
            **{name: line[name] for name in CLOCKS},
            **{name: float(value) for name, value in line["metrics"].items()},
        }
        for line in kept
    ]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(CLOCKS))


def _lines(file: Path, warn: bool = False) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found, damaged = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            _ = [line[name] for name in CLOCKS], [float(v) for v in line["metrics"].values()]
            found.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
    if damaged and warn:
        log.warning(
            "%d of %d lines of %s cannot be read; they are left out.", damaged, damaged + len(found), file
        )
    return found


def _step(line: dict[str, Any]) -> float:
    return -math.inf if line["step"] is None else line["step"]


def _plain(value: Any) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
