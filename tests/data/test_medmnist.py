"""MedMNIST volumes: every sample a series, its patient known, prepared to 0 and 1."""

from pathlib import Path

import numpy as np
import pytest

from aneurysm.data.errors import ReadError
from aneurysm.data.folds import check_folds, make_folds
from aneurysm.data.formats.nifti import write_nifti
from aneurysm.data.labels import UNNAMED_VESSEL
from aneurysm.data.preparation.prepare import Preparation, prepare_case
from aneurysm.data.sources.medmnist import MedMnistSource


def write(path: Path, grey: bool = False, **replaced) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 9), ("val", 3), ("test", 4)):
        images = rng.integers(0, 256, (count, 12, 12, 12)).astype(np.uint8)
        arrays[f"{split}_images"] = images if grey else np.where(images > 200, 255, 0).astype(np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 3 == 0).astype(np.uint8)[:, None]
    np.savez_compressed(path, **{k: v for k, v in (arrays | replaced).items() if v is not None})
    return path


def test_samples_are_series_and_patients_stay_together(tmp_path, caplog):
    path = write(tmp_path / "toy3d.npz")
    alone = MedMnistSource(path).index()
    assert alone["patient_id"].equals(alone["series_uid"]) and "no table of patients" in caplog.text
    table = ["split,index,patient"] + [
        f"{s},{i},AN{i % 4}" for s, n in (("train", 9), ("val", 3), ("test", 3)) for i in range(n)
    ]
    (tmp_path / "toy3d_patient_match.csv").write_text("\n".join(table))
    source = MedMnistSource(path)
    index = source.index()
    assert len(index) == 16 and index["series_uid"].tolist()[-1] == "toy3d-test-0003"
    assert "15 of 16 samples" in caplog.text
    assert index["patient_id"].nunique() == 5  # four, and the sample that the table does not name
    assert index.groupby("site").size().to_dict() == {"test": 4, "train": 9, "val": 3}
    assert index["present"].sum() == 6 and index["location_3"].isna().all() and index["has_vessel_mask"].all()
    check_folds(make_folds(index, 2, 0), index)
    assert MedMnistSource(path, splits=["val"]).index()["site"].unique().tolist() == ["val"]
    assert MedMnistSource(path, positive=0).index()["present"].sum() == 10


def test_voxels_keep_their_place_and_prepare_to_zero_and_one(tmp_path):
    path = write(tmp_path / "toy3d.npz")
    source = MedMnistSource(path, field_mm=9.0)
    stored = np.load(path)["train_images"][4]
    case = source.case("toy3d-train-0004")
    assert case.present is False and not case.aneurysm.any()
    np.testing.assert_allclose(case.scan.grid.spacing, 0.75)
    at = np.array([2, 7, 5])
    index = np.rint(case.scan.grid.to_index(case.scan.source.to_mm(at))).astype(int)
    assert case.scan.volume[tuple(index)] == (340 if stored[tuple(at)] else 40)
    np.testing.assert_array_equal(case.vessel == UNNAMED_VESSEL, case.scan.volume == 340)
    assert any("nominal" in note for note in case.scan.notes)
    prepared = prepare_case(case, Preparation())
    assert prepared.image.shape == (12, 12, 12)
    np.testing.assert_allclose(prepared.image, case.vessel > 0, atol=1e-6)
    np.testing.assert_array_equal(prepared.vessel, case.vessel)
    # A mask drawn on the prepared scan lies on the stored voxels again.
    write_nifti(tmp_path / "mask.nii", prepared.image > 0.5, prepared.grid, case.scan.source)
    import nibabel as nib

    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "mask.nii").dataobj), stored > 0)
    assert source.case("toy3d-train-0003").aneurysm is None
    assert source.fingerprint("toy3d-train-0004") != MedMnistSource(path).fingerprint("toy3d-train-0004")
    grey = MedMnistSource(write(tmp_path / "grey3d.npz", grey=True))
    assert grey.case("grey3d-test-0000").vessel is None and not grey.index()["has_vessel_mask"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": None}, "has no .'val_images'."),
        ({"test_images": np.zeros((4, 28, 28), np.uint8)}, r"test_images is \(4, 28, 28\)"),
        ({"train_labels": np.zeros((9, 14), np.uint8)}, "one label each"),
        ({"train_labels": np.zeros((8, 1), np.uint8)}, "one label each"),
    ],
)
def test_files_that_are_not_medmnist(tmp_path, change, message):
    with pytest.raises(ReadError, match=message):
        MedMnistSource(write(tmp_path / "odd.npz", **change)).index()


def test_missing_and_broken_files(tmp_path):
    path = write(tmp_path / "toy3d.npz")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-500])
    for source, message in (
        (MedMnistSource(tmp_path / "no.npz"), "no such file"),
        (MedMnistSource(tmp_path / "cut.npz"), "not a readable .npz"),
        (MedMnistSource(path, patients=tmp_path / "no.csv"), "no such file"),
    ):
        with pytest.raises(ReadError, match=message):
            source.index()
    for uid in ("toy3d-train-0009", "toy3d-other-0001", "x", "toy3d-train-1"):
        with pytest.raises(ReadError, match="no such sample"):
            MedMnistSource(path).case(uid)
    with pytest.raises(ValueError, match="Unknown splits"):
        MedMnistSource(path, splits=["all"])


@pytest.mark.parametrize(("name", "size"), [("vesselmnist3d", 28), ("vesselmnist3d_64", 64)])
def test_the_real_files(shared_data, name, size):
    """The counts of the published split; folds share no patient although the split does."""
    source = MedMnistSource(shared_data / f"vesselmnist3d/{name}.npz")
    index = source.index()
    assert index.groupby("site").size().to_dict() == {"test": 382, "train": 1335, "val": 191}
    assert index.groupby("site")["present"].sum().to_dict() == {"test": 43, "train": 150, "val": 22}
    assert index["patient_id"].nunique() == 103
    assert (index.groupby("patient_id")["site"].nunique() > 1).all()
    if size == 28:
        folds = make_folds(index, 5, 0)
        check_folds(folds, index)
        positives = index.merge(folds, on="patient_id").groupby("fold")["present"].sum()
        assert positives.min() >= 35 and positives.max() <= 51
    case = source.case(f"{name}-val-0003")
    prepared = prepare_case(case, Preparation(spacing_mm=None))
    assert prepared.image.shape == (size,) * 3 and set(np.unique(prepared.image)) == {0, 1}
    np.testing.assert_array_equal(prepared.vessel > 0, prepared.image == 1)
