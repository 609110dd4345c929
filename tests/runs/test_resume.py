"""A fit that is killed, told to leave, or runs out of disk goes on to the same weights, bit by bit.

Every training runs in a process of its own, forked from this one, so that it can really be killed.
"""

import logging
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.losses.balance import UwSo
from aneurysm.runs.checkpoints import CheckpointFiles, damage
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.metrics import read_metrics
from aneurysm.stages.draws import drawn_batches
from aneurysm.stages.step import StepOutput, adamw_one_cycle, log_step
from aneurysm.stages.workers import in_workers

EPOCHS, STEPS = 3, 4


class Net(LightningModule):
    """Draws from every generator there is, and has a balance with a memory and running statistics."""

    def __init__(self, signals: dict[tuple[int, int], int] | None = None, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 2)
        )
        self.balance, self.signals = UwSo(calibrate=True, calibration_steps=7), signals or {}

    def training_step(self, batch, index):
        if (number := self.signals.get((self.current_epoch, index))) is not None:
            # A scheduler's signal reaches every process of the job.
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for pid in (*map(int, children), os.getpid()):
                os.kill(pid, number)
        out = self.net(batch) + float(np.random.normal()) * 0.1 + random.random() * 0.1
        terms = {"a": (out[:, 0] - 1).square().mean(), "b": (out[:, 1] + batch.sum(1)).square().mean()}
        if index % 2:  # one that not every batch has
            terms["c"] = out.abs().mean()
        total, _ = self.balance(terms)
        return log_step(self, StepOutput(total, {k: v.detach() for k, v in terms.items()}), "train", 3)

    def validation_step(self, batch, index):
        log_step(self, StepOutput((self.net(batch) * torch.rand(1)).square().mean()), "val", 3)

    def configure_optimizers(self):
        return adamw_one_cycle(self.parameters(), 0.05, 0.01, EPOCHS * STEPS)


class Draws(Dataset):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng((self.epoch, index)).normal(size=4).astype(np.float32))


class Data(LightningDataModule):
    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self):
        assert self.trainer is not None
        batches = drawn_batches(self.trainer, STEPS, 3)
        return DataLoader(
            Draws(self.trainer.current_epoch), batch_sampler=batches, **in_workers(self.workers)
        )

    def val_dataloader(self):
        return DataLoader([torch.ones(4)] * 6, batch_size=3)


@pytest.fixture(scope="module")
def settings():
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield lambda *overrides: hydra.compose(
            "train",
            overrides=["trainer.progress=none", "trainer.threads=1", "checkpoint.every_steps=1", *overrides],
        )


def run_in(folder: Path) -> StageRun:
    return StageRun("vessel", 1, folder, "key")


def train(folder: Path, cfg, **settings) -> Net:
    folder.mkdir(parents=True, exist_ok=True)
    run = run_in(folder)
    seed_weights(0, run)
    net = Net(**settings)
    fit(run, net, Data(cfg.trainer.workers), EPOCHS, cfg)
    torch.save(net.state_dict(), folder / "end.pt")
    return net


class Started:
    """A training in a process of its own; `signals` are sent to it within its steps (epoch, batch)."""

    def __init__(self, folder: Path, cfg, **settings) -> None:
        limit = settings.pop("limit", None)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
        try:
            with (folder / "said.txt").open("a") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                logging.basicConfig(level=logging.INFO, stream=said, force=True)
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                train(folder, cfg, **settings)
                code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except BaseException:
            with (folder / "said.txt").open("a") as said:
                traceback.print_exc(file=said)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self) -> int:
        """Exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()


def killed(folder: Path, cfg) -> None:
    """A training that was killed in the middle of its second epoch."""
    assert Started(folder, cfg, signals={(1, 2): signal.SIGKILL}).wait() == -signal.SIGKILL


def position(path: Path) -> tuple[int, int]:
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_progress"]["current"]["processed"], loops["epoch_loop.batch_progress"]["current"][
        "processed"
    ]


def same(a: Path, b: Path) -> bool:
    first, second = torch.load(a / "end.pt"), torch.load(b / "end.pt")
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) if isinstance(v, torch.Tensor) else v == second[k] for k, v in first.items()
    )


def losses(folder: Path) -> pd.DataFrame:
    table = read_metrics(folder / "metrics.jsonl")
    columns = ["train/loss", "train/c", "val/loss"]
    return table.groupby("epoch")[columns].last()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, settings):
    """End of a training that nothing happened to, by overrides."""
    made: dict[tuple[str, ...], Path] = {}

    def end(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("undisturbed")
            assert Started(made[overrides], settings(*overrides)).wait() == 0
        return made[overrides]

    return end


@pytest.mark.parametrize("overrides", [(), ("ema=0.9",), ("trainer.workers=2",)], ids=str)
def test_killed_twice_within_epochs_ends_with_the_same_weights(tmp_path, settings, undisturbed, overrides):
    cfg = settings(*overrides)
    for step in ((0, 2), (1, 3)):
        assert Started(tmp_path, cfg, signals={step: signal.SIGKILL}).wait() == -signal.SIGKILL
        assert position(tmp_path / "last.ckpt") == step and not (tmp_path / "end.pt").exists()
    assert Started(tmp_path, cfg).wait() == 0
    # Random numbers do not depend on where batches are loaded.
    assert same(tmp_path, undisturbed(*(o for o in overrides if "workers" not in o)))


def test_the_curve_of_an_interrupted_epoch_is_that_of_the_whole_epoch(tmp_path, settings, undisturbed):
    cfg = settings()
    killed(tmp_path, cfg)
    assert Started(tmp_path, cfg).wait() == 0
    whole = losses(undisturbed())
    assert len(whole) == EPOCHS
    np.testing.assert_array_equal(losses(tmp_path)["train/loss"], whole["train/loss"])
    np.testing.assert_array_equal(losses(tmp_path)["train/c"], whole["train/c"])


def test_averaged_weights_are_used_and_handed_over_even_by_a_fit_that_had_ended(
    tmp_path, settings, undisturbed
):
    averaged = undisturbed("ema=0.9")
    assert not same(averaged, undisturbed())
    # By hand: the average of what the network was after every step.
    checkpoint = torch.load(averaged / "last.ckpt", weights_only=True)
    end = torch.load(averaged / "end.pt")
    for name in ("net.0.weight", "net.4.bias"):
        assert torch.equal(end[name], checkpoint["state_dict"][name])
        assert not torch.equal(end[name], checkpoint["current_model_state"][name])
    # Interrupted after its last step: nothing is left to train, and the average still arrives.
    os.replace(averaged / "last.ckpt", tmp_path / "last.ckpt")
    assert Started(tmp_path, settings("ema=0.9")).wait() == 0
    assert same(tmp_path, averaged)
    os.replace(tmp_path / "last.ckpt", averaged / "last.ckpt")


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)], ids=str
)
def test_a_signal_saves_and_asks_to_be_requeued(tmp_path, settings, undisturbed, number, workers):
    # No rule but the signal: the checkpoint must be the signal's.
    cfg = settings("checkpoint.every_steps=null", f"trainer.workers={workers}")
    one = Started(tmp_path, cfg, signals={(1, 1): number})
    assert one.wait() == 75
    assert position(tmp_path / "last.ckpt") == (1, 2)
    assert number.name in one.said and "Traceback" not in one.said
    assert Started(tmp_path, settings("trainer.workers=0")).wait() == 0
    assert same(tmp_path, undisturbed())


def test_another_ones_handler_is_left_alone(tmp_path, settings):
    heard = []
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        for n in before:
            signal.signal(n, lambda number, frame: heard.append(number))
        mine = {n: signal.getsignal(n) for n in before}
        train(tmp_path, settings(), signals={(0, k): n for k, n in enumerate(before)})
        assert sorted(heard) == sorted(before)
        assert {n: signal.getsignal(n) for n in before} == mine
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_ctrl_c_is_an_interruption_of_the_command(tmp_path, settings, undisturbed):
    cfg = settings()
    one = Started(tmp_path, cfg, signals={(1, 2): signal.SIGINT})
    assert one.wait() == 1
    assert one.said.rstrip().endswith("KeyboardInterrupt")
    assert position(tmp_path / "last.ckpt") == (1, 2)
    assert Started(tmp_path, cfg).wait() == 0
    assert same(tmp_path, undisturbed())


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    else:  # one bit of a weight
        weight = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"].numpy().tobytes()
        content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "one bit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, settings, undisturbed, how):
    cfg = settings()
    killed(tmp_path, cfg)
    before = (tmp_path / "previous.ckpt").read_bytes()
    damaged(tmp_path / "last.ckpt", how)
    assert Started(tmp_path, cfg).wait() == 0
    said = (tmp_path / "said.txt").read_text()
    assert str(tmp_path / "last.ckpt") in said and str(tmp_path / "previous.ckpt") in said
    assert len(list(tmp_path.glob("damaged-*.ckpt"))) == 1
    assert before and same(tmp_path, undisturbed())


def test_a_kill_between_the_two_renames_loses_one_step_only(tmp_path, settings, undisturbed):
    cfg = settings()
    killed(tmp_path, cfg)
    os.replace(tmp_path / "last.ckpt", tmp_path / "previous.ckpt")
    (tmp_path / ".123.part.last.ckpt").write_bytes(b"half")
    assert Started(tmp_path, cfg).wait() == 0
    assert same(tmp_path, undisturbed())
    assert not list(tmp_path.glob(".*.part.*"))


def test_training_does_not_begin_anew_over_damaged_checkpoints(tmp_path, settings):
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"last\.ckpt.*previous\.ckpt.*force=true"):
        train(tmp_path, settings())
    assert (tmp_path / "last.ckpt").read_bytes() == b"not a checkpoint"


def test_a_checkpoint_of_another_network_is_refused_with_the_fix(tmp_path, settings, undisturbed):
    (tmp_path / "last.ckpt").write_bytes((undisturbed() / "last.ckpt").read_bytes())
    with pytest.raises(UserError, match=r"net\.0\.weight is \(8, 4\), not \(5, 4\).*force=true"):
        train(tmp_path, settings(), width=5)
    old = torch.load(undisturbed() / "last.ckpt", weights_only=True)
    del old["callbacks"]["Checkpoints"]
    torch.save(old, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"another version.*force=true"):
        train(tmp_path, settings())


def test_a_full_disk_is_reported_and_costs_neither_training_nor_checkpoint(tmp_path, settings, undisturbed):
    cfg = settings()
    killed(tmp_path, cfg)
    kept = (tmp_path / "last.ckpt").read_bytes()
    # Files can no longer grow to the size of a checkpoint: what EFBIG says here, ENOSPC says on a full disk.
    full = Started(tmp_path, cfg, limit=len(kept) // 2)
    assert full.wait() == 1  # the last one could not be written
    assert full.said.count("could not be written") >= 6  # it went on and tried again after every step
    assert "MiB are free" in full.said and "UserError" in full.said and "make room" in full.said
    assert (tmp_path / "last.ckpt").read_bytes() == kept
    assert not list(tmp_path.glob(".*.part.*")) and not (tmp_path / "end.pt").exists()
    assert Started(tmp_path, cfg).wait() == 0
    assert same(tmp_path, undisturbed())


def test_every_single_flipped_byte_that_matters_is_noticed(tmp_path):
    files = CheckpointFiles(tmp_path)
    files.save_checkpoint({"state_dict": {"w": torch.arange(50.0)}, "n": [1, 2.5, "text"]})
    whole = files.last.read_bytes()
    assert damage(files.last) is None
    other = tmp_path / "flipped"
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 0x10
        other.write_bytes(content)
        if damage(other) is None:  # padding, or a field that the directory at the end repeats
            loaded = torch.load(other, weights_only=True)
            assert torch.equal(loaded["state_dict"]["w"], torch.arange(50.0)) and loaded["n"] == [
                1,
                2.5,
                "text",
            ]
