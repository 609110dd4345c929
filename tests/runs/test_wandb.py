"""W&B offline: one run per fold of a job, found again in the files that would be uploaded.

Everything runs without a network and without anybody to answer a prompt.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.runs.folders import stage_run
from aneurysm.runs.loggers import open_wandb, option_name, wandb_id
from aneurysm.runs.settings import run_record

ROOT = config_folder().parent
pytestmark = pytest.mark.timeout(900)  # processes of their own, on machines that may be busy


@dataclass
class Read:
    """What one .wandb file says."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)  # metric -> its x axis
    exit_code: int | None = None  # None: killed
    preempting: bool = False


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of protocol buffers with a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert not data or data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        if len(part) < length or not kind:
            return  # a killed process wrote no more
        assert zlib.crc32(bytes([kind]) + part) == checksum
        whole = part if kind in (1, 2) else whole + part  # 1 whole, 2 first, 3 middle, 4 last
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def read(path: Path) -> Read:
    found = Read()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found.history.append(row)
        elif kind == "summary":
            for u in record.summary.update:
                found.summary["/".join(u.nested_key) or u.key] = json.loads(u.value_json)
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "preempting":
            found.preempting = True
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def runs_in(folder: Path) -> list[Read]:
    """Every run directory below a folder, oldest first."""
    files = sorted(folder.rglob("offline-run-*/run-*.wandb"), key=lambda p: p.parent.name)
    return [read(f) for f in files]


def alone(arguments: list[str], timeout: int, **environment: str) -> subprocess.CompletedProcess:
    """Run Python without a network, or with W&B's server unreachable where that is not allowed; no stdin."""
    cut_off = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*cut_off, "true"], capture_output=True).returncode:
        cut_off = []
        environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", **environment}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [*cut_off, sys.executable, *arguments],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


SWEEP = """
import os, signal, sys
import hydra, torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader
from aneurysm.command_line import config_folder
from aneurysm.runs.fit import fit
from aneurysm.runs.folders import stage_run
from aneurysm.runs.record import illustrate, log_of, recorded
from aneurysm.runs.settings import run_record

class Slope(LightningModule):
    def __init__(self, kill_at):
        super().__init__()
        self.weight, self.kill_at = torch.nn.Parameter(torch.zeros(1)), kill_at
    def training_step(self, batch, index):
        if self.current_epoch == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = (self.weight - 1).square().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.zeros(2, 1), num_workers=1)  # forked beside the open run

def job(value, fold, epochs, kill_at=None, error=None):
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[
            f"paths.outputs={sys.argv[1]}", "experiment_name=tiny", f"oscillator_dim={value}",
            "logger=[csv,wandb]", "logger.wandb.tags=[july]", "trainer.progress=none"])
    run = stage_run(cfg, "expert", fold, "data")
    run.begin(run_record(cfg, "expert", "data"))
    with recorded(run, cfg) as run:
        fit(run, Slope(kill_at), Data(), epochs, cfg)
        if error is not None:
            raise error
        log_of(run).summary({"candidate_auc": 0.75})

def attempt(*arguments, **named):
    try:
        job(*arguments, **named)
    except BaseException as error:
        print("ended by", repr(error))

for value, fold in ((2, 0), (2, 1), (4, 0), (4, 1)):
    job(value, fold, epochs=2)
attempt(8, 0, epochs=1, error=ValueError("no good"))
attempt(8, 1, epochs=1, error=SystemExit(75))
import wandb
assert wandb.run is None
print("went on", flush=True)
job(16, 0, epochs=3, kill_at=2)
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two jobs of two folds, a failed one, a preempted one and one killed in its third epoch and resumed."""
    folder = tmp_path_factory.mktemp("sweep")
    killed = alone(["-c", SWEEP, str(folder)], timeout=400)
    assert "went on" in killed.stdout, killed.stderr[-3000:]
    assert killed.returncode == -9
    assert "wandb:" not in killed.stdout + killed.stderr  # no banner, no question
    again = SWEEP[: SWEEP.index("for value, fold in")] + "job(16, 0, epochs=3)\n"
    resumed = alone(["-c", again, str(folder)], timeout=400)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return folder / "tiny" / "expert"


def job_folder(sweep: Path, dim: int) -> Path:
    return next(f for f in sweep.iterdir() if f"akornblock{dim}-" in f.name)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 4])
def test_every_fold_of_every_job_is_a_run_of_its_own(sweep, dim):
    folder = job_folder(sweep, dim)
    runs = runs_in(folder)
    assert [r.run.display_name for r in runs] == ["fold_0", "fold_1"]
    assert len({r.run.run_id for r in runs}) == 2
    for fold, one in enumerate(runs):
        assert one.run.project == "aneurysm"
        assert one.run.run_group == f"tiny/expert/{folder.name}"
        assert one.run.job_type == "expert"
        assert {
            "tiny",
            "expert",
            "july",
            "loss=tversky",
            "fusion=cross_attention",
            "oscillator=akorn",
        } <= set(one.run.tags)
        assert one.config["fold"] == fold and one.config["oscillator_dim"] == dim
        assert one.config["seed"] == 0 and "torch" in one.config["versions"]
        assert one.config["expert"]["epochs"] > 0 and "vessel" not in one.config  # what the stage reads
        assert one.axes["*"] == "epoch"
        assert [row["epoch"] for row in one.history if "train/loss" in row] == [0, 1]
        assert all("trainer/global_step" in row for row in one.history if "train/loss" in row)
        assert one.summary["candidate_auc"] == 0.75
        assert one.exit_code == 0


@pytest.mark.slow
def test_a_failed_and_a_preempted_job_say_so(sweep):
    failed, preempted = runs_in(job_folder(sweep, 8))
    assert failed.exit_code == 1 and not failed.preempting
    assert preempted.exit_code == 75 and preempted.preempting


@pytest.mark.slow
def test_a_resumed_run_goes_on_under_its_id(sweep):
    files = sorted(job_folder(sweep, 16).rglob("offline-run-*/run-*.wandb"), key=lambda p: p.parent.name)
    assert len(files) == 2 and files[0].name == files[1].name  # the id is in the name
    first, second = (read(f) for f in files)
    assert first.exit_code is None and second.exit_code == 0
    assert second.run.run_id in files[0].name
    # The explicit axis says where the second part belongs.
    assert [row["epoch"] for row in second.history if "train/loss" in row] == [2]


@pytest.mark.slow
def test_runs_of_a_sweep_lie_in_their_folders_and_name_no_path_of_the_machine(sweep):
    for file in sweep.rglob("run-*.wandb"):
        content = b"".join(r.SerializeToString() for r in records(file))
        for leak in (str(ROOT), str(sweep), os.path.expanduser("~") + "/"):
            assert leak.encode() not in content


def compose(tmp_path, *overrides):
    import hydra

    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=[f"paths.outputs={tmp_path}", "logger=wandb", *overrides])


def test_the_id_is_kept_with_the_folder_and_new_after_a_new_start(tmp_path):
    cfg = compose(tmp_path)
    run = stage_run(cfg, "vessel", 1, "data")
    run.begin(run_record(cfg, "vessel", "data"))
    first = wandb_id(run)
    assert wandb_id(stage_run(cfg, "vessel", 1, "data")) == first
    assert first.startswith(f"vessel-{run.key}-fold1-") and not set(first) & set("/\\#?%:")
    run.begin(run_record(cfg, "vessel", "data"), force=True)
    assert wandb_id(run) != first


def test_an_unknown_mode_is_refused(tmp_path, monkeypatch):
    run = stage_run(compose(tmp_path), "vessel", 0, "data")
    with pytest.raises(UserError, match=r"logger\.wandb\.mode=offlin"):
        open_wandb(run, compose(tmp_path, "logger.wandb.mode=offlin"))
    monkeypatch.setenv("WANDB_MODE", "nowhere")
    with pytest.raises(UserError, match="WANDB_MODE=nowhere"):
        open_wandb(run, compose(tmp_path))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("aneurysm.losses.tversky.FocalTverskyLoss", "focal_tversky"),
        ("aneurysm.losses.dice_ce.DiceCELoss", "dice_ce"),
        ("aneurysm.nets.fusion.CrossAttentionFusion", "cross_attention"),
        ("aneurysm.build.absent", "none"),
        ("aneurysm.losses.balance.UwSo", "uw_so"),
    ],
)
def test_options_are_tagged_by_a_readable_name(target, name):
    assert option_name(target) == name


@pytest.mark.slow
def test_a_real_multirun_leaves_a_run_per_fold_and_skips_what_is_finished(tmp_path):
    command = [
        "train.py", "-m", "experiment=smoke", "stage=pretrain", "data.patients=4", "logger=[wandb]",
        "masking.ratio=0.6,2.0,0.7", f"paths.outputs={tmp_path}",
    ]  # fmt: skip
    first = alone(command, timeout=1200)
    assert first.returncode == 1  # one job cannot work
    runs = runs_in(tmp_path)
    by_ratio: dict[float, list[Read]] = {}
    for one in runs:
        by_ratio.setdefault(one.config["masking"]["ratio"], []).append(one)
    assert [r.exit_code for r in by_ratio[0.6] + by_ratio[0.7]] == [0] * 4
    assert by_ratio[2.0] and {r.exit_code for r in by_ratio[2.0]} == {1}
    for one in by_ratio[0.6]:
        assert any("figures/reconstructions/path" in row for row in one.history)
        assert one.summary["seconds"] > 0
    assert len({r.run.run_group for r in by_ratio[0.6]}) == 1
    assert first.stdout.count("wandb sync") >= 1
    good = [c.replace("0.6,2.0,0.7", "0.6,0.7") for c in command]
    assert alone(good, timeout=600).returncode == 0
    assert len(runs_in(tmp_path)) == len(runs)  # nothing was run again, so nothing was recorded


@pytest.mark.slow
def test_an_unreachable_server_costs_seconds_and_nothing_else(tmp_path):
    command = [
        "train.py", "experiment=smoke", "stage=pretrain", "fold=0", "data.patients=4", "logger=wandb",
        "logger.wandb.mode=online", "logger.wandb.timeout_s=5", f"paths.outputs={tmp_path}",
    ]  # fmt: skip
    closed = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    refused = alone(command, timeout=600, **closed)
    assert refused.returncode == 1 and "wandb login" in refused.stdout  # no key, and no question
    done = alone(command, timeout=600, WANDB_API_KEY="0" * 40, **closed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recorded offline" in done.stdout
    assert runs_in(tmp_path)[-1].exit_code == 0
