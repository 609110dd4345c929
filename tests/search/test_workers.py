"""Workers share a study, survive each other, and draw what one undisturbed worker would have drawn."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from aneurysm.data.errors import UserError
from aneurysm.search import study as studies
from aneurysm.search.space import parse_space
from aneurysm.search.study import drop_torn_line, open_study, sampler, work
from aneurysm.search.watch import ATTEMPTS, hand_back

_, SPACE = parse_space(["dim=choice(2,4,8,16)", "lr=tag(log,interval(1e-4,1e-2))"])
IDENTITY = {"score": "dice of stage=vessel"}


def opened(folder: Path, name: str = "s", storage: str | Path | None = None, identity=None):
    return open_study(name, storage or folder / "s.journal", folder, "maximize", identity or IDENTITY)


def score(trial, overrides) -> float:
    return -abs(math.log10(trial.params["lr"]) + 3) + int(trial.params["dim"]) / 100


def drawn(study: optuna.Study) -> list[str]:
    """Parameters of the complete trials."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    return sorted(json.dumps(t.params, sort_keys=True) for t in complete)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    study, watch = opened(tmp_path_factory.mktemp("undisturbed"))
    work(study, watch, SPACE, score, 8, "random", seed=5)
    assert len(study.trials) == 8
    return drawn(study)


@pytest.mark.parametrize("kind", studies.SAMPLERS)
def test_a_study_goes_on_as_if_it_had_not_stopped(kind, tmp_path):
    study, watch = opened(tmp_path)
    work(study, watch, SPACE, score, 4, kind, seed=5)
    study, watch = opened(tmp_path)  # another process would read the same file
    work(study, watch, SPACE, score, 7, kind, seed=5)
    (tmp_path / "whole").mkdir()
    whole, watch = opened(tmp_path / "whole")
    work(whole, watch, SPACE, score, 7, kind, seed=5)
    assert drawn(study) == drawn(whole) and len(study.trials) == 7


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_workers import SPACE, opened, score
from aneurysm.search.study import work
def slow(trial, overrides):
    print("began", trial.number, flush=True)
    time.sleep(0.4)
    return score(trial, overrides)
study, watch = opened(Path({folder!r}), storage={storage!r})
work(study, watch, SPACE, slow, 8, "random", seed=5)
"""


def worker(folder: Path, storage: str | None = None) -> subprocess.Popen[str]:
    script = WORKER.format(here=str(Path(__file__).parent), folder=str(folder), storage=storage)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_two_workers_on_one_journal_one_killed(tmp_path, undisturbed):
    first, second = worker(tmp_path), worker(tmp_path)
    assert first.stdout is not None
    for _ in range(2):  # in the middle of its second trial
        assert first.stdout.readline().startswith("began")
    first.send_signal(signal.SIGKILL)
    assert second.wait(timeout=120) == 0
    first.wait()
    study, _ = opened(tmp_path)
    assert drawn(study) == undisturbed  # nothing lost, nothing twice, nothing more
    lost = study.get_trials(states=(TrialState.FAIL,))
    assert len(lost) == 1
    again = [t for t in study.trials if t.user_attrs.get("again") == lost[0].number]
    assert [t.state for t in again] == [TrialState.COMPLETE] and again[0].params == lost[0].params
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


@pytest.mark.slow
def test_a_database_hands_back_by_heartbeat(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(studies, "HEARTBEAT", 1)
    url = f"sqlite:///{tmp_path}/study.db"
    study, watch = opened(tmp_path, storage=url)
    trial = study.ask()
    study.sampler = sampler("random", 5, 0)
    for parameter in SPACE:
        parameter.suggest(trial)
    watch.hold(trial)
    time.sleep(2.5)
    assert not watch.dead(study)  # it beats
    watch.release()
    time.sleep(6)
    other, watch = opened(tmp_path, storage=url)
    work(other, watch, SPACE, score, 3, "random", seed=5)
    states = [t.state for t in other.trials]
    assert states.count(TrialState.COMPLETE) == 3 and states.count(TrialState.FAIL) == 1
    assert other.trials[1].user_attrs["again"] == 0 and other.trials[1].params == trial.params


def test_failures_are_recorded_and_do_not_stop_the_study(tmp_path):
    def objective(trial, overrides):
        if trial.number == 1:
            raise UserError("no training scan has a vessel mask")
        if trial.number == 2:
            raise ZeroDivisionError("division by zero")
        return float("nan") if trial.number == 3 else score(trial, overrides)

    study, watch = opened(tmp_path)
    work(study, watch, SPACE, objective, 5)
    errors = [t.user_attrs["error"] for t in study.get_trials(states=(TrialState.FAIL,))]
    assert errors[0] == "no training scan has a vessel mask"
    assert errors[1] == "ZeroDivisionError: division by zero"
    assert "nan" in errors[2] and len(errors) == 3
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 5


def test_a_study_in_which_nothing_works_ends(tmp_path):
    def objective(trial, overrides):
        raise UserError("out of memory")

    study, watch = opened(tmp_path)
    with pytest.raises(UserError, match="out of memory"):
        work(study, watch, SPACE, objective, 4)
    assert len(study.trials) == 4


def test_an_interrupted_trial_is_taken_over(tmp_path):
    def objective(trial, overrides):
        if trial.number == 1:
            raise KeyboardInterrupt
        return score(trial, overrides)

    study, watch = opened(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work(study, watch, SPACE, objective, 3)
    work(study, watch, SPACE, objective, 3)
    assert study.trials[2].params == study.trials[1].params
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 3


@pytest.mark.parametrize(("lost", "tried"), [(True, ATTEMPTS), (False, 2 * ATTEMPTS)])
def test_a_trial_that_takes_its_workers_down_is_given_up_and_a_preempted_one_is_not(lost, tried, tmp_path):
    study, _ = opened(tmp_path)
    for _ in range(2 * ATTEMPTS):
        trial = study.ask()
        for parameter in SPACE:
            parameter.suggest(trial)
        hand_back(study, study.trials[trial.number], lost)
    first = study.trials[0].params
    started = [t for t in study.trials if t.state != TrialState.WAITING]
    assert sum(t.params == first for t in started) == tried


def test_trials_of_another_search_are_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(UserError, match="--study"):
        opened(tmp_path, identity={"score": "candidate_auc of stage=expert"})


def test_half_a_line_at_the_end_of_a_journal_is_dropped(tmp_path):
    study, watch = opened(tmp_path)
    work(study, watch, SPACE, score, 2)
    journal = tmp_path / "s.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"wor')
    drop_torn_line(journal)
    assert journal.read_bytes() == whole
    journal.write_bytes(whole + b'{"op_code":4,"wor')
    study, watch = opened(tmp_path)
    work(study, watch, SPACE, score, 3)
    assert len(opened(tmp_path)[0].trials) == 3


def test_time_ends_a_search(tmp_path):
    study, watch = opened(tmp_path)
    work(study, watch, SPACE, score, 5, timeout=0.0)
    assert len(study.trials) == 0
