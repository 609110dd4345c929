"""Whether a finished job would read today what it read then: its settings and its data, by cheap marks.

A mark that differs only means that the job looks again the thorough way; so marks may be too strict, never
too lax. Data are marked by size and time of the files that lie directly in their folder (labels, tables,
archives) and by the times of its subfolders, not by reading thousands of scans.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# Root keys that change how a job runs and not what it makes.
_HOW = frozenset({"failed", "force", "upstream", "memory_gb", "parallel", "logger", "paths", "checkpoint"})


def settings_mark(settings: dict[str, Any]) -> str:
    """Eight hexadecimal digits that change with any setting of a job that may change its result.

    Args:
        settings: the resolved configuration as plain containers.
    """
    what = {name: value for name, value in settings.items() if name not in _HOW}
    trainer = what.get("trainer")
    if isinstance(trainer, dict):
        what["trainer"] = {name: value for name, value in trainer.items() if name != "progress"}
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:8]


def data_mark(settings: dict[str, Any], experiment: Path) -> str:
    """Eight hexadecimal digits that change when the data set or the folds are touched."""
    places = sorted({p for p in _paths(settings.get("data")) if p.exists()})
    seen = [_look(place) for place in (*places, *sorted(experiment.glob("folds-*.csv")))]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:8]


def _paths(node: Any) -> list[Path]:
    """Every setting of the data that is an absolute path, or a relative one with a separator."""
    if isinstance(node, dict):
        return [path for child in node.values() for path in _paths(child)]
    if isinstance(node, list):
        return [path for child in node for path in _paths(child)]
    return [Path(node)] if isinstance(node, str) and os.sep in node else []


def _look(place: Path) -> list[Any]:
    if place.is_file():
        return [place.name, *_stat(place.stat())]
    entries = []
    with os.scandir(place) as found:
        for entry in found:
            if entry.name.startswith("."):  # locks and caches
                continue
            state = entry.stat()
            # A folder's size depends on the file system.
            entries.append([entry.name, *((state.st_mtime_ns,) if entry.is_dir() else _stat(state))])
    return [str(place), sorted(entries)]


def _stat(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns
