"""The whole product, small: train every stage, swap every part, resume, predict, refuse bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest

from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.data.labels import LABEL_COLUMNS
from aneurysm.experiment import open_experiment
from aneurysm.flow import main as physics_worth
from aneurysm.predict import predict
from aneurysm.sensitivity.__main__ import main as sensitivity
from aneurysm.sensitivity.errors import GRADES
from aneurysm.train import train

ROOT = Path(__file__).parents[1]


def compose(outputs: Path, *overrides: str):
    fixed = [f"paths.outputs={outputs}", "experiment=smoke", "trainer.progress=none"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=[*fixed, *overrides])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """An experiment trained through all five stages."""
    folder = tmp_path_factory.mktemp("outputs")
    train(compose(folder))
    return folder


def command(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
    )


def test_every_stage_leaves_finished_folds_and_a_report(outputs):
    folder = outputs / "smoke"
    for stage in ("pretrain", "vessel", "segmenter", "smart_net", "expert", "stacker"):
        assert len(list((folder / stage).glob("*/fold_*/done.json"))) == 2, stage
    assert "not a medical device" in (folder / "report" / "index.html").read_text().lower()
    assert (folder / "bundle" / "bundle.json").is_file()
    figures = json.loads((folder / "report" / "metrics.json").read_text())
    assert figures["figures"]


def test_no_patient_is_predicted_by_a_model_that_saw_it(outputs):
    experiment = open_experiment(compose(outputs))
    patient = dict(zip(experiment.index.series_uid, experiment.index.patient_id, strict=True))
    for fold in experiment.folds:
        trained = {patient[uid] for uid in experiment.training(fold)}
        for stage, name in (("expert", "predictions.parquet"), ("stacker", "scans.parquet")):
            table = pd.read_parquet(experiment.run(stage, fold).read_product(name))
            assert not trained & {patient[uid] for uid in table.series_uid}


def test_masks_are_measured_and_their_repairs_kept(outputs):
    experiment = open_experiment(compose(outputs))
    for fold in experiment.folds:
        for stage in ("vessel", "segmenter"):
            run = experiment.run(stage, fold)
            table = pd.read_csv(run.read_product("overlap.csv"))
            assert sorted(table.series_uid) == sorted(experiment.held_out(fold))
            assert {"hd95_mm", "recall_below_0_75mm", "aneurysms_half"} <= set(table.columns)
            assert {"threshold", "rule_recall", "rule_scans"} <= set(run.finished())
        repairs = pd.read_csv(experiment.run("smart_net", fold).read_product("repairs.csv"))
        assert list(repairs.series_uid) == experiment.held_out(fold)
        assert (repairs.fragments_after == 0).all() and {"gaps_before", "bridged"} <= set(repairs.columns)
    masks = json.loads((outputs / "smoke" / "report" / "metrics.json").read_text())["lumen_masks"]
    assert {m["stage"] for m in masks} == {"vessel net", "Smart Net"}
    assert {"all", "CTA"} <= {m["modality"] for m in masks}


def test_the_cost_of_mask_errors_of_a_finished_experiment(outputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(GRADES, "drop", (0.4,))
    arguments = [str(outputs / "smoke"), "--kinds", "drop", "--scans", "3", "--out", str(tmp_path)]
    assert sensitivity([*arguments]) == 0
    table = pd.read_csv(tmp_path / "sensitivity.csv")
    assert list(table.kind) == ["none", "drop"]
    assert table.mask_recall.iloc[1] < table.mask_recall.iloc[0]
    written = (tmp_path / "sensitivity.csv").stat().st_mtime_ns
    capsys.readouterr()
    assert sensitivity([*arguments]) == 0  # everything is there: nothing is measured again
    assert "mask recall" not in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "sensitivity.csv"), table)
    assert (tmp_path / "sensitivity.csv").stat().st_mtime_ns > written
    assert (tmp_path / "sensitivity.png").is_file() and (tmp_path / "sensitivity.md").is_file()


def test_the_worth_of_the_physics_head_of_a_finished_experiment(outputs, capsys):
    assert physics_worth([str(outputs / "smoke")]) == 0
    assert "navier_stokes" in capsys.readouterr().out
    features = pd.read_csv(outputs / "smoke" / "flow" / "features.csv").set_index("feature")
    # Eight patients may leave a fold with one kind of candidate only: unknown, and said so.
    assert (features.auc.between(0, 1) | features.auc.isna()).all() and (features.known > 0).all()
    assert physics_worth([str(outputs / "nothing")]) == 2
    assert "experiment=study_physics" in capsys.readouterr().err


def test_the_same_command_again_skips_everything(outputs):
    before = {p: p.stat().st_mtime_ns for p in (outputs / "smoke").glob("*/*/fold_*/done.json")}
    assert len(before) == 12
    train(compose(outputs))
    assert before == {p: p.stat().st_mtime_ns for p in (outputs / "smoke").glob("*/*/fold_*/done.json")}


@pytest.mark.parametrize(
    ("stage", "override", "seen"),
    [
        ("expert", "oscillator=none", lambda t: t.order_parameter.isna().all()),
        ("expert", "oscillator_dim=8", lambda t: t.order_parameter.between(0, 1).all()),
        ("expert", "physics=none", lambda t: t.physics_residual.isna().all() and not t.has_flow.any()),
        ("expert", "physics=placebo", lambda t: t.physics_residual.notna().any()),
        ("expert", "physics.refine_steps=2", lambda t: t.flow_wall_shear_pa.notna().any()),
        ("expert", "balance=fixed", None),
        ("expert", "fusion=early", None),
        ("vessel", "loss=dice_ce", None),
    ],
)
def test_swapping_a_part_changes_what_runs(outputs, stage, override, seen):
    base, cfg = compose(outputs), compose(outputs, f"stage={stage}", override, "fold=0")
    train(cfg)
    run = open_experiment(cfg).run(stage, 0)
    usual = open_experiment(base).run(stage, 0)
    assert run.finished() is not None
    assert run.folder != usual.folder
    name = "predictions.parquet" if stage == "expert" else "overlap.csv"
    read = pd.read_parquet if stage == "expert" else pd.read_csv
    mine, theirs = read(run.folder / name), read(usual.folder / name)
    if seen is not None:
        assert seen(mine)
    assert not mine.equals(theirs)


@pytest.mark.slow  # tests/runs/test_resume.py kills a small net's training
def test_killed_training_goes_on_and_finished_folds_are_kept(outputs, tmp_path):
    shutil.copytree(outputs / "data", tmp_path / "data", copy_function=os.link)
    arguments = ["experiment=smoke", f"paths.outputs={tmp_path}", "stage=vessel", "vessel.epochs=4"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments], stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 200
        # Kill it in the middle of the second fold: the first is finished, the second has a checkpoint.
        while not list(tmp_path.glob("smoke/vessel/*/fold_1/last.ckpt")) and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    first = next(tmp_path.glob("smoke/vessel/*/fold_0/done.json"))
    written = first.stat().st_mtime_ns
    again = command("train.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert "fold 0  is finished, skipped" in again.stdout
    assert "going on from" in again.stdout or "fold 1  is finished" in again.stdout
    assert first.stat().st_mtime_ns == written
    assert len(list(tmp_path.glob("smoke/vessel/*/fold_*/done.json"))) == 2


def test_a_sweep_in_one_process_runs_every_job(outputs):
    arguments = [
        "-m",
        "experiment=smoke",
        f"paths.outputs={outputs}",
        "stage=expert",
        "fold=0",
        "balance.temperature=5,50",
    ]
    result = command("train.py", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    settings = [
        json.loads(p.read_text())["settings"] for p in (outputs / "smoke/expert").glob("*/fold_0/run.json")
    ]
    assert {5, 50} <= {s["balance"].get("temperature") for s in settings}


@pytest.fixture(scope="module")
def dicom_series(outputs) -> Path:
    return next((outputs / "data").glob("*/series/*"))


def test_predict_writes_everything_in_the_input_geometry(outputs, dicom_series, tmp_path):
    import nibabel as nib

    bundle = f"bundle={outputs}/smoke/bundle"
    result = command("predict.py", bundle, f"input={dicom_series}", f"output={tmp_path}")
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert list(table.columns) == ["SeriesInstanceUID", *LABEL_COLUMNS]
    assert (
        table[list(LABEL_COLUMNS)].to_numpy().min() >= 0 and table[list(LABEL_COLUMNS)].to_numpy().max() <= 1
    )
    folder = tmp_path / dicom_series.name
    said = json.loads((folder / "report.json").read_text())
    image = nib.load(dicom_series.parents[1] / "segmentations" / f"{dicom_series.name}.nii")
    vessels = nib.load(folder / "vessels.nii.gz")
    # Same voxels at the same places, whatever the order of the axes.
    corners = np.array([[0, 0, 0, 1], [*(np.array(vessels.shape) - 1), 1]])
    back = np.linalg.inv(image.affine) @ (vessels.affine @ corners.T)
    assert np.allclose(np.sort(back[:3], axis=1), [[0, n - 1] for n in image.shape], atol=1e-2)
    assert (folder / "index.html").is_file()
    for candidate in said["candidates"]:
        place = said["input"]["affine"] @ np.array([*candidate["position_voxel"], 1.0])
        assert np.allclose(place[:3], candidate["position_mm"], atol=0.05)


def test_predict_goes_on_after_a_bad_scan_and_keeps_the_good_one(outputs, dicom_series, tmp_path):
    import nibabel as nib

    folder = tmp_path / "in"
    folder.mkdir()
    good = nib.load(dicom_series.parents[1] / "segmentations" / f"{dicom_series.name}.nii")
    nib.save(good, folder / "good_MRA.nii.gz")
    volume = np.asarray(good.dataobj, dtype=np.float32)
    volume[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(volume, good.affine), folder / "nan_MRA.nii.gz")
    bundle = f"bundle={outputs}/smoke/bundle"
    result = command("predict.py", bundle, f"input={folder}", f"output={tmp_path / 'out'}", "modality=MRA")
    assert result.returncode == 1
    assert "nan_MRA" in result.stdout and "NaN" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert list(pd.read_csv(tmp_path / "out/predictions.csv").SeriesInstanceUID) == ["good_MRA"]


def predicted(outputs: Path, folder: Path, output: Path, *overrides: str) -> dict[str, bytes]:
    """What prediction of a folder leaves, by file, without the pages (they tell how long it took)."""
    fixed = [f"bundle={outputs}/smoke/bundle", f"input={folder}", f"output={output}", "threads=1"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose("predict", overrides=[*fixed, *overrides])
    with pytest.raises(UserError, match="1 of 3 scans"):
        predict(cfg)
    assert "NaN" in (output / "index.html").read_text()
    kept = sorted(p for p in output.rglob("*") if p.is_file() and p.suffix != ".html")
    assert not [p for p in kept if p.parent.name.startswith(".")]
    return {str(p.relative_to(output)): voxels_or_bytes(p) for p in kept}


def voxels_or_bytes(path: Path) -> bytes:
    import nibabel as nib

    # A gzip header holds the time.
    return np.asarray(nib.load(path).dataobj).tobytes() if path.suffix == ".gz" else path.read_bytes()


@pytest.fixture(scope="module")
def three_scans(outputs, dicom_series, tmp_path_factory) -> Path:
    """Two good scans and a bad one."""
    import nibabel as nib

    folder = tmp_path_factory.mktemp("three")
    good = nib.load(dicom_series.parents[1] / "segmentations" / f"{dicom_series.name}.nii")
    volume = np.asarray(good.dataobj, dtype=np.float32)
    nib.save(nib.Nifti1Image(volume, good.affine), folder / "a_MRA.nii.gz")
    nib.save(nib.Nifti1Image(volume[::-1].copy(), good.affine), folder / "b_MRA.nii.gz")
    volume[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(volume, good.affine), folder / "nan_MRA.nii.gz")
    return folder


@pytest.fixture(scope="module")
def one_by_one(outputs, three_scans, tmp_path_factory) -> dict[str, bytes]:
    """What one process predicts."""
    return predicted(outputs, three_scans, tmp_path_factory.mktemp("serial"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_predicting_in_parallel_gives_the_same(outputs, three_scans, one_by_one, tmp_path, backend):
    if backend == "dask":
        pytest.importorskip("distributed", reason="pip install 'aneurysm[dask]'")
    together = predicted(outputs, three_scans, tmp_path, "parallel.jobs=2", f"parallel.backend={backend}")
    assert list(together) == list(one_by_one) and len(together) >= 7
    for name, content in together.items():
        first, second = numbers_apart(content), numbers_apart(one_by_one[name])
        assert first[0] == second[0], name
        # PyTorch sums in another order when memory is aligned differently, which differs between processes:
        # measured one unit in the last place of single precision.
        np.testing.assert_allclose(first[1], second[1], rtol=1e-5, atol=1e-6, err_msg=name)


def numbers_apart(content: bytes) -> tuple[bytes, list[float]]:
    """What is written around the decimal numbers of a text, and the numbers; voxels stay as they are."""
    if b"\x00" in content:
        return content, []
    decimal = rb"-?\d+\.\d+(?:e-?\d+)?"
    return re.sub(decimal, b"#", content), [float(n) for n in re.findall(decimal, content)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p / "nowhere", "nowhere"),
        (lambda p: p, "no DICOM"),
        (lambda p: (p / "notes.dcm").write_text("not a scan") and p, "notes.dcm"),
    ],
)
def test_predict_refuses_bad_input_in_one_sentence(outputs, tmp_path, make, expected):
    folder = tmp_path / "in"
    folder.mkdir()
    bundle = f"bundle={outputs}/smoke/bundle"
    result = command("predict.py", bundle, f"input={make(folder)}", f"output={tmp_path / 'out'}")
    assert result.returncode != 0
    assert expected.lower() in (result.stdout + result.stderr).lower()
    assert "Traceback" not in result.stdout + result.stderr


def test_a_bundle_of_another_format_is_refused(outputs, dicom_series, tmp_path):
    bundle = shutil.copytree(outputs / "smoke/bundle", tmp_path / "bundle")
    note = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**note, "format": 99, "version": "9.9"}))
    result = command("predict.py", f"bundle={bundle}", f"input={dicom_series}", f"output={tmp_path / 'out'}")
    assert result.returncode == 1
    assert "9.9" in result.stdout and "format 99" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_missing_bundle_is_named_with_the_ones_nearby(outputs, dicom_series, tmp_path):
    wrong = outputs / "smoke" / "bundel"
    result = command("predict.py", f"bundle={wrong}", f"input={dicom_series}", f"output={tmp_path / 'out'}")
    assert result.returncode != 0 and "Traceback" not in result.stdout + result.stderr
    said = " ".join((result.stdout + result.stderr).split())
    assert str(wrong) in said and "bundle.json is missing" in said
    assert str(outputs / "smoke" / "bundle") in said


def test_a_bundle_cannot_name_foreign_code(outputs, dicom_series, tmp_path):
    bundle = shutil.copytree(outputs / "smoke/bundle", tmp_path / "bundle")
    note = json.loads((bundle / "bundle.json").read_text())
    note["settings"]["backbone"]["_target_"] = "os.getcwd"
    (bundle / "bundle.json").write_text(json.dumps(note))
    result = command("predict.py", f"bundle={bundle}", f"input={dicom_series}", f"output={tmp_path / 'out'}")
    assert result.returncode == 1 and "os.getcwd" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=rsna", "data.root=/nowhere/rsna"], "/nowhere/rsna"),
        (["oscilator_dim=8"], "oscillator_dim"),
        (["fold=7"], "fold=7"),
    ],
)
def test_train_refuses_a_wrong_command_in_one_sentence(tmp_path, arguments, expected):
    result = command("train.py", f"paths.outputs={tmp_path}", *arguments)
    assert result.returncode != 0
    assert expected in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_real_experiment_is_compared_without_its_data(outputs, tmp_path):
    from aneurysm.compare.comparison import compare
    from aneurysm.compare.read import State, read_experiments

    # Only what the runs left: no scans, no prepared cases.
    folder = tmp_path / "smoke"
    shutil.copytree(outputs / "smoke", folder, ignore=shutil.ignore_patterns("products", "*.ckpt", "bundle"))
    stages = {s.stage: s for s in compare(read_experiments([folder]))}
    assert list(stages) == ["pretrain", "vessel", "segmenter", "smart_net", "expert", "stacker"]
    for stage in stages.values():
        usual = next(v for v in stage.variants if v.count(State.FINISHED) == 2)
        assert all(run.figures["peak_memory_mb"] > 100 for run in usual.runs)
    reported = json.loads((outputs / "smoke" / "report" / "metrics.json").read_text())["figures"]
    score = next(row["value"] for row in reported if "RSNA" in row["figure"])
    (level,) = stages["stacker"].scans.values()
    if score is None:
        assert np.isnan(level.value["rsna_score"])
    else:
        assert level.value["rsna_score"] == pytest.approx(score, abs=1e-6)
