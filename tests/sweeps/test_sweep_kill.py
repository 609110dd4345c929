"""A sweep killed twice at random moments ends like an undisturbed one, and no finished job runs again."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from statistics import median

import pytest
from sweep_commands import arguments, finished, job_records, only_plan, start

from aneurysm.sweeps.jobs import look

STAGE = "pretrain"
TWELVE = (
    f"stage={STAGE}", "folds=4", "fold=0,1,2,3", "pretrain.lr=1e-3,2e-3,3e-3",
    "pretrain.epochs=2", "pretrain.steps=2",
)  # fmt: skip


def results(outputs: Path) -> dict[str, tuple[dict, bytes]]:
    """Figures and weights of every run folder."""
    found = {}
    for done in sorted((outputs / "smoke" / STAGE).glob("*/fold_?/done.json")):
        figures = {
            k: v for k, v in json.loads(done.read_text()).items() if k != "seconds" and "peak" not in k
        }
        weights = (done.parent / "weights.safetensors").read_bytes()
        found[str(done.parent.relative_to(outputs))] = (figures, weights)
    return found


def kill_at_random(outputs: Path, after: int, usual: float, in_fit: bool, chance: random.Random) -> None:
    """Start the sweep and kill its process group at some moment after `after` jobs are done.

    Args:
        usual: seconds that a job takes.
        in_fit: kill while a network is being trained; else at any moment of a job or between two.
    """
    process = start(outputs, *TWELVE)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, "the sweep ended before it could be killed"
        if list(outputs.glob("smoke/sweeps/*/plan.json")):
            plan = only_plan(outputs)
            seen = job_records(plan).values()
            fits = [
                plan.experiment / r["trained"][-1] / "progress.json"
                for r in seen
                if r["state"] == "running" and r["pid"] == process.pid and r["trained"]
            ]
            enough = sum(r["state"] == "done" for r in seen) >= after
            if enough and (not in_fit or any(p.is_file() for p in fits)):
                break
        time.sleep(0.01)
    if not in_fit:
        time.sleep(chance.uniform(0, 2 * usual))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twelve_jobs_killed_twice(tmp_path):
    chance = random.Random()
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finished(start(undisturbed, *TWELVE), timeout=1200)
    for shared in ("data", "prepared"):
        shutil.copytree(undisturbed / shared, killed / shared, copy_function=os.link)

    trained: dict[str, int] = {}  # run folder of a finished job -> when it was finished
    kept: dict[str, dict] = {}
    usual = median(r["seconds"] for r in job_records(only_plan(undisturbed)).values())
    for after, in_fit in ((chance.randint(0, 4), True), (chance.randint(6, 8), False)):
        kill_at_random(killed, after, usual, in_fit, chance)
        plan = only_plan(killed)
        assert len(plan.jobs) == 12
        for label, record in job_records(plan).items():
            if label in kept:
                assert record == kept[label], f"{label} was finished and ran again"
            elif record["state"] == "done":
                kept[label] = record
                done = plan.experiment / record["runs"][0] / "done.json"
                trained[str(done)] = done.stat().st_mtime_ns
        states = [state for _, state in (look(plan, job) for job in plan.jobs)]
        assert states.count("killed") <= 1 and "running" not in states
        print(
            f"killed {'in a fit' if in_fit else 'at random'}, {len(kept)} of 12 jobs done, {after} asked for"
        )
    said = finished(start(killed, *TWELVE), timeout=1200)
    assert said.count("is finished, skipped") == len(kept)
    seen = job_records(only_plan(killed))
    assert [r["state"] for r in seen.values()] == ["done"] * 12
    assert {label: seen[label] for label in kept} == kept
    # A kill can only cost the job under way its attempt.
    attempts = sum(r["attempts"] for r in seen.values())
    assert 13 <= attempts <= 14, attempts
    assert {path: Path(path).stat().st_mtime_ns for path in trained} == trained
    expected, found = results(undisturbed), results(killed)
    assert len(expected) == 12 and list(found) == list(expected)
    assert [run for run in expected if found[run] != expected[run]] == []
    scores = [
        {label: r["score"] for label, r in job_records(only_plan(o)).items()} for o in (undisturbed, killed)
    ]
    assert scores[0] == scores[1]
    print(f"12 jobs, {attempts} attempts; same command: {' '.join(arguments(killed, *TWELVE)[1:])}")
