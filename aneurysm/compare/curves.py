"""The validation loss of a run over its epochs, small enough to be drawn in a table cell."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CURVE = "val/loss"
_POINTS = 40
_LARGEST = 4 * 2**20  # bytes; a log of every step is not worth the wait


def loss_curve(folder: Path) -> list[float]:
    """Loss of each epoch (40 of them at most) over all attempts at a run; empty when nothing was logged."""
    of_epoch: dict[int, float] = {}
    for row in _rows(folder):
        try:
            value, epoch = float(row[CURVE]), int(float(row["epoch"]))
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            of_epoch[epoch] = value
    values = [of_epoch[epoch] for epoch in sorted(of_epoch)]
    step = max(1, math.ceil(len(values) / _POINTS))
    return values[::-1][::step][::-1]  # the last epoch stays


def _rows(folder: Path) -> Iterable[Mapping[str, Any]]:
    try:
        local = folder / "metrics.jsonl"
        if local.is_file() and local.stat().st_size <= _LARGEST:
            for line in local.read_text(encoding="utf-8").splitlines():
                row = _object(line)
                if row is not None:
                    yield row
        if not local.is_file():
            tables = [f for f in folder.glob("metrics/*/metrics.csv") if f.stat().st_size <= _LARGEST]
            for file in sorted(tables, key=lambda f: f.stat().st_mtime):
                with file.open(encoding="utf-8", newline="") as lines:
                    yield from csv.DictReader(lines)
    except (OSError, ValueError, csv.Error):  # cut off by a kill, or being written: what was read counts
        return


def _object(line: str) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
