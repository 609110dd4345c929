"""What is found in run folders: finished, failed, half-written, moved aside, mixed."""

import json
import os
import time

import pytest
from synthetic_runs import EXPERT, VESSEL, changed, sweep, write_run

from aneurysm.compare.comparison import compare
from aneurysm.compare.curves import loss_curve
from aneurysm.compare.metrics import HEADLINE, STAGES
from aneurysm.compare.read import State, read_experiments
from aneurysm.compare.settings import flat, option_word, short_name, swept
from aneurysm.compare.statistics import Verdict
from aneurysm.data.errors import UserError
from aneurysm.runs.metrics import JsonLines


def at_rest(folder):
    """As if the run had been left alone for an hour."""
    before = time.time() - 3600
    for path in folder.rglob("*"):
        os.utime(path, (before, before))


def test_states_of_runs(tmp_path):
    figures = {"candidate_auc": 0.8, "seconds": 3.0}
    finished = write_run(tmp_path, "expert", EXPERT, 0, figures=figures)
    running = write_run(tmp_path, "expert", EXPERT, 1)
    (running / "progress.json").write_text(json.dumps({"epoch": 1, "epochs": 4, "step": 5, "steps": 10}))
    resting = write_run(tmp_path, "expert", EXPERT, 2)
    failed = write_run(tmp_path, "expert", EXPERT, 3)
    (failed / "failed.json").write_text(json.dumps({"error": "Traceback\n  ...\nValueError: no candidates"}))
    retried = write_run(tmp_path, "expert", EXPERT, 0, seed=1, figures=figures)
    (retried / "failed.json").write_text(json.dumps({"error": "before"}))
    for folder in (finished, resting, failed):
        at_rest(folder)
    runs = {run.folder: run for run in read_experiments([tmp_path])}
    assert runs[finished].state == State.FINISHED
    assert runs[running].state == State.RUNNING
    assert runs[running].progress == pytest.approx(1.5 / 4)
    assert runs[resting].state == State.UNFINISHED
    assert runs[failed].state == State.FAILED
    assert runs[failed].problem == "ValueError: no candidates"
    assert runs[retried].state == State.FINISHED  # what was repaired since counts


def test_damaged_notes_are_named_and_the_rest_is_compared(tmp_path):
    sweep(tmp_path, {4: 0.0, 8: 0.05})
    cut = write_run(tmp_path, "expert", changed(EXPERT, expert__lr=0.1), 0)
    (cut / "run.json").write_text((cut / "run.json").read_text()[:100])
    cut_done = write_run(tmp_path, "expert", EXPERT, 0, seed=9)
    (cut_done / "done.json").write_text('{"candidate_auc": 0.')
    odd = write_run(tmp_path, "expert", EXPERT, 0, seed=10)
    (odd / "done.json").write_text("[1, 2]")
    empty = tmp_path / "expert" / "variant-0badc0de" / "fold_0"
    empty.mkdir(parents=True)
    binary = write_run(tmp_path, "expert", EXPERT, 0, seed=11)
    (binary / "run.json").write_bytes(b"\xff\xfe\x00")
    runs = {run.folder: run for run in read_experiments([tmp_path])}
    for folder, words in (
        (cut, "run.json"),
        (cut_done, "done.json"),
        (odd, "done.json"),
        (binary, "run.json"),
    ):
        assert runs[folder].state == State.DAMAGED
        assert words in runs[folder].problem
    assert "no run.json" in runs[empty].problem
    (stage,) = compare(list(runs.values()))
    assert {run.folder for run in stage.damaged} == {cut, empty, binary}
    assert [e.n for e in stage.rankings[0].estimates] == [8, 8]


def test_runs_moved_aside_and_other_folders_are_left_out(tmp_path):
    sweep(tmp_path, {4: 0.0})
    one = next(tmp_path.glob("expert/*/fold_0"))
    one.with_name("fold_0.before-20261122-101500").mkdir()
    (one.with_name("fold_0.before-20261122-101500") / "run.json").write_text("{}")
    (tmp_path / "report" / "scans" / "fold_notes").mkdir(parents=True)
    (one.parent / "graphs").mkdir()
    assert len(read_experiments([tmp_path])) == 8


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    folder = write_run(tmp_path, "expert", EXPERT, 0)
    (folder / "done.json").write_text(
        '{"candidate_auc": NaN, "dice": Infinity, "name": "x", "ok": true, "seconds": 3}'
    )
    (run,) = read_experiments([tmp_path])
    assert run.figures == {"seconds": 3.0}
    (stage,) = compare([run])
    assert [r.metric.name for r in stage.rankings] == ["seconds"]


def test_folders_without_runs_are_refused_with_a_hint(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        read_experiments([tmp_path / "nothing"])
    sweep(tmp_path / "outputs" / "first", {4: 0.0})
    with pytest.raises(UserError, match=r"Did you mean .*first"):
        read_experiments([tmp_path / "outputs"])
    with pytest.raises(UserError, match=r"Did you mean .*first"):
        read_experiments([tmp_path / "outputs" / "first" / "expert"])
    with pytest.raises(UserError, match="twice"):
        read_experiments([tmp_path / "outputs" / "first", tmp_path / "outputs" / "." / "first"])


def test_other_data_or_folds_are_never_averaged_or_compared(tmp_path):
    for data, level in (("aaaaaaaa", 0.5), ("bbbbbbbb", 0.9)):
        for lr in (0.1, 0.2):
            for fold in range(4):
                auc = level + lr * 0.1 + 0.001 * fold * (1 + lr)
                write_run(
                    tmp_path,
                    "expert",
                    changed(EXPERT, expert__lr=lr),
                    fold,
                    figures={"candidate_auc": auc},
                    data=data,
                )
    (stage,) = compare(read_experiments([tmp_path]))
    assert len(stage.variants) == 4
    ranking = stage.rankings[0]
    assert len(ranking.best) == len(ranking.reference) == 2
    assert {stage.variants[i].data for i in ranking.best} == {"aaaaaaaa", "bbbbbbbb"}
    for i, variant in enumerate(stage.variants):
        # 0.2 is the best of its own data; against the other data the gap would be 0.4.
        difference = ranking.differences[i]
        assert difference is not None
        assert abs(difference.estimate.mean) < 0.02
        assert (difference.verdict == Verdict.REFERENCE) == (variant.settings["expert.lr"] == 0.2)
    assert any("2 different sets" in remark for remark in stage.remarks)


def test_two_experiments_side_by_side(tmp_path):
    sweep(tmp_path / "a", {4: 0.0})
    sweep(tmp_path / "b", {4: 0.0})
    (stage,) = compare(read_experiments([tmp_path / "a", tmp_path / "b"]))
    assert stage.keys == ("experiment",)  # the same key in two experiments is not averaged
    assert [stage.label(i) for i in range(2)] == ["experiment=a", "experiment=b"]
    assert [e.n for e in stage.rankings[0].estimates] == [8, 8]


def chained(tmp_path, vessel_epochs, seed, figures):
    """An expert run on a vessel run that is there."""
    settings = changed(VESSEL, vessel__epochs=vessel_epochs)
    folder = write_run(tmp_path, "vessel", settings, 0, seed, {"dice": 0.7})
    key = json.loads((folder / "run.json").read_text())["key"]
    return folder, write_run(
        tmp_path, "expert", EXPERT, 0, seed, figures, upstream={"smart_net": key, "vessel": key}
    )


def test_settings_of_earlier_stages_are_followed_and_seeds_pooled(tmp_path):
    for epochs in (5, 9):
        for seed in (0, 1):
            chained(tmp_path, epochs, seed, {"candidate_auc": 0.7 + 0.01 * epochs + 0.001 * seed})
    vessel, expert = compare(read_experiments([tmp_path]))
    assert vessel.keys == expert.keys == ("vessel.epochs",)
    assert len(expert.variants) == 2
    assert [e.n for e in expert.rankings[0].estimates] == [2, 2]
    assert "smart_net" in expert.variants[0].notes[0]  # that folder is not there: said, not guessed


def test_what_cannot_be_told_apart_is_not_averaged(tmp_path):
    for epochs in (5, 9):
        folder, _ = chained(tmp_path, epochs, 0, {"candidate_auc": 0.7})
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    stages = {s.stage: s for s in compare(read_experiments([tmp_path]))}
    assert [e.n for e in stages["expert"].rankings[0].estimates] == [1, 1]
    assert "unknown" in stages["expert"].variants[0].notes[0]


def test_an_option_is_one_difference_whatever_it_brings_along():
    base = flat(EXPERT)
    without = flat(changed(EXPERT, oscillator={"_target_": "aneurysm.build.absent"}))
    options = ["oscillator", "fusion", "balance", "expert.net"]
    assert base["oscillator"] == "akorn"
    assert without["oscillator"] == "none"
    assert swept([base, without], options) == ["oscillator"]
    wider = flat(changed(EXPERT, oscillator__oscillator_dim=8))
    assert swept([base, without, wider], options) == ["oscillator", "oscillator.oscillator_dim"]
    assert swept([base, flat(changed(EXPERT, seed=3))], options) == []
    assert swept([{"a": 1}, {"a": 1.0}], []) == []
    assert swept([{"a": 1}, {}], []) == ["a"]


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("aneurysm.nets.oscillators.akorn", "akorn"),
        ("aneurysm.losses.balance.UwSo", "uw_so"),
        ("aneurysm.nets.fusion.CrossAttentionFusion", "cross_attention"),
        ("aneurysm.build.absent", "none"),
        ("mine.HTTPNetBlock", "http_net_block"),
    ],
)
def test_options_have_the_names_that_are_typed(target, word):
    assert option_word(target) == word


def test_short_names():
    assert short_name("oscillator.oscillator_dim") == "oscillator_dim"
    assert short_name("expert.lr") == "expert.lr"
    assert short_name("folds") == "folds"


def test_stages_and_headlines_are_those_of_training():
    from aneurysm.runs.settings import READS
    from aneurysm.train import SCORE

    assert tuple(READS) == STAGES
    for stage, name in SCORE.items():
        assert HEADLINE[stage] == name or stage == "stacker"  # compared by the scores of its tables


def test_a_stage_without_figures_is_judged_by_its_last_loss(tmp_path):
    folder = write_run(tmp_path, "pretrain", VESSEL, 0, figures={"seconds": 3.0})
    logger = JsonLines(folder / "metrics.jsonl", "last")
    for epoch, loss in enumerate((3.0, 2.0)):
        logger.log_metrics({"epoch": epoch, "val/loss": loss}, step=epoch)
    resumed = JsonLines(folder / "metrics.jsonl", "last")
    for epoch, metrics in ((1, {"val/loss": 1.9}), (2, {"train/loss": 1.0}), (2, {"val/loss": 1.5})):
        resumed.log_metrics({"epoch": epoch, **metrics}, step=epoch)
    assert loss_curve(folder) == [3.0, 1.9, 1.5]
    (stage,) = compare(read_experiments([tmp_path]))
    assert stage.rankings[0].metric.name == "val/loss"
    assert not stage.rankings[0].metric.higher
    assert stage.rankings[0].estimates[0].mean == 1.5


def test_a_curve_of_many_epochs_keeps_its_last(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"epoch": k, "metrics": {"val/loss": 1 / (k + 1)}}) + "\n" for k in range(1000))
        + '{"epoch": 1000, "metrics": {"val/l'
    )
    curve = loss_curve(tmp_path)
    assert 20 < len(curve) <= 40
    assert curve[-1] == pytest.approx(1 / 1000)
