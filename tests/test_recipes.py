"""Recipes: every job of every sweep composes, is a run of its own, and the command line has the last word."""

import json
import re
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from aneurysm.build import build, build_expert
from aneurysm.command_line import config_folder, override_problem, recipe_sweep
from aneurysm.losses.balance import Fixed
from aneurysm.runs.settings import stage_key

ROOT = Path(__file__).parents[1]
FILES = {p.stem: p.read_text() for p in sorted((config_folder() / "experiment").glob("*.yaml"))}
SWEEPS = sorted(name for name, text in FILES.items() if "sweeper:" in text)
ABLATIONS = sorted(p.stem for p in (config_folder() / "ablation").glob("*.yaml"))


def jobs(*overrides: str) -> list[list[str]]:
    """What Hydra's own sweeper makes of the command, as lists of overrides."""
    given = [*recipe_sweep("train", overrides), *overrides]
    return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), None)[0]


def compose(overrides: list[str]):
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=overrides)


@pytest.mark.parametrize("recipe", SWEEPS)
def test_every_job_of_a_recipe_composes_and_is_a_run_of_its_own(recipe):
    made = jobs(f"experiment={recipe}")
    assert f"# {len(made)} jobs" in FILES[recipe]  # the header says how many
    assert f"python train.py -m experiment={recipe}" in FILES[recipe]
    keys = set()
    for overrides in made:
        cfg = compose(overrides)
        assert not OmegaConf.missing_keys(cfg) and cfg.experiment_name == recipe
        assert build(cfg.balance) is not None
        keys.add(stage_key(cfg, cfg.stage, "data"))
    assert len(keys) == len(made)


def test_a_recipe_runs_on_other_data_under_another_name():
    made = jobs("experiment=seeds", "data=rsna", "data.root=/data/rsna", "experiment_name=mine", "stage=all")
    cfg = compose(made[-1])
    assert cfg.data.root == "/data/rsna" and cfg.experiment_name == "mine" and cfg.stage == "all"


def test_a_sweep_without_m_is_refused_and_with_every_key_set_it_is_one_run():
    said = override_problem("train", ["experiment=sweep_losses", "balance.temperature=5"])
    assert said is not None and "sweep over balance.reference: add -m" in said
    assert override_problem("train", ["-m", "experiment=sweep_losses"]) is None
    assert override_problem("train", jobs("experiment=sweep_losses")[-1]) is None


def test_the_command_line_wins_over_a_recipe():
    made = jobs("experiment=sweep_oscillator", "oscillator_dim=8", "fold=0,1")
    assert len(made) == 6
    assert {compose(one).oscillator_dim for one in made} == {8}


def test_recipes_multiply():
    made = jobs("experiment=[ablation,seeds]")
    assert len(made) == 5 * len(ABLATIONS)
    assert compose(made[-1]).seed == 4


def test_every_ablation_is_swept():
    assert {next(o for o in one if o.startswith("ablation=")) for one in jobs("experiment=ablation")} == {
        f"ablation={name}" for name in ABLATIONS
    }


def test_ablations_hold_for_the_large_recipe_too():
    given = ["experiment=rsna_full", "data.root=x"]
    keys = {stage_key(compose([*given, f"ablation={name}"]), "stacker", "data") for name in ABLATIONS}
    assert len(keys) == len(ABLATIONS)
    assert stage_key(compose(given), "stacker", "data") in keys  # full is what it is anyway


@pytest.mark.parametrize("part", ["oscillator", "physics", "metadata"])
def test_an_ablated_part_is_not_built(part):
    net = build_expert(compose(["experiment=smoke", f"ablation=no_{part}"]), graph_features=8)
    if part == "oscillator":
        assert all(block.oscillator is None for stage in net.backbone.stages for block in stage)
    else:
        assert getattr(net, part) is None


def test_seeds_share_their_folds():
    first, last = (compose(one) for one in (jobs("experiment=seeds")[0], jobs("experiment=seeds")[-1]))
    assert first.fold_seed == last.fold_seed and first.seed != last.seed


def test_at_a_high_temperature_the_losses_have_the_fixed_weights():
    one = next(j for j in jobs("experiment=sweep_losses")[::-1] if "balance.temperature=1000000.0" in j)
    balance, fixed = build(compose(one).balance), build(compose(["balance=fixed"]).balance)
    assert isinstance(fixed, Fixed)
    names = ("classification", "segmentation", "location", "physics")
    terms = {name: torch.tensor(0.3 + i) for i, name in enumerate(names)}
    assert float(balance(terms)[0]) == pytest.approx(float(fixed(terms)[0]) / len(names), rel=1e-3)


def test_recipes_say_what_they_cost():
    for name in (*SWEEPS, "rsna_full"):
        assert re.search(r"^#.*\d.*(hours|minutes)", FILES[name], re.MULTILINE), name


@pytest.mark.slow
def test_every_job_of_the_ablation_runs(tmp_path):
    smallest = [
        "pretrain.steps=1", "vessel.epochs=1", "vessel.steps=1", "vessel.rule_scans=1", "vessel.flips=[]",
        "smart_net.epochs=1", "smart_net.steps=1", "smart_net.rule_scans=1", "smart_net.graph_epochs=1",
        "expert.epochs=1", "expert.steps=1", "trainer.threads=1", f"paths.outputs={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "train.py", "-m", "experiment=[smoke,ablation]", *smallest],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stackers = list((tmp_path / "ablation" / "stacker").glob("*/fold_0/run.json"))
    assert len({json.loads(p.read_text())["key"] for p in stackers}) == len(ABLATIONS)
    # No part needs the vessel stage again.
    assert len(list((tmp_path / "ablation" / "vessel").glob("*/fold_0/done.json"))) == 1
