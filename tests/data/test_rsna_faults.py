"""Every known problem of RSNA 2025 ends in the right volume, a recorded repair, or an error that names it.

Not tested here, because nothing in a file shows it: necks, empty tops and motion (the preparation crops to
the head; motion stays in the image) and wrong labels (a net's disagreement finds them, `exclude` and an
edited train.csv mend them). The 27 multi-frame series that converters turn the wrong way are placed by
the position of every frame; `test_geometry.py` does that in three planes.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from pydicom.uid import RLELossless
from synthetic_series import write_series

from aneurysm.data.errors import ReadError
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, VESSEL_LABEL
from aneurysm.data.sources.people import parse_age, parse_sex
from aneurysm.data.sources.rsna import RsnaSource
from aneurysm.data.sources.rsna_tables import contradictions, modality_named, parse_coordinates
from aneurysm.data.tables import LOCATION_KEYS

MCA, ACOM, TIP = "Left Middle Cerebral Artery", "Anterior Communicating Artery", "Basilar Tip"
STORED = np.random.default_rng(0).integers(0, 900, (12, 20, 24)).astype(np.uint16)


def data_set(root: Path, *, labels=None, points=None, modality="MRA", row=None, **series) -> RsnaSource:
    """One series '1.1' with 12 slices; image k has the SOP instance uid 1.1.k."""
    kind = "CT" if modality == "CTA" else "MR"
    write_series(root / "series/1.1", series.pop("stored", STORED), series="1.1", modality=kind, **series)
    cells = {**dict.fromkeys(LABEL_COLUMNS, "0"), **(labels or {})}
    train = {"SeriesInstanceUID": "1.1", "PatientAge": "61", "PatientSex": "Female", "Modality": modality}
    pd.DataFrame([{**train, **cells, **(row or {})}]).to_csv(root / "train.csv", index=False)
    columns = ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]
    rows = [("1.1", *point) for point in points or []] or [("7.7", "7.7.1", "{'x': 1, 'y': 1}", MCA)]
    pd.DataFrame(rows, columns=columns).to_csv(root / "train_localizers.csv", index=False)
    return RsnaSource(root)


POSITIVE = {"Aneurysm Present": "1", MCA: "1"}


def test_all_slices_at_one_position(tmp_path):
    def flat(ds, i):
        ds.ImagePositionPatient = [0.0, 0.0, 5.0]

    source = data_set(tmp_path, change=flat)
    assert source.index()["series_uid"].tolist() == ["1.1"]
    with pytest.raises(ReadError, match=r"1\.1"):
        source.case("1.1")


def test_localizer_on_a_missing_image(tmp_path):
    case = data_set(tmp_path, labels=POSITIVE, points=[("9.9", "{'x': 3, 'y': 4}", MCA)]).case("1.1")
    assert case.present is True and case.lesions == () and case.aneurysm is None
    assert any("localizer left out" in note and "9.9" in note for note in case.scan.notes)


def test_positive_without_localizer_is_noted_in_table_and_scan(tmp_path):
    source = data_set(tmp_path, labels=POSITIVE)
    expected = "labelled with an aneurysm but without a localizer"
    row = source.index().iloc[0]
    assert row["note"] == expected and np.isnan(row["lesions"]) and row["present"] == 1
    assert expected in source.case("1.1").scan.notes
    # Where a mask shows the lesion nothing is missing.
    write_mask(tmp_path / "segmentations/1.1_aneurysm.nii", source, (slice(3, 5), slice(4, 7), slice(5, 8)))
    row = RsnaSource(tmp_path).index().iloc[0]
    assert row["note"] == "" and row["has_aneurysm_mask"] and not row["has_vessel_mask"]


def write_mask(path: Path, source: RsnaSource, where, value: int = 1) -> None:
    grid = source.case("1.1").scan.source
    mask = np.zeros(grid.shape, np.uint8)
    mask[where] = value
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(mask, grid.affine), path)


def test_mixed_orientations(tmp_path):
    def turned(fewest):
        def change(ds, i):
            if i < fewest:
                ds.ImageOrientationPatient = [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]

        return change

    case = data_set(tmp_path / "few", change=turned(2)).case("1.1")
    assert case.scan.volume.shape[0] == 10 and any("dropped" in note for note in case.scan.notes)
    with pytest.raises(ReadError, match=r"1\.1"):
        data_set(tmp_path / "half", change=turned(6)).case("1.1")


def test_scout_among_the_slices(tmp_path):
    def scout(ds, i):
        if i == 0:
            ds.Rows, ds.Columns, ds.PixelData = 10, 12, bytes(240)
            ds.ImagePositionPatient = [500.0, 500.0, 500.0]

    points = [("1.1.1", "{'x': 3, 'y': 4}", MCA), ("1.1.6", "{'x': 3, 'y': 4}", MCA)]
    case = data_set(tmp_path, labels=POSITIVE, points=points, change=scout).case("1.1")
    assert case.scan.volume.shape[0] == 11
    (lesion,) = case.lesions
    np.testing.assert_allclose(lesion.centre_mm, case.scan.source.to_mm([4, 4, 3]), atol=1e-6)
    assert any("outside the volume" in note for note in case.scan.notes)


def test_irregular_gaps(tmp_path):
    def jump(ds, i):
        ds.ImagePositionPatient = [0.0, 0.0, 5.0 * i + (10.0 if i > 6 else 0.0)]

    with pytest.raises(ReadError, match=r"1\.1"):
        data_set(tmp_path, change=jump).case("1.1")


def test_hounsfield_units_are_not_shifted_twice(tmp_path):
    hu = np.full((12, 20, 24), -1000, np.int16)
    hu[:, 5:15, 5:18] = 40
    case = data_set(tmp_path / "hu", modality="CTA", stored=hu, intercept=-1024.0).case("1.1")
    assert case.scan.volume.min() == -1000 and case.scan.volume.max() == 40 and case.scan.notes
    raw = data_set(tmp_path / "raw", modality="CTA", stored=hu + 1024, intercept=-1024.0).case("1.1")
    np.testing.assert_array_equal(raw.scan.volume, case.scan.volume)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [({MCA: "1"}, MCA), ({ACOM: "1"}, ACOM), ({MCA: "1", ACOM: "1"}, None), ({}, None)],
)
def test_one_point_with_two_locations(tmp_path, labels, expected):
    points = [("1.1.5", "{'x': 12.0, 'y': 7.0}", place) for place in (MCA, ACOM)]
    source = data_set(tmp_path, labels={"Aneurysm Present": "1", **labels}, points=points)
    assert source.index().loc[0, "lesions"] == 1 and "2 locations" in source.index().loc[0, "note"]
    case = source.case("1.1")
    (lesion,) = case.lesions
    assert lesion.location == (None if expected is None else LOCATIONS.index(expected))
    assert any("one point is given as" in note for note in case.scan.notes)


def test_masks_of_another_shape_are_placed_by_their_affine_and_noted(tmp_path):
    source = data_set(tmp_path, labels=POSITIVE, points=[("1.1.5", "{'x': 12.0, 'y': 7.0}", MCA)])
    grid = source.case("1.1").scan.source
    cut = np.full((12, 20, 20), 10, np.uint8)  # four columns less than the series
    (tmp_path / "segmentations").mkdir()
    nib.save(nib.Nifti1Image(cut, grid.affine), tmp_path / "segmentations/1.1_cowseg.nii")
    case = source.case("1.1")
    assert any("other voxels than the image" in note for note in case.scan.notes)
    np.testing.assert_array_equal(case.vessel[:, ::-1, ::-1][..., :20], 10)
    assert not case.vessel[:, ::-1, ::-1][..., 20:].any()
    nib.save(nib.Nifti1Image(cut * 0 + 26, grid.affine), tmp_path / "segmentations/1.1_cowseg.nii")
    case = source.case("1.1")
    assert case.vessel is None and any("vessel label 26" in note for note in case.scan.notes)


def test_the_masks_number_the_arteries_in_their_own_order():
    names = (
        "Other Posterior Circulation", "Basilar Tip",
        "Right Posterior Communicating Artery", "Left Posterior Communicating Artery",
        "Right Infraclinoid Internal Carotid Artery", "Left Infraclinoid Internal Carotid Artery",
        "Right Supraclinoid Internal Carotid Artery", "Left Supraclinoid Internal Carotid Artery",
        "Right Middle Cerebral Artery", "Left Middle Cerebral Artery",
        "Right Anterior Cerebral Artery", "Left Anterior Cerebral Artery", "Anterior Communicating Artery",
    )  # fmt: skip
    assert [LOCATIONS[VESSEL_LABEL.index(label)] for label in range(1, 14)] == list(names)


def test_contradictions_between_labels_and_points(tmp_path):
    source = data_set(tmp_path, points=[("1.1.5", "{'x': 12.0, 'y': 7.0}", MCA)])
    assert "left out" in source.index().loc[0, "note"] and source.index().loc[0, "lesions"] == 0
    case = source.case("1.1")
    assert case.present is False and case.lesions == ()
    none = [0.0] * 13
    at_mca = [float(name == MCA) for name in LOCATIONS]
    assert contradictions(0, at_mca, [], True) == [f"labelled without aneurysm but with one at {MCA}"]
    assert contradictions(1, none, [], True) == ["labelled with an aneurysm but at no location"]
    assert contradictions(0, none, [], False) == [] and contradictions(np.nan, [np.nan] * 13, [], False) == []


def test_compressed_series_are_read_like_plain_ones(tmp_path):
    plain = data_set(tmp_path / "plain").case("1.1")
    source = data_set(tmp_path / "rle")
    for path in (tmp_path / "rle/series/1.1").iterdir():
        ds = dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)
    np.testing.assert_array_equal(source.case("1.1").scan.volume, plain.scan.volume)


def test_tables_as_people_edit_them(tmp_path, caplog):
    row = {
        "PatientAge": " 063Y",
        "PatientSex": "male",
        "Modality": "MRI T1 post",
        "SeriesInstanceUID": "1.1 ",
    }
    source = data_set(tmp_path, row=row, labels={MCA: ""})
    (tmp_path / "series/5.5").mkdir()
    table = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(table, encoding="utf-8-sig")
    index = source.index()
    assert index.loc[0, ["series_uid", "age", "sex", "modality"]].tolist() == ["1.1", 63, "M", "T1"]
    assert np.isnan(index.loc[0, f"location_{LOCATIONS.index(MCA)}"])
    assert "1 folders of series/; left out: 5.5" in caplog.text and "7.7" in caplog.text
    assert [modality_named(m) for m in ("CTA", "mri_t2", "MRI T1post", "PET")] == ["CTA", "T2", "T1", None]
    (tmp_path / "leave_out.csv").write_text("uid\n1.1,motion\n")
    for exclude in (["1.1"], tmp_path / "leave_out.csv"):
        with pytest.raises(ReadError, match="none of the 1 series"):
            RsnaSource(tmp_path, exclude=exclude).index()


def test_series_of_nobody_are_patients_of_their_own(tmp_path):
    source = data_set(tmp_path, change=lambda ds, i: setattr(ds, "PatientID", "ANONYMOUS"))
    assert source.index()["patient_id"].tolist() == ["1.1"]


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("63", 63), ("063Y", 63),
        ("063y", 63), ("63.0", 63), ("90+", 90), (">89", 89), (">= 89", 89), ("018M", 1.5),
        ("45 years", 45), ("45,5", 45.5), ("0730D", 2), ("26 weeks", 26 / 52.18), ("89Y+", 89),
    ],
)  # fmt: skip
def test_ages(text, years):
    assert parse_age(text) == pytest.approx(years, rel=2e-3)


def test_ages_and_sexes_that_say_nothing():
    for text in ("", "n/a", "nan", "000Y", "0", "999", "forty", "-5", None, "1e5"):
        assert np.isnan(parse_age(text)), text
    assert parse_age("18", unit="m") == 1.5
    assert [parse_sex(s) for s in ("M", "female", "Male ", "O", "n/a", "1", "F", "W")] == [
        "M", "F", "M", "", "", "", "F", "F",
    ]  # fmt: skip
    assert parse_sex("2", {"1": "Male", "2": "Female participant"}) == "F"


def test_single_quoted_coordinates_are_never_executed():
    assert parse_coordinates("{'x': 258.36, 'y': 261.36, 'f': 3}") == (258.36, 261.36, 3)
    for text in ("{'x': print(1), 'y': 2}", "[1, 2]", "{'x': 1, 'y': inf}", "{" * 500, "null"):
        with pytest.raises(ReadError, match="coordinates"):
            parse_coordinates(text)
    assert len(LOCATION_KEYS) == 13
