"""`python -m aneurysm.search`, on real trainings that are as small as they go."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from aneurysm.command_line import override_problem
from aneurysm.data.errors import UserError
from aneurysm.search.__main__ import main
from aneurysm.search.objective import Search, compose, score_of
from aneurysm.train import train

ROOT = Path(__file__).parents[2]
SMALL = ("experiment=smoke", "trainer.progress=none", "trainer.threads=1", "data.jobs=1")
PRETRAIN = (
    "stage=pretrain",
    "pretrain.epochs=2",
    "pretrain.lr=tag(log,interval(1e-4,1e-2))",
    "masking.ratio=0.5,0.7",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def best_command(said: str) -> list[str]:
    line = next(line for line in said.splitlines() if line.startswith("python train.py"))
    return shlex.split(line)[2:]


def loaded(folder: Path) -> optuna.Study:
    journal = next(folder.glob("smoke/search/*.journal"))
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.load_study(study_name=None, storage=storage)


def test_a_search_goes_on_and_its_best_trial_is_a_run_that_is_there(outputs, capsys):
    arguments = [*SMALL, *PRETRAIN, "fold=0", f"paths.outputs={outputs}", "--sampler", "random"]
    main([*arguments, "--trials", "2"])
    main([*arguments, "--trials", "3"])
    capsys.readouterr()
    main([*arguments, "--show"])
    said = capsys.readouterr().out
    study = loaded(outputs)
    assert study.direction.name == "MINIMIZE"  # a loss
    assert len(study.trials) == 3 and study.best_value == min(t.value for t in study.trials)
    assert "Best: trial" in said and "val/loss" in said

    best = best_command(said)
    assert override_problem("train", best) is None
    done = {p: p.stat().st_mtime_ns for p in outputs.glob("smoke/pretrain/*/fold_0/done.json")}
    assert len(done) == 3
    assert train(compose(best)) == study.best_value
    assert done == {p: p.stat().st_mtime_ns for p in outputs.glob("smoke/pretrain/*/fold_0/done.json")}


@pytest.mark.slow
def test_folds_can_be_pruned_and_average_to_the_score(outputs):
    arguments = [*SMALL, "stage=pretrain", "masking.ratio=0.5,0.6", f"paths.outputs={outputs}"]
    search = Search(arguments, prune=True)
    study = optuna.create_study(direction=score_of("pretrain")[1])
    trial = study.ask()
    score = search(trial, ["masking.ratio=0.5"])
    assert list(study.trials[0].intermediate_values) == [0]
    assert score == train(compose(search.overrides(["masking.ratio=0.5"])))  # every fold is there by now

    class Below(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return True

    study.pruner = Below()
    with pytest.raises(optuna.TrialPruned):
        search(study.ask(), ["masking.ratio=0.5"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stage=vessel"], "nothing to search"),
        (["stage=vessel", "oscillator_dim=2,4"], "does not read oscillator_dim"),
        (["stage=expert", "oscilator_dim=2,4"], "Did you mean 'oscillator_dim'"),
        (["stage=expert", "fusion=early,late"], "fusion has no option 'late'"),
        (["stage=expert", "expert.lr=interval(1e-4,1e-2)", "balnce=fixed"], "Did you mean 'balance'"),
        pytest.param(["stage=expert", "oscillator_dim=2,4", "force=true"], "force", marks=pytest.mark.slow),
        pytest.param(
            ["stage=expert", "oscillator_dim=2,4", "trainer.devices=2"],
            "CUDA_VISIBLE_DEVICES",
            marks=pytest.mark.slow,
        ),
        (["stage=expert", "balance=uw_so,fixed", "balance.temperature=5,20"], "balance.temperature"),
        pytest.param(
            ["data=rsna", "stage=expert", "oscillator_dim=2,4"], "data.root", marks=pytest.mark.slow
        ),
    ],
)
def test_a_search_that_cannot_work_is_refused_at_once(arguments, said):
    with pytest.raises(UserError, match=said):
        Search(arguments)


def test_a_recipe_brings_its_own_space_and_the_command_line_wins():
    search = Search(["experiment=sweep_oscillator", "oscillator_dim=8"])
    assert [str(p) for p in search.space] == ["oscillator.steps=choice(2,4,8)"]
    assert search.stage == "expert" and "oscillator_dim=8" in search.fixed


def test_where_and_how_it_runs_does_not_make_another_study():
    parameter = "oscillator_dim=2,4"
    here = Search(["stage=expert", parameter])
    there = Search(["stage=expert", parameter, "trainer.workers=2", "logger=wandb", "paths.outputs=/x"])
    other = Search(["stage=expert", parameter, "balance.temperature=5"])
    assert here.name() == there.name() != other.name()


def test_without_optuna_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as stopped:
        main(["stage=expert", "oscillator_dim=2,4"])
    assert stopped.value.code == 2 and "aneurysm[sweep]" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_one_killed_and_the_printed_command_skips(tmp_path):
    arguments = [
        *SMALL, "stage=vessel", "fold=0", "vessel.epochs=2", "vessel.steps=2", "vessel.rule_scans=2",
        "vessel.lr=tag(log,interval(1e-3,1e-2))", "loss=tversky,dice_ce", f"paths.outputs={tmp_path}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "aneurysm.search", *arguments, "--trials", "4", "--sampler", "random"]

    def start(name: str) -> subprocess.Popen[str]:
        with open(tmp_path / name, "w") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)

    first, second = start("first.log"), start("second.log")
    while "Trial" not in (tmp_path / "first.log").read_text():  # it has taken one
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        time.sleep(0.2)
    time.sleep(3)
    first.send_signal(signal.SIGKILL)
    assert second.wait(timeout=1500) == 0, (tmp_path / "second.log").read_text()
    first.wait()
    study = loaded(tmp_path)
    states = [t.state for t in study.trials]
    assert states.count(TrialState.COMPLETE) == 4 and states.count(TrialState.FAIL) == 1
    assert len(states) == 5
    lost = next(t for t in study.trials if t.state == TrialState.FAIL)
    assert any(t.params == lost.params and t.value is not None for t in study.trials)

    best = best_command((tmp_path / "second.log").read_text())
    again = subprocess.run(
        [sys.executable, "train.py", *best], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0 and "is finished, skipped" in again.stdout
    assert f"{study.best_value:.3f}" in again.stdout
    assert train(compose(best)) == study.best_value
