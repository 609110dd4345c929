"""The plan of a sweep: the jobs that Hydra runs, under an id that the same command finds again."""

import json
import shutil

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig

from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.sweeps.expand import expand
from aneurysm.sweeps.plan import find_plans, open_plan, planned_jobs, read_plan


def launched(arguments, monkeypatch, tmp_path, folder=None):
    """Overrides of the jobs that Hydra itself launches for this command."""
    seen = []
    monkeypatch.setattr("sys.argv", ["train.py", "-m", f"hydra.sweep.dir={tmp_path}", *arguments])

    @hydra.main(version_base="1.3", config_path=str(folder or config_folder()), config_name="train")
    def application(cfg):
        seen.append(list(HydraConfig.get().overrides.task))

    application()
    return seen


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        (["stage=expert", "oscillator_dim=2,4", "fold=range(0,2)"], 4),
        (["stage=vessel", "loss=glob(*tversky)"], 2),
        (["smart_net.flips=[w],[d,h]", "experiment_name='a b'", "trainer=gpu"], 2),
        (["stage=pretrain", "fold=1", "hydra.verbose=false"], 1),
    ],
)
def test_the_plan_lists_the_jobs_that_hydra_launches(arguments, jobs, monkeypatch, tmp_path):
    planned = expand(config_folder(), "train", arguments).overrides
    assert planned == launched(arguments, monkeypatch, tmp_path)
    assert len(planned) == jobs


def test_a_sweep_that_an_experiment_file_asks_for_is_planned_too(monkeypatch, tmp_path):
    conf = shutil.copytree(config_folder(), tmp_path / "conf")
    (conf / "experiment" / "dims.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params: {oscillator_dim: '2,4', fold: '0,1'}\n"
    )
    arguments = ["experiment=dims", "fold=null"]  # the command line overrules the file
    planned = expand(conf, "train", arguments).overrides
    assert planned == launched(arguments, monkeypatch, tmp_path, conf)
    assert [sorted(job)[-1] for job in planned] == ["oscillator_dim=2", "oscillator_dim=4"]


def test_the_place_of_the_plan_does_not_depend_on_what_is_swept(tmp_path):
    fixed = [f"paths.outputs={tmp_path}", "experiment=smoke"]
    assert expand(config_folder(), "train", [*fixed, "data=phantom,folder"]).experiment == tmp_path / "smoke"


@pytest.mark.parametrize("wrong", ["hydra.launcher.n_job=2", "fusion=late"])
def test_what_does_not_fit_is_one_sentence(wrong):
    with pytest.raises(UserError) as error:
        expand(config_folder(), "train", ["fold=0,1", "hydra/launcher=joblib", wrong])
    assert wrong.split("=")[0].rsplit(".")[-1] in str(error.value) and "\n" not in str(error.value)


def test_a_sweep_over_an_interval_is_sent_to_the_search():
    with pytest.raises(UserError, match="INTERVAL"):
        expand(config_folder(), "train", ["expert.lr=interval(0.1,0.2)"])


def test_the_same_command_in_another_order_finds_the_same_plan(tmp_path):
    fixed = [f"paths.outputs={tmp_path}"]
    first = expand(config_folder(), "train", [*fixed, "fold=0,1", "oscillator_dim=2,4"])
    plan = open_plan(first.experiment, "first command", first.overrides)
    for again in (
        ["oscillator_dim=4,2", "fold=range(0,2)"],
        ["fold=1,0", "oscillator_dim=2,4", "failed=skip", "trainer.progress=none", "hydra.verbose=true"],
    ):
        asked = expand(config_folder(), "train", [*fixed, *again])
        found = open_plan(asked.experiment, "another command", asked.overrides)
        assert (found.id, found.began, found.command) == (plan.id, plan.began, "first command")
        assert {j.id for j in found.jobs} == {j.id for j in plan.jobs}
        for job in asked.overrides:
            assert found.job(job).overrides == tuple(job)
    other = expand(config_folder(), "train", [*fixed, "fold=0,1", "oscillator_dim=2,8"])
    open_plan(other.experiment, "third command", other.overrides)
    assert [p.command for p in find_plans(first.experiment)] == ["first command", "third command"]


def test_jobs_are_labelled_by_what_differs_and_twins_are_one():
    jobs = planned_jobs([["stage=vessel", "fold=0"], ["stage=vessel", "fold=1"], ["fold=1", "stage=vessel"]])
    assert [j.label for j in jobs] == ["fold=0", "fold=1"]
    # What only says how to run is told apart where it is what is swept.
    assert len(planned_jobs([["trainer.progress=none"], ["trainer.progress=lines"]])) == 2


def test_a_damaged_plan_is_named(tmp_path):
    plan = open_plan(tmp_path, "command", [["fold=0"]])
    (plan.folder / "plan.json").write_text(json.dumps({"command": "x"}))
    with pytest.raises(UserError, match=r"plan\.json"):
        read_plan(plan.folder)
