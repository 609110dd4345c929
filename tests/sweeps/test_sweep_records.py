"""Real sweeps over a real stage: finished jobs are not run again, failed ones are recorded and retried."""

import json
import sys
from pathlib import Path

import pytest

from aneurysm.commands import train
from aneurysm.status import main as status
from aneurysm.sweeps.plan import find_plans


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def sweep(outputs: Path, *overrides: str) -> int:
    """Run a multirun of the cheapest stage in this process; its exit code."""
    fixed = ["-m", "experiment=smoke", f"paths.outputs={outputs}", "stage=pretrain", "trainer.progress=none"]
    before, sys.argv = sys.argv, ["train.py", *fixed, "pretrain.steps=1", *overrides]
    try:
        train()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def records(outputs: Path) -> dict[str, dict]:
    """The jobs of the sweep over folds and rates, by their label."""
    plan = next(p for p in find_plans(outputs / "smoke") if len(p.jobs) == 4)
    files = [plan.folder / "jobs" / f"{job.id}.json" for job in plan.jobs]
    return {(r := json.loads(file.read_text()))["label"]: r for file in files if file.is_file()}


@pytest.fixture(scope="module")
def after_failure(outputs):
    """A sweep of four jobs in which one fold of one variant cannot be logged."""
    assert sweep(outputs, "fold=0", "pretrain.lr=1e-3") == 0
    variant = next((outputs / "smoke" / "pretrain").glob("*/fold_0")).parent
    obstacle = variant / "fold_1" / "metrics.jsonl"
    obstacle.mkdir(parents=True)  # a folder where a file must be
    code = sweep(outputs, "fold=0,1", "pretrain.lr=1e-3,2e-3")
    return code, obstacle


def test_one_failed_job_is_recorded_and_stops_no_other(outputs, after_failure, capsys):
    code, obstacle = after_failure
    assert code == 1
    seen = records(outputs)
    assert {label: r["state"] for label, r in seen.items()} == {
        "fold=0 pretrain.lr=0.001": "done",
        "fold=0 pretrain.lr=0.002": "done",
        "fold=1 pretrain.lr=0.001": "failed",
        "fold=1 pretrain.lr=0.002": "done",
    }
    failed = seen["fold=1 pretrain.lr=0.001"]
    assert "metrics" in failed["error"] and "Traceback" in failed["traceback"]
    assert failed["config"]["pretrain"]["lr"] == 1e-3 and failed["config"]["fold"] == 1
    # The fold that an earlier sweep had finished was needed and not trained.
    first = seen["fold=0 pretrain.lr=0.001"]
    assert len(first["runs"]) == 1 and first["trained"] == []
    assert seen["fold=0 pretrain.lr=0.002"]["trained"] == seen["fold=0 pretrain.lr=0.002"]["runs"]
    note = json.loads((obstacle.parent / "failed.json").read_text())
    assert note["attempt"] == 1 and "metrics" in note["error"] and note["config"]["fold"] == 1
    assert "Traceback" in note["traceback"]
    assert note["command"].startswith("python train.py experiment=smoke")
    assert note["command"].endswith("fold=1 pretrain.lr=0.001")
    capsys.readouterr()
    assert status([str(outputs / "smoke"), "--failed"]) == 1
    said = capsys.readouterr().out
    assert "fold=1 pretrain.lr=0.001" in said and "again: " in said


def test_skip_leaves_what_failed_and_still_says_so(outputs, after_failure, capsys):
    before = records(outputs)
    assert sweep(outputs, "fold=0,1", "pretrain.lr=1e-3,2e-3", "failed=skip") == 1
    said = capsys.readouterr().out
    assert said.count("is finished, skipped") == 3 and "failed before and is skipped" in said
    assert records(outputs) == before


def test_the_same_command_retries_what_failed_and_nothing_else(outputs, after_failure, capsys):
    obstacle = after_failure[1]
    before = records(outputs)
    assert sweep(outputs, "pretrain.lr=1e-3,2e-3", "fold=0,1") == 1
    assert records(outputs)["fold=1 pretrain.lr=0.001"]["attempts"] == 2
    assert json.loads((obstacle.parent / "failed.json").read_text())["attempt"] == 2
    obstacle.rmdir()
    assert sweep(outputs, "fold=0,1", "pretrain.lr=1e-3,2e-3") == 0
    after = records(outputs)
    retried = after.pop("fold=1 pretrain.lr=0.001")
    assert (retried["state"], retried["attempts"]) == ("done", 3)
    before.pop("fold=1 pretrain.lr=0.001")
    assert after == before
    assert not (obstacle.parent / "failed.json").exists()
    capsys.readouterr()
    assert status([str(outputs / "smoke")]) == 0
    assert "4 done" in capsys.readouterr().out


def test_a_single_run_that_failed_can_be_left_too(outputs, capsys):
    done = next((outputs / "smoke" / "pretrain").glob("*/fold_0"))
    assert done.parent.is_dir()
    assert sweep(outputs, "fold=1", "pretrain.lr=3e-3") == 0
    run = max((outputs / "smoke" / "pretrain").glob("*/fold_1"), key=lambda p: p.stat().st_ctime)
    (run / "done.json").unlink()
    (run / "failed.json").write_text(json.dumps({"error": "out of memory", "attempt": 1}))
    arguments = ["experiment=smoke", f"paths.outputs={outputs}", "stage=pretrain", "pretrain.steps=1"]
    sys.argv = ["train.py", *arguments, "fold=1", "pretrain.lr=3e-3", "failed=skip", "trainer.progress=none"]
    with pytest.raises(SystemExit) as end:
        train()
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "out of memory" in said and "failed=retry" in said and not (run / "done.json").exists()
