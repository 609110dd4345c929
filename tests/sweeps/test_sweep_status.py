"""Status sees what is done, running, failed, killed and to do, from another process, without frameworks."""

import contextlib
import json
import os
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aneurysm.data.errors import UserError
from aneurysm.runs.folders import StageRun
from aneurysm.runs.progress import ProgressFile
from aneurysm.status import main, plain
from aneurysm.sweeps.jobs import Job, read_record, uses_run
from aneurysm.sweeps.locks import is_held
from aneurysm.sweeps.overview import experiment_status, read_progress, sweep_status
from aneurysm.sweeps.plan import open_plan

SETTINGS = {"stage": "vessel", "trainer": {"progress": "none"}}
# Another process that runs the job of a plan until it is told to end.
RUNNING = """
import sys
from pathlib import Path
from aneurysm.sweeps.jobs import Job, uses_run
from aneurysm.sweeps.plan import read_plan
plan = read_plan(Path(sys.argv[1]))
job = Job(plan, plan.jobs[int(sys.argv[2])])
with job.alone(), job.running({"stage": "vessel"}):
    uses_run(plan.experiment / "vessel" / "net-1" / "fold_3", trains=True)
    print("running", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def plan(tmp_path):
    return open_plan(tmp_path, "python train.py -m stage=vessel fold=0,1,2,3,4", jobs_of(5))


def jobs_of(count):
    return [["stage=vessel", f"fold={k}"] for k in range(count)]


def run(plan, number, error=None, seconds=None):
    job = Job(plan, plan.jobs[number])
    with contextlib.suppress(type(error) if error else ()), job.alone(), job.running(SETTINGS):
        uses_run(plan.experiment / "vessel" / "net-1" / f"fold_{number}", trains=True)
        if error is not None:
            raise error
        job.scored(0.5)
    if seconds is not None:
        path = plan.folder / "jobs" / f"{plan.jobs[number].id}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": seconds}))


def test_every_state_is_told_from_another_process(plan, tmp_path):
    run(plan, 0, seconds=100.0)
    run(plan, 1, UserError("no training scan has a vessel mask"))
    run(plan, 2, SystemExit(75))
    other = subprocess.Popen(
        [sys.executable, "-c", RUNNING, str(plan.folder), "3"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == "running\n"
    status = sweep_status(plan)
    assert [j.state for j in status.jobs] == ["done", "failed", "interrupted", "running", "to do"]
    # One runs and has about 100 s to go, two wait: what was interrupted and what never began.
    assert 290 < (status.seconds_left or 0) <= 300
    assert status.jobs[1].error == "no training scan has a vessel mask"
    assert status.jobs[1].command == "python train.py stage=vessel fold=1"
    other.kill()
    other.wait()
    assert sweep_status(plan).jobs[3].state == "killed"
    assert main([str(tmp_path)]) == 1
    # The folder of the failed job failed too; it is told once.
    folder = tmp_path / "vessel" / "net-1" / "fold_1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "failed.json").write_text(json.dumps({"error": "no training scan has a vessel mask"}))
    assert [job.label for job in experiment_status(tmp_path).failed] == ["fold=1"]


def test_a_job_waits_for_the_process_that_runs_it(plan):
    other = subprocess.Popen(
        [sys.executable, "-c", RUNNING, str(plan.folder), "0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None and other.stdin is not None
    other.stdout.readline()
    job = Job(plan, plan.jobs[0])
    other.stdin.write("\n")
    other.stdin.flush()
    with job.alone():
        assert job.record.state == "done" and job.record.attempts == 1
    other.wait()


def test_a_failure_keeps_its_traceback_and_its_configuration(plan):
    run(plan, 1, ValueError("first line\nsecond line"))
    record = read_record(plan, plan.jobs[1])
    assert record is not None and record.error == "ValueError: first line second line"
    assert "in run" in (record.traceback or "") and record.config == SETTINGS
    run(plan, 1)
    record = read_record(plan, plan.jobs[1])
    assert record is not None and (record.state, record.attempts, record.error) == ("done", 2, None)


@pytest.mark.parametrize("change", ["settings", "labels", "scans", "folds", "run folder", "progress"])
def test_a_finished_job_is_looked_at_again_when_something_changed(tmp_path, change):
    data = tmp_path / "data"
    (data / "series").mkdir(parents=True)
    (data / "train.csv").write_text("a")
    settings = {"seed": 0, "data": {"root": str(data)}, "trainer": {"progress": "none", "precision": "32"}}
    plan = open_plan(tmp_path / "experiment", "command", [["fold=0"]])
    folder = tmp_path / "experiment" / "vessel" / "net-1" / "fold_0"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{}")
    job = Job(plan, plan.jobs[0])
    with job.alone(), job.running(settings):
        uses_run(folder, trains=True)
    assert job.is_done(settings)
    if change == "settings":
        settings = {**settings, "seed": 1}
    elif change == "labels":
        (data / "train.csv").write_text("ab")
    elif change == "scans":
        (data / "series" / "new").mkdir()
    elif change == "folds":
        (tmp_path / "experiment" / "folds-2-seed0.csv").write_text("x")
    elif change == "run folder":
        (folder / "done.json").unlink()
    else:
        settings = {**settings, "trainer": {"progress": "lines", "precision": "32"}}
    assert job.is_done(settings) == (change == "progress")


def test_runs_outside_of_sweeps_are_seen_too(tmp_path, capsys):
    runs = {
        k: StageRun("vessel", k, tmp_path / "vessel" / "unet-0badc0de" / f"fold_{k}", "0badc0de")
        for k in range(4)
    }
    for one in runs.values():
        one.begin({"upstream": {}})
    runs[0].finish({"dice": 0.9, "seconds": 60.0})
    (tmp_path / "vessel" / "unet-0badc0de" / "fold_0.before-20260101-000000").mkdir()
    note = {"error": "CUDA out of memory", "attempt": 2, "command": "python train.py stage=vessel"}
    (runs[1].folder / "failed.json").write_text(json.dumps(note))
    with runs[2].alone():
        status = experiment_status(tmp_path)
        assert [j.state for j in status.runs[0].jobs] == ["done", "failed", "running", "killed"]
        assert main([str(tmp_path)]) == 1
        said = capsys.readouterr().out
        assert "CUDA out of memory" in said and "again: python train.py stage=vessel" in said
    assert json.loads(json.dumps(plain(status)))["failed"] == 1


def test_a_bad_path_is_code_2_and_names_what_is_near(tmp_path, capsys):
    (tmp_path / "phantom" / "sweeps").mkdir(parents=True)
    assert main([str(tmp_path / "phantm")]) == 2
    assert str(tmp_path / "phantom") in capsys.readouterr().err
    assert main([str(tmp_path / "phantom")]) == 2
    open_plan(tmp_path / "phantom", "command", jobs_of(1))
    assert main([str(tmp_path)]) == 0


def test_looking_loads_no_framework(plan):
    code = (
        "import sys; from aneurysm.status import main; code = main([sys.argv[1]])\n"
        "heavy = {'torch', 'lightning', 'hydra', 'omegaconf', 'numpy', 'pandas'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(plan.experiment)], check=True, capture_output=True)


class Line(pl.LightningModule):
    """The smallest thing that Lightning fits; ends the process's fit on request."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.net, self.stop_at = nn.Linear(1, 1), stop_at

    def training_step(self, batch, index):
        if self.stop_at == (self.current_epoch, index):
            raise RuntimeError("stopped")
        time.sleep(0.005)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_progress_tells_epoch_step_and_time_left(tmp_path):
    run = StageRun("vessel", 2, tmp_path / "fold_2", "0badc0de")
    run.folder.mkdir()
    data = DataLoader(TensorDataset(torch.ones(40, 1)), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[ProgressFile(run, every=0)],
        enable_model_summary=False,
        **quiet,
    )
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(Line(stop_at=(1, 5)), data)
    progress = read_progress(run.folder)
    assert progress is not None
    assert (progress.epoch, progress.epochs, progress.step, progress.steps) == (2, 4, 5, 10)
    # 15 of 40 steps are done.
    assert progress.seconds_per_step >= 0.005
    assert progress.seconds_left == pytest.approx(25 * progress.seconds_per_step, abs=0.06)
    assert time.time() - progress.updated < 60


def test_progress_is_written_at_most_every_few_seconds(tmp_path):
    run = StageRun("vessel", 0, tmp_path / "fold_0", "0badc0de")
    run.folder.mkdir()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            file = run.folder / "progress.json"
            seen.append(file.stat().st_mtime_ns if file.exists() else 0)

    data = DataLoader(TensorDataset(torch.ones(100, 1)), batch_size=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [ProgressFile(run, every=30), Watch()]
    pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet).fit(
        Line(), data
    )
    assert len(seen) == 100 and len(set(seen)) <= 2  # the first and the last step


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    lock = tmp_path / ".lock"
    assert not is_held(lock)
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire()\n"
        "print(1, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    assert is_held(lock)
    os.kill(other.pid, 9)
    other.wait()
    assert not is_held(lock)


def test_the_processes_of_one_job_note_their_folders_in_its_record(plan):
    code = (
        "import sys; from pathlib import Path; from aneurysm.sweeps.jobs import command_line, uses_run\n"
        "uses_run(Path(sys.argv[1]), trains=True); print(command_line())"
    )
    job = Job(plan, plan.jobs[2])
    with job.alone(), job.running(SETTINGS):
        for rank in ("0", "1"):
            folder = plan.experiment / "vessel" / f"of-process-{rank}" / "fold_2"
            worker = [sys.executable, "-c", code, str(folder)]
            environment = {**os.environ, "RANK": rank}
            said = subprocess.run(worker, check=True, capture_output=True, text=True, env=environment)
            assert said.stdout.strip() == "python train.py stage=vessel fold=2"
        job.scored(0.25)
    record = read_record(plan, plan.jobs[2])
    assert record is not None and (record.state, record.score) == ("done", 0.25)
    assert record.trained == ["vessel/of-process-0/fold_2"]
