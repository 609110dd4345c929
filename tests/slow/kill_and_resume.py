"""Kill a training with SIGKILL at random moments, resume it, compare with an undisturbed one, bit by bit.

    python tests/slow/kill_and_resume.py --stage expert --kills 10 --writing 5

Each kill is a training of its own: started from nothing on the products of the earlier stages, killed at a
moment drawn evenly over the time the fit takes, or (`--writing`) as soon as the k-th checkpoint is seen half
written beside the others, and then started again by the same settings and left in peace. A kill counts only
if the fit was under way: it had begun and its last checkpoint was not written yet. What is compared: weights,
tables, volumes and figures that the stage hands on, and everything in the last checkpoint, optimiser,
schedule, balance, teacher and averages included.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from omegaconf import DictConfig

from aneurysm.command_line import config_folder
from aneurysm.runs.checkpoints import damage
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


@dataclass(frozen=True)
class Trial:
    """One training that was killed and resumed."""

    moment: str  # how the moment was chosen
    reached: str  # last checkpoint at that moment, epoch and batch
    hit: bool  # the fit was under way
    torn: bool  # a half-written checkpoint was left
    difference: str | None  # from the undisturbed training


def settings(outputs: Path, stage: str, *more: str) -> list[str]:
    """Command line of a training of one fold that finds its upstream products ready."""
    return [
        *SETTINGS,
        f"paths.outputs={outputs}",
        f"stage={stage}",
        f"fold={FOLD}",
        "upstream=require",
        *more,
    ]


def prepare(base: Path, more: tuple[str, ...] = ()) -> None:
    """Train what the last stage reads, once, into `base`."""
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"paths.outputs={base}", *more]
    subprocess.run([*command, "stage=stacker", f"fold={FOLD}"], check=True, cwd=ROOT, env=_environment())


def undisturbed(base: Path, stage: str, work: Path, more: tuple[str, ...] = ()) -> Path:
    """Train the stage alone by the command line; returns its run folder."""
    outputs = fresh(base, stage, work / "undisturbed")
    command = [sys.executable, str(ROOT / "train.py"), *settings(outputs, stage, *more)]
    subprocess.run(command, check=True, cwd=ROOT, env=_environment())
    return run_folder(outputs, stage)


def fresh(base: Path, stage: str, outputs: Path) -> Path:
    """A copy of `base` in which the stage has not run."""
    shutil.rmtree(outputs, ignore_errors=True)
    drop = {stage, *STAGES[STAGES.index(stage) + 1 :]}

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if n in drop and Path(folder).name == "smoke"]

    shutil.copytree(base, outputs, ignore=left_out)
    return outputs


def run_folder(outputs: Path, stage: str) -> Path:
    """Where the one variant of a stage trains."""
    (found,) = (outputs / "smoke" / stage).glob(f"*/fold_{FOLD}")
    return found


def start(cfg: DictConfig, log: Path) -> int:
    """Begin a training in a process of its own; returns its id."""
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        with log.open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            logging.basicConfig(level=logging.INFO, stream=said, force=True)
            try:
                train(cfg)
                code = 0
            except BaseException:
                logging.exception("failed")
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """Exit code (negative for a signal) of a training that has ended, else None."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def trial(
    base: Path,
    stage: str,
    work: Path,
    reference: Path,
    moment: float | int,
    fit_seconds: float,
    more: tuple[str, ...] = (),
) -> Trial:
    """Train, kill, resume, compare.

    Args:
        moment: a share of the fit, 0..1; or, as a whole number, which writing of a checkpoint to interrupt.
    """
    outputs = fresh(base, stage, work / "killed")
    cfg = compose(outputs, stage, more)
    log = work / "log.txt"
    pid = start(cfg, log)
    began, seen, code = None, 0, None
    parts: set[tuple[str, int]] = set()
    while (code := ended(pid)) is None:
        folder = next((outputs / "smoke" / stage).glob(f"*/fold_{FOLD}"), None)
        if folder is None:
            time.sleep(0.002)
            continue
        if began is None and any(folder.glob("metrics/*")):
            began = time.monotonic()
        if isinstance(moment, int):
            for part in folder.glob(".*.part.last.ckpt"):
                try:
                    parts.add((part.name, part.stat().st_ino))
                except FileNotFoundError:
                    continue
            if len(parts) > seen:
                seen = len(parts)
                if seen >= moment:
                    os.kill(pid, signal.SIGKILL)
                    break
        elif began is not None and time.monotonic() - began >= moment * fit_seconds:
            os.kill(pid, signal.SIGKILL)
            break
        else:
            time.sleep(0.001)
    if code is None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    folder = run_folder(outputs, stage)
    reached, finished = position(folder)
    hit = code == -signal.SIGKILL and began is not None and not finished
    torn = any(folder.glob(".*.part.last.ckpt"))
    pid = start(compose(outputs, stage, more), log)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    difference = f"resumed training ended with {code}, see {log}" if code else compare(reference, folder)
    text = f"writing {moment}" if isinstance(moment, int) else f"{100 * moment:.0f} % of the fit"
    return Trial(text, reached, hit, torn, difference)


def compose(outputs: Path, stage: str, more: tuple[str, ...]) -> DictConfig:
    """The configuration as `train.py` would compose it."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=settings(outputs, stage, *more))


def position(folder: Path) -> tuple[str, bool]:
    """Where the newest whole checkpoint is, and whether it is the last of the fit."""
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if path.is_file() and damage(path) is None:
            saved = torch.load(path, weights_only=True)
            loops = saved["loops"]["fit_loop"]
            epoch = loops["epoch_progress"]["current"]["processed"]
            batch = loops["epoch_loop.batch_progress"]["current"]["processed"]
            over = not epochs_left(folder, epoch)
            return f"{name[:-5]}: {epoch} epochs and then batch {batch}", over
    return "no checkpoint", False


def epochs_left(folder: Path, epoch: int) -> bool:
    """Whether the fit has more epochs than `epoch`."""
    settings_ = json.loads((folder / "run.json").read_text())
    stage, s = settings_["stage"], settings_["settings"]
    epochs = {
        "pretrain": lambda: s["pretrain"]["epochs"],
        "vessel": lambda: s["vessel"]["epochs"],
        "segmenter": lambda: s["smart_net"]["epochs"],
        "smart_net": lambda: s["smart_net"]["graph_epochs"],
        "expert": lambda: s["expert"]["epochs"],
        "stacker": lambda: 1,
    }[stage]()
    return epoch < epochs


def compare(reference: Path, folder: Path) -> str | None:
    """The first difference between two run folders, None when there is none."""
    passing = {"metrics", "run.json", "last.ckpt", "previous.ckpt", "done.json"}

    def products(of: Path) -> set[Path]:
        files = (p.relative_to(of) for p in of.rglob("*") if p.is_file())
        return {p for p in files if p.parts[0] not in passing and ".part." not in p.name}

    if products(reference) != products(folder):
        return f"files {sorted(map(str, products(reference) ^ products(folder)))}"
    for name in sorted(products(reference)):
        if (reference / name).read_bytes() != (folder / name).read_bytes():
            if name.suffix == ".parquet" and _table(reference / name).equals(_table(folder / name)):
                continue  # the same rows; the file also notes when it was written
            return f"content of {name}"
    figures = [json.loads((of / "done.json").read_text()) for of in (reference, folder)]
    for one in figures:
        one.pop("seconds")
    if repr(figures[0]) != repr(figures[1]):  # nan counts as equal
        return f"figures {figures}"
    checkpoints = [torch.load(of / "last.ckpt", weights_only=True) for of in (reference, folder)]
    return _difference(*checkpoints)


def _table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)


def _difference(a: Any, b: Any, place: str = "checkpoint") -> str | None:
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        return None if same else place
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((d for k in a if (d := _difference(a[k], b[k], f"{place}/{k}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return place
        return next(
            (
                d
                for i, (x, y) in enumerate(zip(a, b, strict=True))
                if (d := _difference(x, y, f"{place}/{i}"))
            ),
            None,
        )
    return None if repr(a) == repr(b) else f"{place}: {a!r} and {b!r}"


def watched(outputs: Path, stage: str, log: Path, more: tuple[str, ...]) -> float:
    """Train undisturbed in a forked process; returns how many seconds its fit took."""
    pid, began = start(compose(outputs, stage, more), log), None
    while (code := ended(pid)) is None:
        if began is None and any((outputs / "smoke" / stage).glob(f"*/fold_{FOLD}/metrics/*")):
            began = time.time()
        time.sleep(0.001)
    if code or began is None:
        raise RuntimeError(f"the undisturbed training ended with {code}, see {log}")
    return max(0.05, (run_folder(outputs, stage) / "last.ckpt").stat().st_mtime - began)


def kill_and_resume(
    stage: str, kills: int, writing: int, seed: int, base: Path, work: Path, more: tuple[str, ...] = ()
) -> list[Trial]:
    """`kills` kills at random moments and `writing` while a checkpoint is written, all of a running fit."""
    rng = random.Random(f"{stage} {seed}")
    print(f"{stage}: seed {seed} {' '.join(more)}", flush=True)
    reference = undisturbed(base, stage, work, more)
    steps = torch.load(reference / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    writes = steps["epoch_loop.batch_progress"]["total"]["processed"]
    outputs = fresh(base, stage, work / "timed")
    seconds = watched(outputs, stage, work / "log.txt", more)
    print(f"{stage}: {writes} checkpoints in a fit of {seconds:.2f} s", flush=True)
    assert (why := compare(reference, run_folder(outputs, stage))) is None, f"not repeatable: {why}"
    trials: list[Trial] = []
    for count, wanted, draw in (
        (kills, lambda t: t.hit, rng.random),
        (writing, lambda t: t.torn, lambda: rng.randint(1, writes)),
    ):
        got = tried = 0
        while got < count and tried < 12 * count:
            tried += 1
            one = trial(base, stage, work, reference, draw(), seconds, more)
            trials.append(one)
            got += wanted(one)
            print(
                f"{stage:9} {one.moment:16} at {one.reached:42} "
                f"{'hit ' if one.hit else 'miss'} {'half-written file left' if one.torn else '':22} "
                f"{one.difference or 'the same, bit by bit'}",
                flush=True,
            )
    hits, torn = sum(t.hit for t in trials), sum(t.torn for t in trials)
    bad = [t for t in trials if t.difference]
    print(
        f"{stage}: {len(trials)} kills, {hits} of a running fit, {torn} of them within the writing of a "
        f"checkpoint; {len(bad)} ended differently from the undisturbed training.",
        flush=True,
    )
    return trials


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--writing", type=int, default=5, help="kills within the writing of a checkpoint")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--base", type=Path, default=None, help="where upstream products are kept")
    parser.add_argument("overrides", nargs="*", help="as for train.py: ema=0.9 trainer.workers=2")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    more = tuple(arguments.overrides)
    failed = False
    torch.set_num_threads(1)  # a process that has computed in several threads must not be forked
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.base or Path(folder) / "base"
        if not base.is_dir():
            prepare(base, more)
        for stage in arguments.stage or STAGES:
            trials = kill_and_resume(
                stage, arguments.kills, arguments.writing, seed, base, Path(folder), more
            )
            failed |= any(t.difference for t in trials) or sum(t.hit for t in trials) < arguments.kills
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
