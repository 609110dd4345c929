"""A BIDS tree with the file names of OpenNeuro ds003949."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aneurysm.data.errors import ReadError
from aneurysm.data.labels import UNNAMED_VESSEL
from aneurysm.data.sources.bids import BidsSource

AFFINE = np.diag([-0.4, -0.4, 0.7, 1.0])


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 500, (20, 22, 12)).astype(np.int16)
    for name in (
        "sub-013/ses-20101220/anat/sub-013_ses-20101220_angio",
        "sub-000/ses-20110101/anat/sub-000_ses-20110101_angio",
        "sub-000/ses-20110101/anat/sub-000_ses-20110101_T1w",
        "sub-020/anat/sub-020_T2w",
    ):
        save(tmp_path / f"{name}.nii.gz", image)
    save(tmp_path / "sub-013/ses-20101220/anat/sub-013_ses-20101220_FLAIR.nii.gz", image)
    masks = tmp_path / "derivatives/manual_masks/sub-013/ses-20101220/anat"
    for k in (1, 2):
        lesion = np.zeros(image.shape, np.uint8)
        lesion[5 * k : 5 * k + 3, 4:7, 5:7] = 1
        save(masks / f"sub-013_ses-20101220_desc-Lesion_{k}_mask.nii.gz", lesion)
    save(masks / "sub-013_ses-20101220_desc-brain_mask.nii.gz", (image > 0).astype(np.uint8))
    vessel = np.zeros(image.shape, np.uint8)
    vessel[3:15, 5, 6] = 1
    save(
        tmp_path / "derivatives/x/sub-013/ses-20101220/anat/sub-013_ses-20101220_desc-vessel_mask.nii.gz",
        vessel,
    )
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tsex\tgroup\n"
        "sub-000\t44\tF\tcontrol\nsub-013\tn/a\tM\tpatient\nsub-020\t50\tn/a\tn/a\n"
    )
    return tmp_path


def test_index(root):
    index = BidsSource(root).index().set_index("series_uid")
    assert index["modality"].to_dict() == {
        "sub-000_ses-20110101_T1w": "T1",
        "sub-000_ses-20110101_angio": "MRA",
        "sub-013_ses-20101220_angio": "MRA",
        "sub-020_T2w": "T2",
    }
    person = index.loc["sub-013_ses-20101220_angio"]
    assert person["patient_id"] == "sub-013" and np.isnan(person["age"]) and person["sex"] == "M"
    assert person["present"] == 1 and np.isnan(person["location_4"])
    control = index.loc["sub-000_ses-20110101_T1w"]
    assert control["present"] == 0 and control["age"] == 44 and control["location_4"] == 0
    assert np.isnan(index.loc["sub-020_T2w", "present"]) and index.loc["sub-020_T2w", "sex"] == ""


def test_case_with_two_lesion_files(root):
    source = BidsSource(root)
    case = source.case("sub-013_ses-20101220_angio")
    assert case.scan.patient_id == "sub-013" and case.present is True and np.isnan(case.locations).all()
    assert set(np.unique(case.aneurysm)) == {0, 1, 2} and (case.aneurysm == 2).sum() == 18
    first = case.lesions[0]
    np.testing.assert_allclose(first.centre_mm, nib.affines.apply_affine(AFFINE, [6, 5, 5.5]), atol=1e-6)
    np.testing.assert_allclose(first.radius_mm, np.cbrt(3 * 18 * 0.112 / (4 * np.pi)), rtol=1e-5)
    assert set(np.unique(case.vessel)) == {0, UNNAMED_VESSEL} and (case.vessel > 0).sum() == 12
    control = source.case("sub-000_ses-20110101_angio")
    assert control.present is False and not control.aneurysm.any() and control.lesions == ()
    assert control.vessel is None and (control.locations == 0).all()
    t2 = source.case("sub-020_T2w")
    assert t2.present is None and t2.aneurysm is None


def test_layout_of_the_published_file_list(shared_data, tmp_path):
    """Every angiography and lesion mask of the real data set is found by its name."""
    meta = shared_data / "openneuro_meta/ds003949"
    names = (meta / "file_list_angio_lesion.txt").read_text().split()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "participants.tsv").write_text((meta / "participants.tsv").read_text())
    index = BidsSource(tmp_path).index()
    assert len(index) == 296 and (index["modality"] == "MRA").all()
    # 167 sessions have a lesion mask; every other one is a control's or a patient's without a mask.
    assert (index["present"] == 1).sum() >= 167 and index["present"].notna().all()
    assert index["patient_id"].nunique() == 284


def test_options_and_faults(root, tmp_path):
    only = BidsSource(root, suffixes=["angio"], contrast="CTA")
    assert (
        set(only.index()["modality"]) == {"CTA"} and len(only.case("sub-013_ses-20101220_angio").lesions) == 2
    )
    before = only.fingerprint("sub-013_ses-20101220_angio")
    path = (
        root
        / "derivatives/manual_masks/sub-013/ses-20101220/anat/sub-013_ses-20101220_desc-Lesion_2_mask.nii.gz"
    )
    path.unlink()
    assert BidsSource(root).fingerprint("sub-013_ses-20101220_angio") != before
    for make, error, message in (
        (lambda: BidsSource(tmp_path / "missing").index(), ReadError, "no such folder"),
        (lambda: BidsSource(tmp_path / "derivatives").index(), ReadError, "sub-"),
        (lambda: BidsSource(root).case("sub-999_angio"), ReadError, "sub-999_angio"),
        (lambda: BidsSource(root, suffixes=["bold"]), ValueError, "bold"),
        (lambda: BidsSource(root, contrast="T2"), ValueError, "T2"),
    ):
        with pytest.raises(error, match=message):
            make()
