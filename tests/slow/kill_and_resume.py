"""Kill a training with SIGKILL at random moments, resume it, compare with an undisturbed one, bit by bit.

    python tests/slow/kill_and_resume.py --stage expert --kills 10 --writing 5

A training starts from nothing on the products of the earlier stages. It is killed at a moment drawn evenly
over the time that a whole fit takes, or (`--writing`) as soon as one of its checkpoints, drawn evenly, is
seen half written beside the others; started again by the same settings; killed again, up to `--in-a-row`
times; and then left in peace to its end. A kill counts only if the fit was under way. What is compared:
weights, tables and volumes that the stage hands on, its figures, and everything in the last checkpoint,
optimiser, schedule, balance, teacher and averages included.

The trainings are processes forked from this one, which has imported everything but computed nothing: the
seconds of start-up need not be waited for at every kill. The undisturbed training is `python train.py`.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig

from aneurysm.command_line import config_folder
from aneurysm.data.preparation.prepared import SUFFIX
from aneurysm.runs.checkpoints import damage
from aneurysm.runs.settings import stage_key
from aneurysm.train import train

STAGES = ("pretrain", "vessel", "segmenter", "smart_net", "expert", "stacker")
FOLD = 0
# The smoke experiment with enough steps and epochs to be killed in, and with everything that has a memory:
# a teacher, dropped metadata, collocation draws, calibrated balance.
SETTINGS = (
    "experiment=smoke",
    "data.patients=12",
    "masking=anatomask",
    "pretrain.epochs=3",
    "pretrain.steps=4",
    "vessel.steps=6",
    "smart_net.graph_epochs=10",
    "expert.epochs=3",
    "expert.steps=3",
    "trainer.threads=1",
    "trainer.progress=none",
    "checkpoint.every_steps=1",
)
ROOT = Path(__file__).parents[2]
PRODUCTS = {".safetensors", ".parquet", ".csv", ".ubj", SUFFIX}


@dataclass(frozen=True)
class Kill:
    """One kill of a training."""

    moment: str  # how it was chosen
    reached: str  # newest whole checkpoint at that moment
    hit: bool  # the fit was under way
    torn: bool  # a half-written checkpoint was left


@dataclass
class Outcome:
    """What happened to the trainings of a stage."""

    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    trainings: int = 0


@dataclass(frozen=True)
class Place:
    """Where a stage trains, and where this script notes things about it."""

    base: Path
    stage: str
    more: tuple[str, ...]  # overrides

    @property
    def notes(self) -> Path:
        folder = self.base / "undisturbed"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def log(self) -> Path:
        """What the forked trainings say."""
        return self.notes / f"{self.stage}.log"

    @property
    def fitting(self) -> Path:
        """Exists while a fit is under way."""
        return self.notes / "fitting"

    def cfg(self) -> DictConfig:
        """The configuration as `train.py` would compose it: one fold, upstream products ready."""
        own = (f"paths.outputs={self.base}", f"stage={self.stage}", f"fold={FOLD}", "upstream=require")
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            return hydra.compose("train", overrides=[*SETTINGS, *own, *self.more])

    def run_folder(self) -> Path:
        """The folder of the run."""
        stage = self.base / "smoke" / self.stage
        notes = (self.base / "smoke").glob("*/*/fold_*/run.json")
        data = {json.loads(p.read_text())["data"] for p in notes}
        (variant,) = stage.glob(f"*-{stage_key(self.cfg(), self.stage, data.pop())}")
        return variant / f"fold_{FOLD}"


def prepare(base: Path, more: tuple[str, ...] = ()) -> None:
    """Train what is not there yet, undisturbed, by the command line."""
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"paths.outputs={base}", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "stage=stacker", f"fold={FOLD}"], check=True, cwd=ROOT, env=environment)


@contextmanager
def undisturbed(place: Place) -> Iterator[tuple[Path, Path]]:
    """Yield the run folder, empty, and where the undisturbed training is kept meanwhile."""
    aside = place.notes / place.stage
    folder = place.run_folder()
    if not aside.exists():  # it does when this script itself was killed
        shutil.move(folder, aside)
    try:
        yield folder, aside
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(aside, folder)


def start(place: Place) -> int:
    """Begin a training in a process of its own, which notes when its fit is under way; returns its id."""
    place.fitting.unlink(missing_ok=True)
    cfg = place.cfg()
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        with place.log.open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            logging.basicConfig(level=logging.INFO, stream=said, force=True)
            whole = Trainer.fit

            def noted(self: Trainer, *arguments: Any, **named: Any) -> None:
                place.fitting.touch()
                whole(self, *arguments, **named)
                place.fitting.unlink()

            Trainer.fit = noted  # type: ignore[method-assign]
            try:
                train(cfg)
                code = 0
            except BaseException:
                logging.exception("failed")
    finally:
        os._exit(code)


def watch(place: Place, due: Callable[[float | None], bool]) -> tuple[int, float]:
    """Follow a new training until its end or until `due`, which is told when its fit began, kills it.

    Returns its exit code, negative for a signal, and the seconds its fit took.
    """
    pid = start(place)
    began, took = None, 0.0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), took
        if place.fitting.exists():
            began = began or time.monotonic()
            took = time.monotonic() - began
        if due(began if place.fitting.exists() else None):
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), took
        time.sleep(0.0005)


def at_time(seconds: float) -> Callable[[float | None], bool]:
    """Due so many seconds into the fit."""
    return lambda began: began is not None and time.monotonic() - began >= seconds


def at_writing(folder: Path, count: int) -> Callable[[float | None], bool]:
    """Due when the count-th half-written checkpoint is seen."""
    seen: set[tuple[str, int]] = set()

    def look() -> None:
        for part in folder.glob(".*.part.last.ckpt"):
            with suppress(FileNotFoundError):
                seen.add((part.name, part.stat().st_ino))

    look()  # what an earlier kill left half written
    before = len(seen)

    def due(began: float | None) -> bool:
        look()
        return len(seen) - before >= count

    return due


def reached(folder: Path) -> str:
    """Where the newest whole checkpoint is."""
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if path.is_file() and damage(path) is None:
            loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
            epoch = loops["epoch_progress"]["current"]["processed"]
            batch = loops["epoch_loop.batch_progress"]["current"]["processed"]
            return f"{name[:-5]}: epoch {epoch}, batch {batch}"
    return "no checkpoint yet"


def compare(reference: Path, folder: Path) -> str | None:
    """The first difference between two run folders, None when there is none."""

    def products(of: Path) -> set[Path]:
        files = {p.relative_to(of) for p in of.rglob("*") if p.is_file() and p.suffix in PRODUCTS}
        return {p for p in files if not p.parts[0].startswith("metrics")}

    if products(reference) != products(folder) or not products(folder):
        return f"files {sorted(map(str, products(reference) ^ products(folder)))}"
    for name in sorted(products(reference)):
        if (reference / name).read_bytes() != (folder / name).read_bytes():
            if name.suffix == ".parquet" and _rows(reference / name).equals(_rows(folder / name)):
                continue  # the same rows in another packing
            return f"content of {name}"
    figures = [json.loads((of / "done.json").read_text()) for of in (reference, folder)]
    for one in figures:
        for cost in [name for name in one if name == "seconds" or name.startswith("peak_")]:
            one.pop(cost)
    if repr(figures[0]) != repr(figures[1]):  # where nan is nan
        return f"figures {figures}"
    first, second = (torch.load(of / "last.ckpt", weights_only=True) for of in (reference, folder))
    return difference(first, second)


def _rows(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)


def difference(a: Any, b: Any, place: str = "checkpoint") -> str | None:
    """Where two nested contents differ in a single bit, None where they do not."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        return None if same else place
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(k, a[k], b[k]) for k in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return place
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if repr(a) == repr(b) else f"{place}: {a!r} and {b!r}"
    return next((d for k, x, y in pairs if (d := difference(x, y, f"{place}/{k}"))), None)


def kill_and_resume(
    base: Path, stage: str, kills: int, writing: int, seed: int, more: tuple[str, ...] = (), in_a_row: int = 5
) -> Outcome:
    """`kills` kills at random moments of the fit and `writing` while a checkpoint is written."""
    place, rng, outcome = Place(base, stage, more), random.Random(f"{stage} {seed}"), Outcome()
    with undisturbed(place) as (folder, reference):
        loops = torch.load(reference / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
        writes = loops["epoch_loop.batch_progress"]["total"]["processed"]
        code, seconds = watch(place, lambda began: False)
        if code or (why := compare(reference, folder)) is not None:
            raise RuntimeError(f"not repeatable: {f'exit code {code}' if code else why}, see {place.log}")
        print(f"{stage}: seed {seed}, {writes} checkpoints in a fit of {seconds:.2f} s", *more, flush=True)

        def at_random() -> tuple[str, Callable[[float | None], bool]]:
            share = rng.random()
            return f"{100 * share:.0f} % of the fit", at_time(share * seconds)

        def while_writing() -> tuple[str, Callable[[float | None], bool]]:
            count = rng.randint(1, max(1, writes // 2))
            return f"{count}. writing", at_writing(folder, count)

        for wanted, draw, counts in (
            (kills, at_random, lambda kill: kill.hit),
            (writing, while_writing, lambda kill: kill.hit and kill.torn),
        ):
            got = tried = 0
            while got < wanted and tried < 8 * wanted:
                shutil.rmtree(folder, ignore_errors=True)
                row = 0
                while row < min(in_a_row, wanted - got) and tried < 8 * wanted:
                    moment, due = draw()
                    tried += 1
                    code, _ = watch(place, due)
                    if code != -signal.SIGKILL:
                        break  # it was at its end before
                    torn = any(folder.glob(".*.part.last.ckpt"))
                    kill = Kill(moment, reached(folder), place.fitting.exists(), torn)
                    outcome.kills.append(kill)
                    row += counts(kill)
                    print(
                        f"  killed at {kill.moment:15} {kill.reached:28}"
                        f"{'' if kill.hit else ' (fit not under way)'}{' half-written file left' * torn}",
                        flush=True,
                    )
                got += row
                if code == -signal.SIGKILL:
                    code, _ = watch(place, lambda began: False)
                why = f"exit code {code}, see {place.log}" if code else compare(reference, folder)
                outcome.trainings += 1
                outcome.differences += [] if why is None else [why]
                print(f"  resumed to its end: {why or 'the same, bit by bit'}", flush=True)
    hits = [kill for kill in outcome.kills if kill.hit]
    print(
        f"{stage}: {len(hits)} kills of a running fit ({sum(k.torn for k in hits)} within the writing of a "
        f"checkpoint) in {outcome.trainings} trainings; {len(outcome.differences)} ended differently.",
        flush=True,
    )
    return outcome


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--writing", type=int, default=5, help="kills within the writing of a checkpoint")
    parser.add_argument("--in-a-row", type=int, default=5, help="kills of one training before it may end")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--base", type=Path, default=None, help="where the undisturbed trainings are kept")
    parser.add_argument("overrides", nargs="*", help="as for train.py: ema=0.9 trainer.workers=2")
    a = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if a.seed is None else a.seed
    torch.set_num_threads(1)  # a process that has computed in several threads must not be forked
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        base = a.base or Path(folder)
        prepare(base, tuple(a.overrides))
        for stage in a.stage or STAGES:
            one = kill_and_resume(base, stage, a.kills, a.writing, seed, tuple(a.overrides), a.in_a_row)
            failed |= bool(one.differences) or sum(k.hit for k in one.kills) < a.kills
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
