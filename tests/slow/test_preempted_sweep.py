"""A sweep that is asked to leave in the middle of a job ends, and the same command finishes it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = ("pretrain.lr=0.001,0.002",)


def command(outputs: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "train.py"), "-m", "experiment=smoke", "stage=pretrain", "fold=0"),
        *(
            "pretrain.epochs=2",
            "pretrain.steps=40",
            "data.patients=4",
            "checkpoint.every_steps=1",
            f"paths.outputs={outputs}",
        ),
        *JOBS,
        *more,
    ]


def done(outputs: Path) -> dict[str, float]:
    """When each finished run ended."""
    return {str(p): p.stat().st_mtime for p in outputs.glob("smoke/pretrain/*/fold_0/done.json")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_preemption_ends_a_sweep_and_force_starts_it_over(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(tmp_path, *more), env=environment, cwd=ROOT, capture_output=True, text=True
        )

    with (tmp_path / "said.txt").open("w") as said:
        sweep = subprocess.Popen(command(tmp_path), env=environment, cwd=ROOT, stdout=said, stderr=said)
        while not any(tmp_path.glob("smoke/pretrain/*/fold_0/last.ckpt")):
            assert sweep.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(0.01)
        os.kill(sweep.pid, signal.SIGTERM)
        assert sweep.wait(300) == 75
    text = (tmp_path / "said.txt").read_text()
    assert "SIGTERM" in text and "Traceback" not in text
    (begun,) = tmp_path.glob("smoke/pretrain/*/fold_0")  # the second job was not begun
    assert (begun / "last.ckpt").is_file() and not done(tmp_path)
    again = run()
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    first = done(tmp_path)
    assert len(first) == 2
    assert run().returncode == 0 and done(tmp_path) == first  # nothing is trained again
    forced = run("force=true")
    assert forced.returncode == 0, forced.stderr
    after = done(tmp_path)
    assert after.keys() == first.keys() and all(after[p] > first[p] for p in first)
    assert len(list(tmp_path.glob("smoke/pretrain/*/fold_0.before-*"))) == 2
    for path in after:
        assert "seconds" in json.loads(Path(path).read_text())
