"""The RSNA layout on disk: positions, pixels, tables and bytes."""

import ast
import hashlib
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
from scipy.spatial.transform import Rotation

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS
from aneurysm.data.scan import Grid
from aneurysm.data.sources.rsna_writer import RsnaWriter, finish, series_uid_for, write_series

SHAPE = (5, 7, 6)


def tilted_grid() -> Grid:
    """Unequal voxel sizes, tilted axes, origin far from zero."""
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [8, -5, 12], degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([0.45, 0.6, 1.25])[:, ::-1]
    affine[:3, 3] = [-31.5, 12.25, 140.125]
    return Grid(SHAPE, affine)


def arguments(modality: str = "CTA", **changes: object) -> dict:
    rng = np.random.default_rng(7)
    grid = tilted_grid()
    low, high = (-1000, 1500) if modality == "CTA" else (0, 900)
    aneurysm = np.zeros(SHAPE, np.uint8)
    aneurysm[3, 2, 4] = 1
    locations = np.zeros(13)
    locations[4] = 1
    locations[9] = np.nan
    settings = {
        "series_uid": series_uid_for("test", modality),
        "patient_id": "p1",
        "modality": modality,
        "volume": rng.integers(low, high, SHAPE).astype(np.float32),
        "grid": grid,
        "age": 57.0,
        "sex": "F",
        "locations": locations,
        "present": True,
        "lesions": [(grid.to_mm(np.array([3, 2, 4])), 1.5, 4)],
        "vessel": rng.integers(0, 14, SHAPE).astype(np.uint8),
        "aneurysm": aneurysm,
    }
    return settings | changes


def read_slices(root: Path, uid: str) -> list[pydicom.FileDataset]:
    slices = [pydicom.dcmread(path) for path in (root / "series" / uid).glob("*.dcm")]
    return sorted(slices, key=lambda s: s.InstanceNumber)


def lps_position(slice_: pydicom.FileDataset, row: float, column: float) -> np.ndarray:
    """DICOM PS3.3 C.7.6.2.1.1, in full."""
    direction = np.array(slice_.ImageOrientationPatient, float)
    row_spacing, column_spacing = map(float, slice_.PixelSpacing)
    corner = np.array(slice_.ImagePositionPatient, float)
    return corner + direction[:3] * column_spacing * column + direction[3:] * row_spacing * row


@pytest.mark.parametrize("modality", ["CTA", "MRA", "T1", "T2"])
def test_every_voxel_has_its_place_and_value(tmp_path: Path, modality: str) -> None:
    given = arguments(modality)
    write_series(tmp_path, **given)
    slices = read_slices(tmp_path, given["series_uid"])
    assert len(slices) == SHAPE[0]
    for k, slice_ in enumerate(slices):
        value = slice_.pixel_array * float(slice_.get("RescaleSlope", 1)) + float(
            slice_.get("RescaleIntercept", 0)
        )
        for h, w in np.ndindex(*SHAPE[1:]):
            found = given["grid"].to_index(lps_position(slice_, h, w) * (-1, -1, 1))
            index = np.rint(found).astype(int)
            assert np.allclose(found, index, atol=1e-5)
            assert index[0] == k
            assert value[h, w] == given["volume"][tuple(index)]
    assert slices[0].Modality == ("CT" if modality == "CTA" else "MR")
    # The slices follow the normal of the image plane, and the patient's left is to the right of the image.
    direction = np.array(slices[0].ImageOrientationPatient, float)
    step = np.array(slices[1].ImagePositionPatient, float) - np.array(slices[0].ImagePositionPatient, float)
    assert np.cross(direction[:3], direction[3:]) @ step == pytest.approx(1.25)
    assert direction[0] > 0.9


def test_nifti_lies_on_the_dicom_slices(tmp_path: Path) -> None:
    given = arguments()
    uid = given["series_uid"]
    write_series(tmp_path, **given)
    slices = read_slices(tmp_path, uid)
    folder = tmp_path / "segmentations"
    for name, expected in (
        (f"{uid}.nii", given["volume"]),
        (f"{uid}_cowseg.nii", given["vessel"]),
        (f"{uid}_aneurysm.nii.gz", given["aneurysm"]),
    ):
        image = nibabel.load(folder / name)
        array = np.asarray(image.dataobj)
        assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
        for i, j, k in np.ndindex(*array.shape):
            world = image.affine @ (i, j, k, 1)
            d, h, w = np.rint(given["grid"].to_index(world[:3])).astype(int)
            assert array[i, j, k] == expected[d, h, w]
            row, column = SHAPE[1] - 1 - h, SHAPE[2] - 1 - w
            assert np.allclose(lps_position(slices[d], row, column) * (-1, -1, 1), world[:3], atol=1e-3)


def test_headers_are_complete_and_named_after_the_file(tmp_path: Path) -> None:
    given = arguments()
    write_series(tmp_path, **given)
    for path in (tmp_path / "series" / given["series_uid"]).iterdir():
        slice_ = pydicom.dcmread(path)  # without force: the file has its preamble and meta header
        assert path.stem == slice_.SOPInstanceUID == slice_.file_meta.MediaStorageSOPInstanceUID
        assert slice_.SOPClassUID == pydicom.uid.CTImageStorage
        assert slice_.PatientID == "p1"
        assert (slice_.PatientAge, slice_.PatientSex) == ("057Y", "F")
        assert slice_.SeriesInstanceUID == given["series_uid"]
        assert float(slice_.SpacingBetweenSlices) == float(slice_.SliceThickness) == 1.25
        assert [float(s) for s in slice_.PixelSpacing] == [0.6, 0.45]
        assert slice_.SOPInstanceUID.is_valid and slice_.StudyInstanceUID.is_valid


def test_tables_hold_what_rsna_holds(tmp_path: Path) -> None:
    writer = RsnaWriter(tmp_path)
    writer.add_series(**arguments("MRA"))
    empty = {"locations": None, "present": None, "lesions": [], "age": None, "sex": None}
    writer.add_series(**arguments("T1", **empty, vessel=None, aneurysm=None))
    writer.finish()
    train = pd.read_csv(tmp_path / "train.csv", dtype=str, keep_default_na=False)
    assert list(train.columns) == [
        "SeriesInstanceUID", "PatientAge", "PatientSex", "Modality", *LABEL_COLUMNS,
    ]  # fmt: skip
    rows = train.set_index("Modality")
    assert set(rows.index) == {"MRA", "MRI T1post"}
    assert rows.loc["MRA", LOCATIONS[4]] == "1" and rows.loc["MRA", LOCATIONS[9]] == ""
    assert rows.loc["MRA", "Aneurysm Present"] == "1" and rows.loc["MRA", "PatientAge"] == "57"
    assert (rows.loc["MRI T1post", list(LABEL_COLUMNS)] == "").all()
    unmarked = rows.loc["MRI T1post", "SeriesInstanceUID"]
    assert not list((tmp_path / "segmentations").glob(f"{unmarked}*"))

    points = pd.read_csv(tmp_path / "train_localizers.csv")
    assert list(points.columns) == ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]
    assert len(points) == 1 and points.location[0] == LOCATIONS[4]
    assert "'x'" in points.coordinates[0]
    at = ast.literal_eval(points.coordinates[0])
    path = tmp_path / "series" / points.SeriesInstanceUID[0] / f"{points.SOPInstanceUID[0]}.dcm"
    centre = lps_position(pydicom.dcmread(path), at["y"], at["x"]) * (-1, -1, 1)
    assert np.allclose(centre, tilted_grid().to_mm(np.array([3, 2, 4])), atol=1e-3)


def test_bytes_depend_on_neither_time_nor_order(tmp_path: Path) -> None:
    def digest(root: Path) -> dict[str, str]:
        files = [path for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    for name, order in (("a", ["CTA", "T2"]), ("b", ["T2", "CTA"])):
        finish(tmp_path / name, [write_series(tmp_path / name, **arguments(m)) for m in order])
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(digest(tmp_path / "a")) == 2 * (SHAPE[0] + 3) + 2


def test_errors_name_the_case_and_the_fix(tmp_path: Path) -> None:
    flipped = tilted_grid().affine.copy()
    flipped[:, 2] *= -1
    with pytest.raises(ValueError, match=r"not canonical.*Reorient"):
        write_series(tmp_path, **arguments(grid=Grid(SHAPE, flipped)))
    with pytest.raises(ValueError, match="lies outside the volume"):
        write_series(tmp_path, **arguments(lesions=[((0.0, 0.0, 0.0), None, None)]))
    with pytest.raises(ValueError, match=r"vessel \(2, 2, 2\) does not lie on its grid"):
        write_series(tmp_path, **arguments(vessel=np.zeros((2, 2, 2), np.uint8)))
    with pytest.raises(ValueError, match="modality must be one of"):
        write_series(tmp_path, **arguments(modality="PET"))
