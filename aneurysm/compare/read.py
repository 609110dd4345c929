"""Run folders as they are found: finished, half done, failed or damaged; nothing is written or locked."""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from aneurysm.data.errors import UserError

STILL_AT_WORK = 120.0  # seconds: a run that wrote something more recently is taken to be running
_FOLD = re.compile(r"fold_(\d+)")  # and nothing behind it: `fold_0.before-<time>` was moved aside


class State(StrEnum):
    """What has become of a run."""

    FINISHED = "finished"
    RUNNING = "running"  # it wrote something within the last STILL_AT_WORK seconds
    UNFINISHED = "unfinished"  # begun, and at rest; the same command goes on with it
    FAILED = "failed"
    DAMAGED = "damaged"  # its notes cannot be read


@dataclass(frozen=True, eq=False)
class Run:
    """One fold of one stage, with what it noted about itself."""

    experiment: str
    stage: str
    folder: Path
    fold: int
    state: State
    key: str = ""  # hash of everything that changes the result
    settings: Mapping[str, Any] = field(default_factory=dict)  # nested, as resolved
    data: str = ""  # fingerprint of labels, patients and folds
    upstream: Mapping[str, str] = field(default_factory=dict)  # stage -> key
    versions: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)  # finite numbers of done.json
    problem: str = ""  # why it failed, or what is damaged
    progress: float | None = None  # 0..1 of an unfinished run, where it is known

    @property
    def seed(self) -> int | None:
        """Of weights, data order and augmentation; None when the notes are damaged."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def folds(self) -> int:
        """Into how many folds the patients were dealt; 0 when the notes are damaged."""
        folds = self.settings.get("folds")
        return folds if isinstance(folds, int) else 0

    @property
    def variant(self) -> str:
        """Name and hash of the folder."""
        return self.folder.parent.name


def read_experiments(folders: Sequence[Path]) -> list[Run]:
    """All runs of some experiments, by stage, variant and fold.

    Raises:
        UserError: a folder is missing or holds no run; the message names folders nearby that do.
    """
    names = _names(folders)
    runs: list[Run] = []
    for folder, name in zip(folders, names, strict=True):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder. Give the folder of an experiment, outputs/<experiment>."
            )
        found = [_read_run(name, stage, path) for stage, path in _run_folders(folder)]
        if not found:
            inside = sorted(str(p) for p in folder.iterdir() if p.is_dir() and next(_run_folders(p), None))
            above = next((p for p in folder.resolve().parents[:2] if next(_run_folders(p), None)), None)
            hint = f" Did you mean {' '.join(inside)}?" if inside else ""
            hint = hint or (f" Did you mean {above}?" if above else "")
            raise UserError(f"{folder} holds no run (<stage>/<name>-<hash>/fold_<k>/run.json).{hint}")
        runs += found
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """Experiments by the last part of their path, or by the whole path where that is not enough."""
    short = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("The same experiment was given twice.")
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _run_folders(experiment: Path) -> Iterator[tuple[str, Path]]:
    """(stage, run folder) of every run; folders that hold none (report, bundle, data) yield nothing."""
    for stage in _subfolders(experiment):
        for variant in _subfolders(stage.path):
            for run in _subfolders(variant.path):
                if _FOLD.fullmatch(run.name):
                    yield stage.name, Path(run.path)


def _subfolders(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.is_dir()), key=lambda e: e.name)
    except OSError:  # moved away, or not ours to read
        return []


def _read_run(experiment: str, stage: str, folder: Path) -> Run:
    fold = int(folder.name.removeprefix("fold_"))
    note, trouble = _read_json(folder / "run.json")
    if note is not None and not isinstance(note.get("settings"), dict):
        note, trouble = None, "run.json names no settings"
    if note is None:
        why = trouble or "no run.json: killed before it began; the same command starts it again"
        return Run(experiment, stage, folder, fold, State.DAMAGED, problem=why)
    done, trouble = _read_json(folder / "done.json")
    state, problem, progress = State.FINISHED, "", None
    if done is None:
        failed, _ = _read_json(folder / "failed.json")
        if trouble:
            state, problem = State.DAMAGED, trouble
        elif failed is not None or (folder / "failed.json").is_file():
            state, problem = (
                State.FAILED,
                _last_line((failed or {}).get("error")) or "the reason is not noted",
            )
        else:
            state = State.RUNNING if _age(folder) < STILL_AT_WORK else State.UNFINISHED
            progress = _progress(folder)
    return Run(
        experiment,
        stage,
        folder,
        fold,
        state,
        key=str(note.get("key", "")),
        settings=note["settings"],
        data=str(note.get("data", "")),
        upstream=_texts(note.get("upstream")),
        versions=_texts(note.get("versions")),
        figures=_finite(done or {}),
        problem=problem,
        progress=progress,
    )


def _read_json(path: Path) -> tuple[dict[str, Any] | None, str]:
    """(content, what is wrong with the file); (None, "") when there is no file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"{path.name} cannot be read ({error})"
    return (content, "") if isinstance(content, dict) else (None, f"{path.name} is not a table of names")


def _texts(node: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in node.items()} if isinstance(node, dict) else {}


def _finite(node: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in node.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _last_line(text: Any) -> str:
    """Of a traceback: the exception and its message."""
    lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _age(folder: Path) -> float:
    """Seconds since anything in the run's folder was written."""
    try:
        with os.scandir(folder) as entries:
            newest = max((e.stat().st_mtime for e in entries if e.is_file()), default=0.0)
    except OSError:
        newest = 0.0
    return time.time() - newest


def _progress(folder: Path) -> float | None:
    """Share of the epochs that are behind, when the run notes it."""
    note, _ = _read_json(folder / "progress.json")
    try:
        epochs, steps = float(note["epochs"]), float(note.get("steps") or 0)  # type: ignore[index]
        share = (float(note["epoch"]) + (float(note.get("step") or 0) / steps if steps else 0)) / epochs  # type: ignore[index]
    except (TypeError, KeyError, ValueError, ZeroDivisionError):
        return None
    return min(max(share, 0.0), 1.0)
