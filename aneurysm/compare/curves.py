"""The validation loss of a run over its epochs, small enough to be drawn in a table cell."""

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
    for row in _rows(folder / "metrics.jsonl"):
        try:
            value, epoch = float(row["metrics"][CURVE]), int(row["epoch"])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            of_epoch[epoch] = value
    values = [of_epoch[epoch] for epoch in sorted(of_epoch)]
    step = max(1, math.ceil(len(values) / _POINTS))
    return values[::-1][::step][::-1]  # the last epoch stays


def _rows(file: Path) -> Iterable[Mapping[str, Any]]:
    try:
        if file.stat().st_size > _LARGEST:
            return
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:  # the last one may be cut off by a kill, or being written
        if (row := _object(line)) is not None:
            yield row


def _object(line: str) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
