"""Slices in space, on series of the reference collection and on small written ones."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from aneurysm.check.case import check_case
from aneurysm.check.layout import find_layout
from aneurysm.check.runner import check_data
from aneurysm.data.scan import Grid
from aneurysm.data.sources.rsna_writer import series_uid_for, write_series


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """The folder of a clean series of 20 slices, 1.5 mm apart."""
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = (0.7, 0.7, 1.5)
    affine[3, 3] = 1
    grid = Grid((20, 64, 64), affine)
    volume = np.random.default_rng(0).gamma(2, 100, grid.shape)
    uid = series_uid_for("geometry")
    labels = {"age": 50, "sex": "F", "locations": None, "present": None}
    write_series(
        tmp_path, series_uid=uid, patient_id="p", modality="MRA", volume=volume, grid=grid, **labels,
        lesions=[], vessel=None, aneurysm=None,
    )  # fmt: skip
    return tmp_path / "series" / uid


def edit(folder: Path, change) -> None:
    import pydicom

    slices = sorted((pydicom.dcmread(p) for p in folder.iterdir()), key=lambda s: s.InstanceNumber)
    for i, slice_ in enumerate(slices):
        change(slice_, i)
        slice_.save_as(folder / f"{slice_.SOPInstanceUID}.dcm", enforce_file_format=True)


def codes(folder: Path) -> dict[str, str]:
    (item,) = find_layout(folder).items
    ((found, _),) = check_case(item)
    return {finding.code: finding.severity.value for finding in found.findings}


def move(slice_: Dataset, mm: float) -> None:
    x, y, z = slice_.ImagePositionPatient
    slice_.ImagePositionPatient = [x, y, float(z) + mm]


def test_a_clean_series(series: Path) -> None:
    assert codes(series) == {}


def test_jitter_is_a_note_and_a_gap_is_fatal(series: Path) -> None:
    edit(series, lambda s, i: move(s, 0.1 * (-1) ** i))
    assert codes(series) == {"uneven-gaps": "note", "reader-notes": "note"}  # interpolated
    edit(series, lambda s, i: move(s, 3.0 if i > 12 else 0))
    assert codes(series) == {"missing-slices": "fatal"}


def test_wrong_tags_that_readers_believe(series: Path) -> None:
    def change(slice_: Dataset, i: int) -> None:
        slice_.SpacingBetweenSlices = 3.0
        slice_.InstanceNumber = (7 * i) % 20 + 1
        slice_.RescaleSlope, slice_.RescaleIntercept = 1 + 0.01 * i, 0

    edit(series, change)
    assert codes(series) == {"spacing-tag": "note", "instance-order": "note", "varying-rescale": "note"}


def test_missing_patient(series: Path) -> None:
    edit(series, lambda s, i: setattr(s, "PatientID", ""))
    assert codes(series) == {"missing-tags": "warning"}


def test_files_without_the_dicom_marker_are_read_as_the_reader_does(series: Path) -> None:
    for path in series.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    assert codes(series) == {}


def test_placeholder_patients_of_an_rsna_set_are_each_their_own(series: Path) -> None:
    edit(series, lambda s, i: setattr(s, "PatientID", "Anonymous"))
    item = replace(find_layout(series).items[0], kind="rsna")
    ((found, facts),) = check_case(item)
    assert facts.patient_id == found.patient_id == item.series_uid
    assert [finding.code for finding in found.findings] == ["missing-tags"]


def test_values_that_are_no_numbers(series: Path) -> None:
    path = sorted(series.iterdir())[3]
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"0.7", b"A.7"))
    assert set(codes(series)) & {"bad-geometry", "unreadable-file", "missing-geometry"}


@pytest.mark.parametrize(
    ("archive", "expected"),
    [
        ("siemens_xa30_enhanced", [set(), set()]),
        ("vs_seg_t1ce_50slices", [set()]),
        ("pydicom", None),
    ],
)
def test_reference_series(shared_data: Path, tmp_path: Path, archive: str, expected: list | None) -> None:
    with zipfile.ZipFile(shared_data / "dicom" / f"{archive}.zip") as file:
        file.extractall(tmp_path)
    result = check_data(find_layout(tmp_path, "dicom"))
    loud = {case.series_uid: set() for case in result.cases}
    for finding in result.findings:
        assert finding.code != "check-failed", finding.message
        if finding.series_uid in loud and finding.severity != "note":
            loud[finding.series_uid].add(finding.code)
    if expected is not None:
        assert list(loud.values()) == expected
    else:
        # Malformed and incomplete files of a DICOM library: none of them is a usable volume.
        assert all(loud.values())
