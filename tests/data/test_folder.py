"""A folder of mixed files: every scan found once, with its patient, modality, labels and masks."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from synthetic_series import SERIES, write_series

from aneurysm.data.errors import ReadError
from aneurysm.data.labels import LOCATIONS, UNNAMED_VESSEL
from aneurysm.data.sources.folder import FolderSource
from aneurysm.data.sources.folder_items import modality_in

AFFINE = np.diag([-0.5, -0.5, 0.8, 1.0])
IMAGE = np.random.default_rng(0).integers(0, 500, (10, 12, 8)).astype(np.int16)
MCA = "Left Middle Cerebral Artery"


def nifti(path: Path, array: np.ndarray = IMAGE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    nifti(tmp_path / "anna/head_cta.nii.gz")
    vessel = np.zeros(IMAGE.shape, np.uint8)
    vessel[2:8, 5, 4] = 1
    nifti(tmp_path / "anna/head_cta_vessel.nii.gz", vessel)
    lesion = np.zeros(IMAGE.shape, np.uint8)
    lesion[6:8, 5:7, 4] = 1
    image = sitk.GetImageFromArray(lesion.transpose(2, 1, 0))
    image.SetSpacing((0.5, 0.5, 0.8))  # AFFINE in ITK's left-posterior-superior axes
    sitk.WriteImage(image, str(tmp_path / "anna/head_cta_aneurysm.nrrd"))
    nifti(tmp_path / "bert/scan.nii")
    nifti(tmp_path / "carl/scan.nii")
    sitk.WriteImage(sitk.GetImageFromArray(IMAGE), str(tmp_path / "dora_tof.mha"))
    stored = np.random.default_rng(1).integers(0, 900, (6, 9, 10)).astype(np.uint16)
    write_series(tmp_path / "emil/dicom", stored)
    nifti(tmp_path / "emil/stray_lesion.nii.gz")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "labels.csv").write_text(
        f"path,patient_id,modality,age,sex,site,present,{MCA}\n"
        "anna/head_cta.nii.gz,A,,063Y,female,Berlin,1,1\n"
        "bert/scan.nii,,T2,n/a,m,,0,\n"
        "carl/scan.nii,,MRI_T1,70+,,,,\n"
        "emil/dicom,,,,,,0,0\n"
    )
    return tmp_path


def test_every_scan_is_found_with_what_is_known(root, caplog):
    index = FolderSource(root, site="home").index().set_index("series_uid")
    assert sorted(index.index) == [SERIES, "bert_scan", "carl_scan", "dora_tof", "head_cta"]
    assert "1 masks have no scan beside them" in caplog.text and "stray_lesion" in caplog.text
    anna = index.loc["head_cta"]
    assert anna[["patient_id", "modality", "sex", "site"]].tolist() == ["A", "CTA", "F", "Berlin"]
    assert anna["age"] == 63 and anna["has_vessel_mask"] and anna["has_aneurysm_mask"]
    assert anna["path"] == "anna/head_cta.nii.gz" and anna[f"location_{LOCATIONS.index(MCA)}"] == 1
    assert index["modality"].to_dict() == {
        "bert_scan": "T2", "carl_scan": "T1", "dora_tof": "MRA", "head_cta": "CTA", SERIES: "MRA",
    }  # fmt: skip
    assert index["patient_id"].to_dict() == {
        "bert_scan": "bert", "carl_scan": "carl", "dora_tof": "dora_tof", "head_cta": "A",
        SERIES: "patient 7",
    }  # fmt: skip
    assert index.loc["carl_scan", "age"] == 70 and index.loc[SERIES, "age"] == 61
    assert index["site"].drop("head_cta").unique().tolist() == ["home"]
    assert np.isnan(index.loc["dora_tof", "present"]) and "no row" in index.loc["dora_tof", "note"]


def test_cases_with_masks_of_another_format(root):
    source = FolderSource(root)
    case = source.case("head_cta")
    (lesion,) = case.lesions
    np.testing.assert_allclose(lesion.centre_mm, nib.affines.apply_affine(AFFINE, [6.5, 5.5, 4]), atol=1e-6)
    assert lesion.location == LOCATIONS.index(MCA) and case.present is True
    assert set(np.unique(case.vessel)) == {0, UNNAMED_VESSEL} and (case.vessel > 0).sum() == 6
    assert case.scan.patient_id == "A" and case.scan.age == 63 and case.scan.sex == "F"
    dicom = source.case(SERIES)
    assert dicom.scan.volume.shape == (6, 9, 10) and dicom.present is False and dicom.scan.modality == "MRA"
    before = source.fingerprint("head_cta")
    nifti(root / "anna/head_cta_vessel.nii.gz", np.ones(IMAGE.shape, np.uint8))
    assert FolderSource(root).fingerprint("head_cta") != before


def test_a_folder_without_a_table(root):
    (root / "labels.csv").unlink()
    with pytest.raises(ReadError, match=r"bert/scan\.nii: nothing tells how it was acquired"):
        FolderSource(root).index()
    index = FolderSource(root, modality="T1").index()
    assert set(index["modality"]) == {"T1"} and index["present"].isna().all() and (index["note"] == "").all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,present\nnobody.nii,1\n", "no scan 'nobody.nii'"),
        ("path,present\nbert/scan.nii,yes\n", "present must be 0, 1 or empty"),
        ("path,colour\nbert/scan.nii,red\n", "nobody reads the columns .'colour'."),
        ("patient_id\nx\n", "needs a column path or series_uid"),
        ("path\nbert/scan.nii\nbert/scan.nii\n", "listed twice"),
        ("path,modality\nbert/scan.nii,PET\n", "modality 'PET'"),
        ("path,vessel_mask\nanna/head_cta.nii.gz,gone.nii\n", r"gone\.nii: no such file"),
    ],
)
def test_faults_of_the_table(root, table, message):
    (root / "labels.csv").write_text(table)
    with pytest.raises(ReadError, match=message):
        FolderSource(root, modality=None if "PET" in table else "CTA").index()


def test_faults_of_the_folder(tmp_path):
    with pytest.raises(ReadError, match="no such folder"):
        FolderSource(tmp_path / "gone").index()
    with pytest.raises(ReadError, match="holds no NIfTI"):
        FolderSource(tmp_path).index()
    nifti(tmp_path / "cta.nii")
    nifti(tmp_path / "cta.nii.gz")
    with pytest.raises(ReadError, match="have one name"):
        FolderSource(tmp_path).index()
    with pytest.raises(ValueError, match="modality is one of"):
        FolderSource(tmp_path, modality="PET")


def test_pairs_and_masks_named_by_the_table(tmp_path):
    nib.save(nib.Nifti1Pair(IMAGE, AFFINE), tmp_path / "a_cta.img")
    nifti(tmp_path / "drawn.nii.gz", (IMAGE > 490).astype(np.uint8))
    (tmp_path / "labels.csv").write_text("series_uid,aneurysm_mask,present\na_cta,drawn.nii.gz,1\n")
    source = FolderSource(tmp_path)
    assert source.index()["series_uid"].tolist() == ["a_cta"]
    assert (source.case("a_cta").aneurysm > 0).sum() == (IMAGE > 490).sum()


def test_modalities_in_names():
    names = {"head_CTA.1": "CTA", "sub-1_T2w": "T2", "tof-3d": "MRA", "cta_t1": None, "scan": None}
    assert {name: modality_in(name) for name in names} == names
