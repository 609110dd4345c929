"""Runs that repeat one configuration, over folds and seeds, as one variant."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aneurysm.compare.read import Run, State
from aneurysm.compare.settings import Value, flat, options_of
from aneurysm.compare.statistics import Repeat


@dataclass(frozen=True, eq=False)
class Variant:
    """One configuration of one stage: its runs differ in fold and seed only."""

    stage: str
    experiment: str
    data: str  # fingerprint
    folds: int
    settings: Mapping[str, Value]  # flat, of this stage and of all before it
    options: tuple[str, ...]  # names among them that choose an option
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    def values(self, metric: str) -> dict[Repeat, float]:
        """What each finished fold and seed reached."""
        return {
            (run.fold, run.seed or 0): run.figures[metric]
            for run in self.runs
            if run.state == State.FINISHED and metric in run.figures
        }

    def count(self, *states: State) -> int:
        """Runs in one of these states."""
        return sum(run.state in states for run in self.runs)

    @property
    def name(self) -> str:
        """Folder of the first run: unique in its experiment and stage."""
        return self.runs[0].variant


@dataclass(frozen=True, eq=False)
class _Known:
    """A run's configuration with everything before it."""

    identity: str  # without seeds
    settings: dict[str, Value]
    options: list[str]
    missing: tuple[str, ...] = field(default=())  # keys of earlier runs whose folders are gone


def find_variants(runs: Sequence[Run]) -> list[Variant]:
    """Group the readable runs of all stages; damaged ones belong to no variant."""
    readable = [run for run in runs if run.settings]
    of_key = {(run.experiment, run.stage, run.key): run for run in readable}
    known: dict[tuple[str, str, str], _Known] = {}
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in readable:
        identity = _known(run, of_key, known).identity
        groups.setdefault((run.stage, run.experiment, run.data, identity), []).append(run)
    found = []
    for members in groups.values():
        for part in _told_apart(members, known):
            one = known[(part[0].experiment, part[0].stage, part[0].key)]
            found.append(
                Variant(
                    part[0].stage,
                    part[0].experiment,
                    part[0].data,
                    part[0].folds,
                    one.settings,
                    tuple(dict.fromkeys(one.options)),
                    tuple(sorted(part, key=lambda r: (r.seed or 0, r.fold))),
                    tuple(_notes(part, one)),
                )
            )
    return found


def _known(run: Run, of_key: Mapping[Any, Run], known: dict[Any, _Known]) -> _Known:
    """Follow the keys of earlier stages to their runs and gather all settings."""
    key = (run.experiment, run.stage, run.key)
    if key in known:
        return known[key]
    own = {name: value for name, value in run.settings.items() if name != "seed"}
    settings, options, before, missing = flat(run.settings), options_of(run.settings), {}, []
    for stage, upstream in sorted(run.upstream.items()):
        earlier = of_key.get((run.experiment, stage, upstream))
        if earlier is None or earlier is run:
            before[stage] = "gone"
            missing.append(f"{stage} {upstream}")
            continue
        one = _known(earlier, of_key, known)
        before[stage] = one.identity
        # All stages of a command read one configuration: the same name has the same value in each.
        settings = {**one.settings, **settings}
        options = [*options, *one.options]
        missing += one.missing
    identity = json.dumps([own, before], sort_keys=True, default=str)
    known[key] = _Known(identity, settings, options, tuple(missing))
    return known[key]


def _told_apart(members: list[Run], known: Mapping[Any, _Known]) -> Iterable[list[Run]]:
    """Usually all of them; by key where one fold and seed is there twice.

    That happens when the folders of an earlier stage are gone, so that what differed there cannot be seen.
    """
    repeats = [(run.fold, run.seed) for run in members]
    if len(set(repeats)) == len(repeats):
        return [members]
    parts: dict[str, list[Run]] = {}
    for run in members:
        parts.setdefault(run.key, []).append(run)
    return parts.values()


def _notes(runs: Sequence[Run], known: _Known) -> Iterable[str]:
    if known.missing:
        yield f"settings of earlier stages unknown, their runs are gone: {', '.join(known.missing)}"
    for package in ("aneurysm", "torch"):
        versions = sorted({run.versions[package] for run in runs if package in run.versions})
        if len(versions) > 1:
            yield f"its runs used different versions of {package}: {', '.join(versions)}"
    finished = [run for run in runs if run.state == State.FINISHED]
    folds = len({run.fold for run in finished})
    if len(finished) > 1 and folds < 3:
        count = "one fold" if folds == 1 else "two folds"
        yield f"{count} only: the verdicts speak of seeds, hardly of other patients"
