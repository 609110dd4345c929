"""Every launcher runs a sweep in other processes, and the record does not depend on which."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from sweep_commands import finished, job_records, only_plan, start

pytestmark = pytest.mark.timeout(1800)
FOUR = ("fold=0,1", "pretrain.steps=1,2")


def slurm_answers() -> bool:
    """Whether a SLURM controller takes jobs."""
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode == 0


def check(plan, said, processes):
    seen = job_records(plan)
    assert [r["state"] for r in seen.values()] == ["done"] * 4
    assert [r["attempts"] for r in seen.values()] == [1] * 4
    assert "4 of 4 jobs done" in said
    assert len({r["pid"] for r in seen.values()}) in processes
    for record in seen.values():
        (run,) = record["runs"]
        assert record["trained"] == [run] and (plan.experiment / run / "done.json").is_file()


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        pytest.param("joblib", {1, 2}, marks=pytest.mark.slow),
        pytest.param("submitit_local", {4}, marks=pytest.mark.slow),
        pytest.param("submitit_slurm", {4}, marks=pytest.mark.slow),
    ],
)
def test_a_launcher_runs_four_jobs(launcher, processes, tmp_path):
    if launcher == "submitit_slurm" and not slurm_answers():
        pytest.skip("no SLURM controller answers here")
    more = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_slurm": ["hydra.launcher.cpus_per_task=1"]}
    chosen = [f"hydra/launcher={launcher}", *more.get(launcher, [])]
    process = start(tmp_path, *FOUR, *chosen)
    said = finished(process, timeout=900)
    plan = only_plan(tmp_path)
    check(plan, said, processes)
    assert process.pid not in {r["pid"] for r in job_records(plan).values()}


@pytest.mark.slow
def test_the_next_launcher_skips_what_another_one_finished(tmp_path):
    finished(start(tmp_path, *FOUR), timeout=900)
    before = job_records(only_plan(tmp_path))
    said = finished(start(tmp_path, *FOUR, "hydra/launcher=joblib"), timeout=900)
    assert said.count("is finished, skipped") == 4
    assert job_records(only_plan(tmp_path)) == before


@pytest.mark.slow
def test_a_job_that_takes_its_worker_down_does_not_end_the_sweep(tmp_path):
    process = start(tmp_path, *FOUR, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    deadline = time.monotonic() + 600
    worker = None
    while worker is None and time.monotonic() < deadline:
        if list(tmp_path.glob("smoke/sweeps/*/plan.json")):
            running = [r for r in job_records(only_plan(tmp_path)).values() if r["state"] == "running"]
            worker = running[0]["pid"] if running else None
        time.sleep(0.05)
    assert worker is not None and worker != process.pid
    os.kill(worker, signal.SIGKILL)
    said = finished(process, timeout=900)
    assert "A worker died while these ran" in said
    assert [r["state"] for r in job_records(only_plan(tmp_path)).values()] == ["done"] * 4


@pytest.mark.slow
def test_slurm_accepts_the_job_script(tmp_path):
    if not slurm_answers():
        pytest.skip("no SLURM controller answers here")
    script = "docs/slurm/train_folds.sbatch"
    asked = ["sbatch", "--test-only", "--array=0-1", "--cpus-per-task=1", script, "stage=pretrain"]
    result = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "to start at" in result.stderr
