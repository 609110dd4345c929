"""The RSNA layout: labels, points (single- and multi-frame), masks in both layouts, and faults in them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from synthetic_series import write_series

from aneurysm.data.errors import ReadError
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS
from aneurysm.data.scan import Lesion
from aneurysm.data.sources.rsna import RsnaSource, match_lesions, parse_coordinates
from aneurysm.data.tables import INDEX, LOCATION_KEYS

MCA = "Left Middle Cerebral Artery"


def write_mask(path: Path, array: np.ndarray, grid) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, grid.affine), path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    stored = np.random.default_rng(0).integers(0, 900, (12, 20, 24)).astype(np.uint16)
    rows = []
    for uid, modality, present, location, age in (
        ("1.1", "MRA", "1", "1", "61"), ("1.2", "CTA", "0", "0", ""), ("1.3", "MRI T1post", "", "", "033Y"),
        ("1.4", "MRI T2", "0", "0", "50"), ("1.5", "CTA", "0", "0", "50"),
    ):  # fmt: skip
        labels = dict.fromkeys(LABEL_COLUMNS, "" if present == "" else "0")
        labels |= {"Aneurysm Present": present, MCA: location}
        rows.append(
            {
                "SeriesInstanceUID": uid,
                "PatientAge": age,
                "PatientSex": "Female",
                "Modality": modality,
                **labels,
            }
        )
        if uid != "1.5":  # listed without a folder
            write_series(
                tmp_path / "series" / uid, stored, series=uid, modality="CT" if modality == "CTA" else "MR",
                change=lambda ds, i, uid=uid: setattr(ds, "PatientID", f"P{uid[-1]}"),
            )  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame(
        [("1.1", "1.1.5", "{'x': 12.0, 'y': 7.0}", MCA), ("1.1", "9.9.9", "{'x': 1, 'y': 2}", MCA),
         ("1.1", "1.1.2", "{'x': nan, 'y': 2}", MCA)],
        columns=["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"],
    ).to_csv(tmp_path / "train_localizers.csv", index=False)  # fmt: skip
    return tmp_path


def test_index(root, caplog):
    index = RsnaSource(root, site="here").index()
    assert list(index.columns) == list(INDEX.columns)
    assert index["series_uid"].tolist() == ["1.1", "1.2", "1.3", "1.4"]
    assert "1 series without a folder" in caplog.text and "1.5" in caplog.text
    assert index["patient_id"].tolist() == ["P1", "P2", "P3", "P4"]
    assert index["modality"].tolist() == ["MRA", "CTA", "T1", "T2"]
    np.testing.assert_array_equal(index["age"], np.float32([61, np.nan, 33, 50]))
    assert set(index["sex"]) == {"F"} and set(index["site"]) == {"here"}
    np.testing.assert_array_equal(index["present"], np.float32([1, 0, np.nan, 0]))
    positive = f"location_{LOCATIONS.index(MCA)}"
    assert index.loc[0, positive] == 1 and index.loc[0, list(LOCATION_KEYS)].sum() == 1
    assert index.loc[2, list(LOCATION_KEYS)].isna().all()


def test_point_becomes_a_lesion_and_bad_points_a_note(root):
    case = RsnaSource(root).case("1.1")
    assert case.present is True and case.locations[LOCATIONS.index(MCA)] == 1
    (lesion,) = case.lesions
    # Fifth slice, column 12, row 7 of the stored images.
    np.testing.assert_allclose(lesion.centre_mm, case.scan.source.to_mm([4, 7, 12]))
    assert lesion.radius_mm is None and lesion.location == LOCATIONS.index(MCA)
    left_out = [note for note in case.scan.notes if "localizer left out" in note]
    assert len(left_out) == 2 and "9.9.9" in left_out[0] and "nan" in left_out[1]
    assert case.scan.age == 61 and case.scan.sex == "F" and case.scan.patient_id == "P1"
    unknown = RsnaSource(root).case("1.3")
    assert unknown.present is None and np.isnan(unknown.locations).all() and unknown.scan.modality == "T1"


@pytest.mark.parametrize("layout", ["{uid}_{kind}.nii", "{uid}/{uid}_{kind}.nii.gz"])
def test_masks_in_both_layouts_lie_on_the_scan(root, layout):
    scan = RsnaSource(root).case("1.1").scan
    source = scan.source
    vessel = np.zeros(source.shape, np.uint8)
    vessel[3:6, 5:9, 10:14] = 10
    aneurysm = np.zeros(source.shape, np.uint8)
    aneurysm[4, 6:9, 11:14] = 1
    aneurysm[10, 2:4, 2:4] = 2
    for kind, array in (("cowseg", vessel), ("aneurysm", aneurysm)):
        write_mask(root / "segmentations" / layout.format(uid="1.1", kind=kind), array, source)
    before = RsnaSource(root).fingerprint("1.1")
    case = RsnaSource(root).case("1.1")
    for array, mask in ((vessel, case.vessel), (aneurysm, case.aneurysm)):
        np.testing.assert_array_equal(mask, array[:, ::-1, ::-1])
    first, second = case.lesions
    np.testing.assert_allclose(first.centre_mm, source.to_mm([4, 7, 12]), atol=1e-9)
    np.testing.assert_allclose(4 / 3 * np.pi * first.radius_mm**3, 9 * source.voxel_mm3)
    assert first.location == LOCATIONS.index(MCA) and second.location is None
    write_mask(root / "segmentations" / layout.format(uid="1.1", kind="cowseg"), vessel * 0, source)
    assert RsnaSource(root).fingerprint("1.1") != before


def test_mask_of_another_grid_is_resampled_and_a_stray_one_left_out(root):
    source = RsnaSource(root)
    scan = source.case("1.1").scan
    coarse = scan.source.affine.copy()
    coarse[:3, :3] *= 2
    mask = np.full((6, 10, 12), 4, np.uint8)
    path = root / "segmentations/1.1_cowseg.nii"
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(mask, coarse), path)
    assert (source.case("1.1").vessel == 4).mean() > 0.8
    coarse[:3, 3] += 400
    nib.save(nib.Nifti1Image(mask, coarse), path)
    case = source.case("1.1")
    assert case.vessel is None and any("lies outside the image" in note for note in case.scan.notes)


def test_frame_key_of_multi_frame_series(root):
    folder = root / "series/1.1"
    files = sorted(folder.iterdir())
    pixels = b"".join(dcmread(f).PixelData for f in files)
    ds = dcmread(files[0])
    ds.NumberOfFrames, ds.PixelData, ds.SpacingBetweenSlices = len(files), pixels, 1.5
    for f in files:
        f.unlink()
    ds.save_as(files[0])
    table = pd.DataFrame(
        [
            ("1.1", "1.1.1", "{'x': 3.0, 'y': 4.0, 'f': 7}", MCA),
            ("1.1", "1.1.1", "{'x': 3.0, 'y': 4.0}", MCA),
        ],
        columns=["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"],
    )
    table.to_csv(root / "train_localizers.csv", index=False)
    case = RsnaSource(root).case("1.1")
    np.testing.assert_allclose(case.lesions[0].centre_mm, case.scan.source.to_mm([7, 4, 3]))
    assert len(case.lesions) == 1 and any("multi-frame" in note for note in case.scan.notes)


def test_coordinates():
    assert parse_coordinates("{'x': 258.36, 'y': 261.36}") == (258.36, 261.36, None)
    assert parse_coordinates("{'x': 1, 'y': 2, 'f': 12.0}") == (1.0, 2.0, 12)
    for text in ("", "12", "{'x': 1}", "__import__('os')", "{'x': 'a', 'y': 1}"):
        with pytest.raises(ReadError, match="coordinates"):
            parse_coordinates(text)


def test_matching_is_one_to_one_and_far_points_stay():
    def lesion(x, radius=None, location=None):
        return Lesion(np.array([x, 0.0, 0.0]), radius, location)

    points = [lesion(9, None, 5), lesion(1, None, 4), lesion(50, None, 6)]
    matched = match_lesions([lesion(0, 3.0), lesion(10, 2.0)], points)
    found = [(m.centre_mm[0], m.radius_mm, m.location) for m in matched]
    assert found == [(0, 3.0, 4), (10, 2.0, 5), (50, None, 6)]
    assert match_lesions([], [lesion(1)])[0].radius_mm is None and match_lesions([], []) == []


def test_faults_of_the_data_set(root, tmp_path):
    with pytest.raises(ReadError, match="no such folder"):
        RsnaSource(tmp_path / "elsewhere").index()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReadError, match=r"train\.csv is missing"):
        RsnaSource(tmp_path / "empty").index()
    with pytest.raises(ReadError, match=r"7\.7: not in the index"):
        RsnaSource(root).case("7.7")
    table = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    for change, message in (
        (lambda t: t.drop(columns="Modality"), "Modality"),
        (lambda t: t.assign(Modality="PET"), "unknown Modality"),
        (lambda t: t.assign(**{MCA: "maybe"}), "must be 0, 1 or empty"),
        (lambda t: pd.concat([t, t[:1]]), "listed twice"),
        (lambda t: t[4:], "none of the 1 series"),
    ):
        change(table).to_csv(root / "train.csv", index=False)
        with pytest.raises(ReadError, match=message):
            RsnaSource(root).index()
