"""One index for every kind of data set: declared columns, their units in the file, and joining."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from synthetic_series import write_series

from aneurysm.data.errors import ReadError
from aneurysm.data.folds import make_folds
from aneurysm.data.index import JoinedSource, build_index, main
from aneurysm.data.labels import LABEL_COLUMNS
from aneurysm.data.preparation.prepare import Preparation, load_prepared, prepare_all
from aneurysm.data.sources.bids import BidsSource
from aneurysm.data.tables import INDEX

GRADIENT = np.broadcast_to(np.arange(40, dtype=np.int16)[:, None, None] * 10, (40, 40, 24)).copy()


def bids(root: Path, subjects: int, tag: str = "") -> Path:
    for number in range(subjects):
        path = root / f"sub-{number:03d}/anat/sub-{number:03d}{tag}_angio.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(GRADIENT, np.diag([-0.6, -0.6, 0.8, 1.0])), path)
    rows = [f"sub-{n:03d}\t{50 + n}\tF\t{'patient' if n % 2 else 'control'}" for n in range(subjects)]
    (root / "participants.tsv").write_text("\n".join(["participant_id\tage\tsex\tgroup", *rows]))
    return root


def rsna(root: Path) -> Path:
    write_series(root / "series/1.1", np.arange(12 * 9 * 8, dtype=np.uint16).reshape(12, 9, 8), series="1.1")
    cells = {"SeriesInstanceUID": "1.1", "Modality": "MRA", **dict.fromkeys(LABEL_COLUMNS, "0")}
    pd.DataFrame([cells]).to_csv(root / "train.csv", index=False)
    return root


def medmnist(path: Path) -> Path:
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.full((2, 8, 8, 8), 255, np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1]], np.uint8)
    np.savez(path, **arrays)
    return path


def own(root: Path) -> Path:
    root.mkdir()
    nib.save(nib.Nifti1Image(np.ones((5, 5, 5), np.int16), np.eye(4)), root / "my_cta.nii")
    return root


@pytest.fixture
def places(tmp_path) -> list[str]:
    return [
        f"rsna={rsna(tmp_path / 'rsna')}",
        f"lausanne:bids={bids(tmp_path / 'a', 3)}",
        f"brisbane:bids={bids(tmp_path / 'b', 2, '_acq-tra')}",
        f"medmnist={medmnist(tmp_path / 'toy3d.npz')}",
        f"folder={own(tmp_path / 'own')}",
    ]


def test_one_table_of_every_kind_with_its_units(places, tmp_path):
    out = tmp_path / "deep/index.parquet"
    assert main([*places, "--out", str(out)]) == 0
    index = INDEX.read(out)
    assert list(index.columns) == list(INDEX.columns)
    assert index.groupby("dataset").size().to_dict() == {
        "brisbane": 2, "folder": 1, "lausanne": 3, "medmnist": 6, "rsna": 1,
    }  # fmt: skip
    assert index["series_uid"].is_unique and {str(t) for t in index.dtypes} == {"str", "float32", "bool"}
    schema = pq.read_schema(out)
    assert schema.field("age").metadata[b"meaning"].startswith(b"years")
    assert set(INDEX.meanings) == set(INDEX.columns) == set(schema.names)
    assert schema.field("age").type == "float" and schema.field("has_vessel_mask").type == "bool"
    # sub-000 and sub-001 of two hospitals are four people; sub-002 is in one of them only.
    people = set(index.loc[index["dataset"].isin(["lausanne", "brisbane"]), "patient_id"])
    assert people == {
        "lausanne:sub-000", "lausanne:sub-001", "brisbane:sub-000", "brisbane:sub-001", "sub-002",
    }  # fmt: skip
    assert build_index(places, same_patients=True)["patient_id"].eq("sub-000").sum() == 2
    make_folds(index, 3, 0)
    assert main([*places[:1], "--out", str(tmp_path / "index.csv")]) == 0
    assert INDEX.conform(pd.read_csv(tmp_path / "index.csv", keep_default_na=True).fillna(
        {"sex": "", "note": ""}
    )).equals(build_index(places[:1]))  # fmt: skip


def test_older_tables_without_the_new_columns_are_still_read(tmp_path):
    old = build_index([f"bids={bids(tmp_path / 'a', 2)}"]).drop(columns=list(INDEX.defaults))
    assert INDEX.conform(old)["note"].tolist() == ["", ""] and not INDEX.conform(old)["has_vessel_mask"].any()
    with pytest.raises(ValueError, match=r"lacks \['age'\]"):
        INDEX.conform(old.drop(columns="age"))


def test_faults_are_named(places, tmp_path, caplog):
    out = str(tmp_path / "index.parquet")
    for arguments, message in (
        (["nifti=/data"], "not kind=path"),
        (["/data"], "not kind=path"),
        (["rsna=/nowhere"], "no such folder"),
        ([places[1], places[1].replace("lausanne", "again")], "3 series are in more than one data set"),
        ([places[0], places[0], places[0]], "Two data sets are called 'rsna'"),
    ):
        assert main([*arguments, "--out", out]) == 1
        assert message in caplog.text
    assert main([places[0], "--out", str(tmp_path / "index.xlsx")]) == 1
    assert not Path(out).exists()


def test_the_command(places, tmp_path):
    out = tmp_path / "index.parquet"
    done = subprocess.run(
        [sys.executable, "-m", "aneurysm.data.index", places[0], "--out", str(out)],
        capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 series of 1 patients, 0 with, 1 without" in done.stderr and len(INDEX.read(out)) == 1


def test_joined_data_sets_are_prepared_as_one(tmp_path):
    source = JoinedSource(
        {"a": BidsSource(bids(tmp_path / "a", 2)), "b": BidsSource(bids(tmp_path / "b", 1, "_run-1"))}
    )
    paths = prepare_all(source, Preparation(), tmp_path / "cache", 1)
    assert sorted(load_prepared(p).patient_id for p in paths.values()) == [
        "a:sub-000",
        "b:sub-000",
        "sub-001",
    ]
    before = source.fingerprint("sub-000_angio")
    os.utime(tmp_path / "a/sub-000/anat/sub-000_angio.nii.gz", (1, 1))
    assert source.fingerprint("sub-000_angio") != before
    with pytest.raises(ReadError, match="in none of the data sets a, b"):
        source.case("sub-009_angio")
    with pytest.raises(ValueError, match="at least one"):
        JoinedSource({})


def test_joined_by_configuration(tmp_path):
    """The sources named on the command line arrive as sources."""
    import hydra

    from aneurysm.build import build
    from aneurysm.command_line import config_folder

    sources = "aneurysm.data.sources"
    overrides = [
        "data=joined",
        f"+data.sources.a={{_target_: {sources}.bids.BidsSource, root: '{bids(tmp_path / 'a', 2)}'}}",
        f"+data.sources.own={{_target_: {sources}.folder.FolderSource, root: '{own(tmp_path / 'own')}'}}",
    ]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        source = build(hydra.compose("train", overrides=overrides).data)
    assert source.index()["dataset"].tolist() == ["a", "a", "own"]
    assert source.case("my_cta").scan.modality == "CTA"
