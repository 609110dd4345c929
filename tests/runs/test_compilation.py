"""`trainer.compile`: the same training in compiled steps, of which nothing is left afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch._dynamo import register_backend
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader

from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.settings import stage_key
from aneurysm.stages.draws import drawn_batches
from aneurysm.stages.step import StepOutput, adamw_one_cycle, log_step

ROOT = Path(__file__).parents[2]
EPOCHS, STEPS = 2, 3
seen = {"graphs": 0, "runs": 0}


@register_backend
def counting(graph, inputs):
    """aot_eager that says how often it was asked and how often it ran."""
    seen["graphs"] += 1
    compiled = aot_eager(graph, inputs)

    def run(*arguments):
        seen["runs"] += 1
        return compiled(*arguments)

    return run


@register_backend
def breaking(graph, inputs):
    raise RuntimeError("no kernel for this.\nmore lines")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def training_step(self, batch, index):
        return log_step(self, StepOutput((self.net(batch) - 1).square().mean()), "train", len(batch))

    def validation_step(self, batch, index):
        log_step(self, StepOutput((self.net(batch) - 1).square().mean()), "val", len(batch))

    def configure_optimizers(self):
        return adamw_one_cycle(self.parameters(), 0.05, 0.01, EPOCHS * STEPS)


class Patches:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        return torch.randn(1, 8, 8, 8, generator=generator)


class Data(LightningDataModule):
    def train_dataloader(self):
        assert self.trainer is not None
        batches = drawn_batches(self.trainer, STEPS, 2)
        return DataLoader(Patches(self.trainer.current_epoch), batch_sampler=batches)

    def val_dataloader(self):
        return DataLoader([torch.ones(1, n, 7, 7) for n in (7, 9)], batch_size=1)


@pytest.fixture(scope="module")
def settings():
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield lambda *overrides: hydra.compose(
            "train", overrides=["trainer.progress=none", "trainer.threads=1", *overrides]
        )


def train(folder: Path, cfg, epochs: int = EPOCHS) -> Net:
    folder.mkdir(parents=True, exist_ok=True)
    run = StageRun("vessel", 1, folder, "key")
    seed_weights(0, run)
    net = Net()
    fit(run, net, Data(), epochs, cfg)
    return net


def equal(one: Net, other: Net) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_training_steps_are_compiled_and_nothing_else(tmp_path, settings, ema):
    seen.update(graphs=0, runs=0)
    plain = train(tmp_path / "plain", settings(f"ema={ema}"))
    assert seen["runs"] == 0
    compiled = train(tmp_path / "compiled", settings(f"ema={ema}", "trainer.compile=counting"))
    assert seen == {"graphs": 1, "runs": EPOCHS * STEPS}  # validation, at two other sizes, is not among them
    compiled.net(torch.ones(1, 1, 12, 9, 9))
    assert seen["runs"] == EPOCHS * STEPS and compiled.net._compiled_call_impl is None
    ours, theirs = compiled.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_compiled_training_goes_on_bit_by_bit(tmp_path, settings):
    cfg = settings("trainer.compile=aot_eager")
    whole = train(tmp_path / "whole", cfg)
    train(tmp_path / "parts", cfg, 1)
    assert equal(train(tmp_path / "parts", cfg), whole)
    # A checkpoint does not know what it was compiled with.
    train(tmp_path / "mixed", cfg, 1)
    mixed = train(tmp_path / "mixed", settings())
    torch.testing.assert_close(mixed.net.layers[0].weight, whole.net.layers[0].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("setting", ["trainer.compile=true", "smart_net.net.recompute=true"])
def test_neither_compiling_nor_recomputing_makes_another_run(settings, setting):
    assert stage_key(settings(setting), "expert", "d") == stage_key(settings(), "expert", "d")


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("inductr", r"trainer\.compile=inductr: no such backend .*inductor"),
        (
            "breaking",
            r"trainer\.compile=breaking: RuntimeError: no kernel for this\. .*trainer\.compile=false",
        ),
    ],
)
def test_errors_teach(tmp_path, settings, backend, said):
    with pytest.raises(UserError, match=said):
        train(tmp_path, settings(f"trainer.compile={backend}"))


def run(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "experiment=smoke",
            "stage=vessel",
            "fold=0",
            "vessel.net.widths=[4,8]",
            "logger=none",
            f"paths.outputs={folder}",
            *overrides,
        ],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.compile=true",),
        ("trainer.compile=aot_eager", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"),
        ("trainer.compile=aot_eager", "trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"),
    ],
)
def test_the_vessel_stage_trains_compiled(tmp_path, overrides):
    done = run(tmp_path, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recompile_limit" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_without_a_compiler_says_so(tmp_path):
    done = run(tmp_path, "trainer.compile=true", CXX="no-such-compiler")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "no-such-compiler" in said and "trainer.compile=false" in said and "Traceback" not in said, said
