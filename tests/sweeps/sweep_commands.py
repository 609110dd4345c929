"""Sweeps as commands of their own process, over a data set that is made once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from aneurysm.sweeps.plan import Plan, find_plans

ROOT = Path(__file__).parents[2]


def arguments(outputs: Path, *overrides: str) -> list[str]:
    """A multirun of the cheapest stage; later overrides win."""
    fixed = ["experiment=smoke", f"paths.outputs={outputs}", "stage=pretrain", "trainer.progress=none"]
    fixed += ["data.jobs=1"]  # eight phantoms are made sooner than another process starts
    return [sys.executable, str(ROOT / "train.py"), "-m", *fixed, *overrides]


def start(outputs: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a sweep in a process group of its own."""
    return subprocess.Popen(
        arguments(outputs, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finished(process: subprocess.Popen[str], timeout: float) -> str:
    """Wait for a sweep that should succeed; what it said."""
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said
    return said


def only_plan(outputs: Path) -> Plan:
    """The sweep of an experiment that has one."""
    (plan,) = find_plans(outputs / "smoke")
    return plan


def job_records(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every job that began, by its label."""
    files = [plan.folder / "jobs" / f"{job.id}.json" for job in plan.jobs]
    return {(r := json.loads(f.read_text()))["label"]: r for f in files if f.is_file()}
