"""Run folders: the same command lands in the same folder, another configuration in another one."""

import json
import subprocess
import sys

import hydra
import pytest

from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.runs.folders import stage_run
from aneurysm.runs.settings import run_record, stage_key
from aneurysm.train import training_curves


def compose(tmp_path, *overrides):
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=[f"paths.outputs={tmp_path}", *overrides])


def keys(tmp_path, *overrides):
    cfg = compose(tmp_path, *overrides)
    return {
        s: stage_key(cfg, s, "data")
        for s in ("pretrain", "vessel", "segmenter", "smart_net", "expert", "stacker")
    }


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("oscillator_dim=8", {"expert", "stacker"}),
        ("balance.temperature=5", {"expert", "stacker"}),
        ("graph_net=mlp", {"smart_net", "expert", "stacker"}),
        ("smart_net.max_candidates=5", {"smart_net", "expert", "stacker"}),
        ("smart_net.epochs=9", {"segmenter", "smart_net", "expert", "stacker"}),
        ("vessel.epochs=9", {"vessel", "segmenter", "smart_net", "expert", "stacker"}),
        ("masking.ratio=0.7", {"pretrain", "expert", "stacker"}),
        ("stacker.rounds=9", {"stacker"}),
        ("seed=1", {"pretrain", "vessel", "segmenter", "smart_net", "expert", "stacker"}),
        ("ema=0.99", {"pretrain", "vessel", "segmenter", "smart_net", "expert", "stacker"}),
        ("vessel.ema=0.99", {"vessel", "segmenter", "smart_net", "expert", "stacker"}),
        ("smart_net.ema=0.99", {"segmenter", "smart_net", "expert", "stacker"}),
        ("vessel.classes=arteries", {"vessel", "segmenter", "smart_net", "expert", "stacker"}),
        ("vessel.sampling.thin=0.05", {"vessel", "segmenter", "smart_net", "expert", "stacker"}),
        ("smart_net.net.deep_supervision=1", {"segmenter", "smart_net", "expert", "stacker"}),
        ("checkpoint.every_steps=1", set()),
        ("fold=1", set()),
        ("logger=wandb", set()),
        ("trainer.workers=2", set()),
        ("trainer.progress=none", set()),
        ("data.jobs=1", set()),
    ],
)
def test_a_setting_moves_only_the_stages_that_depend_on_it(tmp_path, override, changed):
    before, after = keys(tmp_path), keys(tmp_path, override)
    assert {s for s in before if before[s] != after[s]} == changed


def test_a_stage_may_have_an_average_of_its_own(tmp_path):
    own = keys(tmp_path, "ema=0.99", "vessel.ema=0.999")
    assert own["pretrain"] == keys(tmp_path, "ema=0.99")["pretrain"]
    assert own["vessel"] == keys(tmp_path, "vessel.ema=0.999")["vessel"]
    assert keys(tmp_path, "ema=0.99", "vessel.ema=null")["vessel"] == keys(tmp_path)["vessel"]


def test_without_pretraining_the_expert_does_not_depend_on_it(tmp_path):
    first = keys(tmp_path, "masking=none")
    second = keys(tmp_path, "masking=none", "pretrain.epochs=99")
    assert first["expert"] == second["expert"]


def test_a_run_is_finished_only_after_finish(tmp_path):
    cfg = compose(tmp_path)
    run = stage_run(cfg, "vessel", 0, "data")
    run.begin(run_record(cfg, "vessel", "data"))
    assert run.finished() is None
    with pytest.raises(UserError, match="stage=vessel"):
        run.read_product("weights.safetensors")
    run.finish({"dice": 0.9})
    assert run.finished() == {"dice": 0.9}


def test_a_folder_written_on_other_upstream_products_is_refused(tmp_path):
    cfg = compose(tmp_path)
    run = stage_run(cfg, "expert", 0, "data")
    run.begin(run_record(cfg, "expert", "data"))
    note = run.folder / "run.json"
    record = json.loads(note.read_text())
    record["upstream"]["smart_net"] = "0badc0de"
    note.write_text(json.dumps(record))
    with pytest.raises(UserError, match="0badc0de"):
        run.begin(run_record(cfg, "expert", "data"))


def test_force_keeps_the_old_run_aside(tmp_path):
    cfg = compose(tmp_path)
    run = stage_run(cfg, "vessel", 1, "data")
    run.begin(run_record(cfg, "vessel", "data"))
    run.finish({"dice": 0.5})
    run.begin(run_record(cfg, "vessel", "data"), force=True)
    assert run.finished() is None
    assert [p for p in run.folder.parent.iterdir() if "before" in p.name]


def test_a_second_process_waits_for_the_first(tmp_path):
    run = stage_run(compose(tmp_path), "pretrain", 0, "data")
    script = (
        "import logging; logging.basicConfig(level='INFO')\n"
        "from pathlib import Path; from aneurysm.runs.folders import StageRun\n"
        f"run = StageRun('pretrain', 0, Path({str(run.folder)!r}), {run.key!r})\n"
        "with run.alone():\n    print('finished', run.finished())\n"
    )
    with run.alone():
        other = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert other.stderr is not None
        # It says why it waits, and is still waiting when the work of this process is done.
        assert any("another process is at it" in line for line in other.stderr)
        assert other.poll() is None
        run.finish({"loss": 1.0})
    said, _ = other.communicate(timeout=60)
    assert "{'loss': 1.0}" in said


def test_a_damaged_curve_does_not_cost_the_report(tmp_path, caplog):
    run = stage_run(compose(tmp_path), "vessel", 0, "data")
    assert training_curves(run) == []
    run.folder.mkdir(parents=True)
    line = {
        "fit": "last",
        "attempt": 0,
        "epoch": 0,
        "step": 3,
        "seconds": 1.0,
        "metrics": {"train/loss": 1.0},
    }
    other = {**line, "epoch": 1, "step": 7, "metrics": {"train/loss": "nan"}}
    damaged = ('{"fit": "last"}', "1,2,3,4", '{"fit": "last", "attempt": 0, "epo', "\x00\x00")
    text = "\n".join([json.dumps(line), *damaged[:2], json.dumps(other), *damaged[2:]])
    (run.folder / "metrics.jsonl").write_text(text)
    with caplog.at_level("WARNING"):
        (curve,) = training_curves(run)
    assert curve.metrics["train/loss"].tolist()[0] == 1.0 and curve.metrics.epoch.tolist() == [0, 1]
    assert "4 of 6 lines" in caplog.text
    assert not {"attempt", "seconds", "fit"} & set(curve.metrics)  # they are no metrics
