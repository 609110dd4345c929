"""The local file survives kills and resumes; CSV, TensorBoard and figures are what was logged."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from aneurysm.command_line import config_folder, override_problem
from aneurysm.data.errors import UserError
from aneurysm.runs.folders import stage_run
from aneurysm.runs.metrics import FILE, JsonLines, read_metrics
from aneurysm.runs.record import RunLog, illustrate, recorded


def compose(tmp_path, *overrides):
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=[f"paths.outputs={tmp_path}", *overrides])


@pytest.mark.parametrize(
    ("override", "kinds"),
    [
        ("logger=csv", ["csv"]),
        ("logger=none", []),
        ("logger=tensorboard", ["tensorboard"]),
        ("logger=wandb", ["wandb"]),
        ("logger=[csv,wandb]", ["csv", "wandb"]),
        ("logger=[csv, wandb]", ["csv", "wandb"]),
    ],
)
def test_loggers_are_chosen_one_by_one_or_as_a_list(tmp_path, override, kinds):
    for arguments in ([override], ["-m", override, "seed=0,1"]):
        assert override_problem("train", arguments) is None
    chosen = compose(tmp_path, override).logger
    assert sorted(k for k in chosen if k != "figures") == kinds
    assert chosen.figures == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["logger=[csv,wandv]"], "wandb"),
        (["logger=tensorbord"], "tensorboard"),
        (["logger=csv,wandb"], "logger=[csv,wandb]"),
        (["-m", "logger=csv,wandb"], "logger=[csv,wandb]"),
        (["loss=[tversky,dice_ce]"], "one option"),
        (["logger=csv", "logger.wandb.mode=online"], "nothing would read it"),
    ],
)
def test_a_wrong_choice_of_loggers_is_refused(arguments, expected):
    problem = override_problem("train", arguments)
    assert problem is not None and expected in problem and "\n" not in problem


class Slope(LightningModule):
    """Fits one number; every epoch logs what it is, so that a curve says where it comes from."""

    def __init__(self, target: float) -> None:
        super().__init__()
        self.weight, self.target = torch.nn.Parameter(torch.zeros(1)), target

    def training_step(self, batch, index):
        loss = (self.weight - self.target).square().mean()
        self.log_dict({"train/loss": loss, "train/target": self.target}, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", (self.weight - self.target).abs().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KeepEpoch(Callback):
    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def train(log: RunLog, target: float, epochs: int, callbacks=(), resume=None) -> None:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=log.loggers("last"), callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(torch.zeros(3, 1))
    trainer.fit(Slope(target), data, data, ckpt_path=resume)


def test_what_a_killed_attempt_did_beyond_its_checkpoint_is_overruled(tmp_path):
    """Four epochs towards 1, then on from the second towards 2: the curve has 1, 1, 2, 2, 2."""
    log = RunLog(tmp_path, kinds=("csv", "tensorboard"))
    train(log, 1.0, 4, [KeepEpoch(1, tmp_path / "two.ckpt")])
    assert set(read_metrics(tmp_path / FILE).epoch) == {0, 1, 2, 3}
    train(log, 2.0, 5, resume=tmp_path / "two.ckpt")

    table = read_metrics(tmp_path / FILE)
    rows = table.dropna(subset="train/target")
    # An epoch's mean is logged after its checkpoint is written: both ran epoch 1 to its end.
    assert rows.epoch.tolist() == [0, 1, 2, 3, 4]
    assert rows["train/target"].tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert rows.step.is_monotonic_increasing and rows.step.is_unique
    assert table["val/loss"].notna().sum() == 5
    assert table.seconds.is_monotonic_increasing

    spreadsheet = pd.read_csv(tmp_path / "metrics.csv")
    pd.testing.assert_frame_equal(spreadsheet, table, check_dtype=False)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "last")).Reload()
    logged = events.Scalars("train/target")
    assert [e.value for e in logged] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert [e.step for e in logged] == rows.step.tolist()


def test_a_line_cut_by_a_kill_costs_that_line_only(tmp_path):
    file = tmp_path / FILE
    script = (
        "import os, signal; from pathlib import Path; from aneurysm.runs.metrics import JsonLines\n"
        f"logger = JsonLines(Path({str(file)!r}), 'last')\n"
        "for epoch in range(3):\n"
        "    logger.log_metrics({'train/loss': 3.0 - epoch, 'epoch': epoch}, step=4 * epoch + 3)\n"
        'logger._stream.write(\'{"fit": "last", "att\'); logger._stream.flush()\n'
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert file.read_text().endswith("att")
    assert read_metrics(file)["train/loss"].tolist() == [3.0, 2.0, 1.0]

    logger = JsonLines(file, "last")
    logger.log_metrics({"train/loss": 0.5, "epoch": 2}, step=11)
    logger.finalize("success")
    table = read_metrics(file)
    assert table["train/loss"].tolist() == [3.0, 2.0, 0.5]
    assert table.attempt.tolist() == [0, 0, 1]
    assert len(file.read_text().splitlines()) == 4  # nothing of the cut line is left


def test_values_that_are_not_finite_stay_what_they_are_in_strict_json(tmp_path):
    logger = JsonLines(tmp_path / FILE, "last")
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1}, step=None)
    logger.finalize("success")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    row = read_metrics(tmp_path / FILE).iloc[0]
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf and row["d"] == 1


def test_fits_of_one_run_do_not_overrule_each_other(tmp_path):
    for fit in ("last", "second", "last"):
        logger = JsonLines(tmp_path / FILE, fit)
        logger.log_metrics({"loss": 1.0, "epoch": 0}, step=0)
        logger.finalize("success")
    table = read_metrics(tmp_path / FILE)
    assert sorted(table.fit) == ["last", "second"]
    assert table.attempt.tolist() == [0, 1]


def test_a_run_without_metrics_has_an_empty_table(tmp_path):
    assert read_metrics(tmp_path / FILE).empty


def test_figures_and_tables_lie_in_the_run_folder_and_in_tensorboard(tmp_path):
    cfg = compose(tmp_path, "logger=tensorboard")
    run = stage_run(cfg, "vessel", 0, "data")
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])

    def draw(log: RunLog) -> None:
        log.figure("line", figure)
        log.table("numbers", pd.DataFrame({"a": [1, 2]}))

    with recorded(run, cfg) as open_run:
        illustrate(open_run, draw)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard" / "figures")).Reload()
    (image,) = events.Images("figures/line")
    assert (image.width, image.height) == (200, 100)
    assert (run.folder / "figures" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_csv(run.folder / "figures" / "numbers.csv").a.tolist() == [1, 2]


def test_a_figure_that_cannot_be_drawn_costs_a_warning(tmp_path, caplog):
    run = stage_run(compose(tmp_path), "vessel", 0, "data")

    def draw(log: RunLog) -> None:
        raise ValueError("no lesion to show")

    with recorded(run, compose(tmp_path)) as open_run, caplog.at_level("WARNING"):
        illustrate(open_run, draw)
    assert "no lesion to show" in caplog.text
    with recorded(run, compose(tmp_path, "logger.figures=0")) as open_run:
        caplog.clear()
        illustrate(open_run, draw)  # not even called
    assert not caplog.records


def test_a_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    cfg = compose(tmp_path, "logger=tensorboard")
    with (
        pytest.raises(UserError, match=r"aneurysm\[tensorboard\]"),
        recorded(stage_run(cfg, "vessel", 0, "data"), cfg),
    ):
        pass


def test_wandb_is_not_imported_unless_asked_for():
    script = "import sys, aneurysm.train; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
