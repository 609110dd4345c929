"""Series as they arrive: permuted, incomplete, mixed, tilted, enhanced. The right volume or an error."""

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import BasicTextSRStorage
from synthetic_series import SERIES, write_enhanced, write_series

from aneurysm.data.dicom.series import find_series, read_series, read_series_with_slices
from aneurysm.data.errors import ReadError

AXES = {
    "axial": np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float),  # columns: LPS along slices, rows, columns
    "sagittal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float)[:, [0, 2, 1]],
    "coronal": np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float),
    "feet first": np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]], float),
}
ALLOWED = (
    "BitsAllocated BitsStored Columns FrameOfReferenceUID HighBit ImageOrientationPatient "
    "ImagePositionPatient InstanceNumber Modality PatientID PhotometricInterpretation PixelData "
    "PixelRepresentation PixelSpacing PlanarConfiguration RescaleIntercept RescaleSlope RescaleType Rows "
    "SOPClassUID SOPInstanceUID SamplesPerPixel SeriesInstanceUID SliceThickness SpacingBetweenSlices "
    "StudyInstanceUID"
)


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (8, 10, 12)).astype(np.uint16)


def assert_in_place(scan, slices, stored, uid_of=lambda i: (f"{SERIES}.{i + 1}", None)) -> None:
    """Every voxel at the place that its own slice's tags give it."""
    assert sorted(scan.volume.shape) == sorted(stored.shape)
    for index in np.random.default_rng(1).integers(0, stored.shape, (40, 3)):
        uid, frame = uid_of(int(index[0]))
        d, h, w = np.rint(scan.grid.to_index(slices.to_mm(uid, index[2], index[1], frame))).astype(int)
        assert scan.volume[d, h, w] == stored[tuple(index)]
    directions = scan.grid.affine[:3, :3] / scan.grid.spacing
    assert (np.diag(directions[::-1]) > 0.7).all()


@pytest.mark.parametrize("plane", AXES)
@pytest.mark.parametrize("reverse", [False, True])
def test_planes_and_directions(tmp_path, stored, plane, reverse):
    """Also where slices are stored from the head down, under shuffled instance numbers and file names."""
    axes = AXES[plane].copy()
    if reverse:
        axes[:, 0] *= -1

    def permute(ds, i):
        ds.InstanceNumber = (i * 5) % 8 + 1

    files = write_series(tmp_path, stored, axes=axes, change=permute)
    for i, path in enumerate(files):
        path.rename(path.with_name(f"{(i * 3) % 8}.dcm"))
    assert_in_place(*read_series_with_slices(tmp_path), stored)


@pytest.mark.parametrize("plane", AXES)
def test_enhanced_multi_frame(tmp_path, stored, plane):
    """Frames in any order, each with its own slope."""
    order = np.random.default_rng(3).permutation(len(stored))
    slopes = 1.0 + np.arange(len(stored))
    path = write_enhanced(tmp_path / "e.dcm", stored, axes=AXES[plane], order=order, slopes=slopes)
    frame_of = {int(i): k for k, i in enumerate(order)}
    scan, slices = read_series_with_slices([path])
    scaled = stored * slopes[:, None, None]
    assert_in_place(scan, slices, scaled, lambda i: (f"{SERIES}.1", frame_of[i]))
    assert not any("no positions" in note for note in scan.notes)


def two_phases(ds):
    n = int(ds.NumberOfFrames)
    ds.PerFrameFunctionalGroupsSequence = list(ds.PerFrameFunctionalGroupsSequence) * 2
    second = np.frombuffer(ds.PixelData, np.uint16) + 7
    ds.NumberOfFrames, ds.PixelData = 2 * n, ds.PixelData + second.tobytes()


def two_stacks(ds):
    """Two frames of a sagittal scout in the same file."""
    for group in ds.PerFrameFunctionalGroupsSequence[:2]:
        scout = dcmread_orientation()
        group.PlaneOrientationSequence = [scout]


def dcmread_orientation():
    from pydicom import Dataset

    orientation = Dataset()
    orientation.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    return orientation


def test_enhanced_with_two_phases_is_refused(tmp_path, stored):
    path = write_enhanced(tmp_path / "e.dcm", stored, change=two_phases)
    with pytest.raises(ReadError, match=r"e.dcm frame 0 and e.dcm frame 8 are different images .* phases"):
        read_series([path])


def test_enhanced_with_a_second_stack_keeps_the_majority(tmp_path, stored):
    path = write_enhanced(tmp_path / "e.dcm", stored, change=two_stacks)
    scan, _ = read_series_with_slices([path])
    np.testing.assert_array_equal(scan.volume, stored[2:, ::-1, ::-1])
    assert any("dropped 2 slices" in note and "frame 0" in note for note in scan.notes)


def test_enhanced_that_describes_too_few_frames_is_refused(tmp_path, stored):
    def forget(ds):
        ds.PerFrameFunctionalGroupsSequence = list(ds.PerFrameFunctionalGroupsSequence)[:-1]

    path = write_enhanced(tmp_path / "e.dcm", stored, change=forget)
    with pytest.raises(ReadError, match="says it has 8 frames but describes 7"):
        read_series([path])


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_multi_frame_without_frame_positions_keeps_its_own_plane(tmp_path, stored, plane):
    """Such MR files of RSNA are not axial, whatever a reader without their orientation assumes."""
    path = write_series(tmp_path, stored[:1], axes=AXES[plane])[0]
    ds = dcmread(path)
    ds.NumberOfFrames, ds.PixelData, ds.SpacingBetweenSlices = len(stored), stored.tobytes(), 1.5
    ds.save_as(path)
    scan, slices = read_series_with_slices([path])
    assert_in_place(scan, slices, stored, lambda i: (f"{SERIES}.1", i))
    assert any("evenly spaced" in note for note in scan.notes)
    del ds.ImageOrientationPatient
    ds.save_as(path)
    with pytest.raises(ReadError, match="ImageOrientationPatient is missing"):
        read_series([path])
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    del ds.SpacingBetweenSlices, ds.SliceThickness
    ds.save_as(path)
    with pytest.raises(ReadError, match="8 frames without positions"):
        read_series([path])


@pytest.mark.parametrize(("modality", "expected"), [("CT", "CTA"), ("MR", "MRA")])
def test_only_the_tags_of_the_rsna_test_set(tmp_path, stored, modality, expected):
    def strip(ds, i):
        for element in list(ds):
            if element.keyword not in ALLOWED.split():
                del ds[element.tag]

    scan = read_series(write_series(tmp_path, stored, change=strip, modality=modality))
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])
    assert (scan.modality, scan.age, scan.sex) == (expected, None, None)


def drop(*gone):
    return lambda files, folder: [path.unlink() for i, path in enumerate(files) if i in gone]


def edit(i, **tags):
    def spoil(files, folder):
        ds = dcmread(files[i])
        for tag, value in tags.items():
            if value is None:
                delattr(ds, tag)
            else:
                setattr(ds, tag, value)
        ds.save_as(files[i])

    return spoil


def second_phase(files, folder):
    for i, path in enumerate(files):
        ds = dcmread(path)
        ds.SOPInstanceUID = f"{SERIES}.9{i}"
        ds.PixelData = bytes(len(ds.PixelData))
        ds.save_as(folder / f"late{i}.dcm")


def scout(series):
    def add(files, folder):
        pixels = np.zeros((2, 10, 12), np.uint16)
        write_series(folder / "scout", pixels, axes=AXES["sagittal"], series=series)

    return add


def junk(files, folder):
    (folder / "README.txt").write_text("hello")
    (folder / "DICOMDIR").write_bytes(bytes(200))
    (folder / "thumbs.db").write_bytes(b"\x08\0" + bytes(500))
    report = dcmread(files[0])
    for tag in ("Rows", "Columns", "PixelData"):
        delattr(report, tag)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    report.SeriesInstanceUID = SERIES + ".77"
    report.save_as(folder / "report.dcm")


def truncate(files, folder):
    files[3].write_bytes(files[3].read_bytes()[:-50])


def cut_header(files, folder):
    files[3].write_bytes(files[3].read_bytes()[:700])


def one_position(files, folder):
    for i in range(len(files)):
        edit(i, ImagePositionPatient=[0, 0, 5])(files, folder)


REFUSED = {
    "missing slice": (drop(3), "1.5 mm apart, but 3 mm between 002.dcm and 004.dcm; a slice is missing at 1"),
    "two missing slices": (drop(3, 4), "but 4.5 mm between 002.dcm and 005.dcm; a slice is missing"),
    "missing in two places": (drop(2, 5), "001.dcm and 003.dcm; a slice is missing at 2 place"),
    "two phases": (second_phase, "000.dcm and late0.dcm are different images at the same position"),
    "all at one position": (one_position, "all 8 slices lie at the same position"),
    "foreign slice": (edit(4, ImagePositionPatient=[-10, -20, 37.1]), "2.6 mm between 003.dcm and 004.dcm"),
    "shifted in its plane": (edit(4, ImagePositionPatient=[-6, -20, 36]), "004.dcm is shifted in its plane"),
    "no pixel spacing": (edit(4, PixelSpacing=None), "004.dcm: PixelSpacing is missing"),
    "zero pixel spacing": (edit(4, PixelSpacing=[0, 0.5]), "004.dcm: PixelSpacing .* must be positive"),
    "no position": (edit(4, ImagePositionPatient=None), "004.dcm: ImagePositionPatient is missing"),
    "no orientation": (edit(4, ImageOrientationPatient=None), "004.dcm: ImageOrientationPatient is missing"),
    "crooked orientation": (edit(4, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "not two perpendicular"),
    "other series": (scout(SERIES + ".5"), "holds 2 series .* find_series"),
    "truncated": (truncate, "003.dcm: .*truncated"),
    "cut in its header": (cut_header, "003.dcm"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_faults_that_are_refused(tmp_path, stored, fault):
    spoil, message = REFUSED[fault]
    spoil(write_series(tmp_path, stored), tmp_path)
    with pytest.raises(ReadError, match=message) as caught:
        read_series(tmp_path)
    assert "\n" not in str(caught.value)


def wrong_thickness(files, folder):
    for i in range(len(files)):
        edit(i, SliceThickness=5.0, SpacingBetweenSlices=7.0)(files, folder)


def duplicate(files, folder):
    (folder / "again.dcm").write_bytes(files[2].read_bytes())


REPAIRED = {
    "scout of the same series": (scout(SERIES), "dropped 2 slices of another size"),
    "junk beside slices": (junk, "passed over 1 DICOM files without an image: report.dcm"),
    "duplicate": (duplicate, "dropped 1 copies: again.dcm"),
    "wrong thickness": (wrong_thickness, None),
}


@pytest.mark.parametrize("fault", REPAIRED)
def test_faults_that_are_repaired(tmp_path, stored, fault):
    spoil, note = REPAIRED[fault]
    spoil(write_series(tmp_path, stored), tmp_path)
    scan = read_series(tmp_path)
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])
    np.testing.assert_allclose(scan.grid.spacing, [1.5, 0.5, 0.7])
    assert note is None or any(note in n for n in scan.notes)


def test_scout_of_another_series_is_grouped_apart(tmp_path, stored):
    scout(SERIES + ".5")(write_series(tmp_path, stored), tmp_path)
    groups = find_series(tmp_path)
    assert {uid: len(files) for uid, files in groups.items()} == {SERIES: 8, SERIES + ".5": 2}
    np.testing.assert_array_equal(read_series(groups[SERIES]).volume, stored[:, ::-1, ::-1])
    with pytest.raises(ReadError, match="2 slices are not a volume"):
        read_series(groups[SERIES + ".5"])


def test_every_second_slice_missing_in_one_half_is_refused(tmp_path, stored):
    files = write_series(tmp_path, np.concatenate([stored, stored]))
    with pytest.raises(ReadError, match=r"1\.5 mm apart, but 3 mm"):
        read_series([path for i, path in enumerate(files) if i < 8 or i % 2])


def test_all_files_with_one_fault_are_named(tmp_path, stored):
    files = write_series(tmp_path, stored)
    for i in (1, 4, 6):
        edit(i, PixelSpacing=None)(files, tmp_path)
    with pytest.raises(ReadError, match=r"001.dcm: PixelSpacing is missing.*004.dcm, 006.dcm"):
        read_series(tmp_path)


def test_mixed_orientations_without_majority_are_refused(tmp_path, stored):
    write_series(tmp_path / "a", stored)
    write_series(tmp_path / "b", stored, axes=AXES["coronal"])
    with pytest.raises(ReadError, match="no majority"):
        read_series(tmp_path)


def test_tilted_and_uneven_stack_is_resampled_with_both_notes(tmp_path):
    tilt = np.radians(15)
    axes = np.stack([[0, 0, 1], [0, np.cos(tilt), -np.sin(tilt)], [1, 0, 0]], axis=1)
    z = np.arange(20) + 0.2 * np.sin(np.arange(20))
    z[0], z[-1] = 0, 19
    lps_z = z[:, None, None] - 0.8 * np.sin(tilt) * np.arange(30)[None, :, None]
    stored = np.broadcast_to(1000 + 20 * lps_z, (20, 30, 30)).round().astype(np.uint16)

    def shift(ds, i):
        ds.ImagePositionPatient = [0, 0, float(z[i])]

    scan = read_series(write_series(tmp_path, stored, (1, 0.8, 0.8), axes, (0, 0, 0), change=shift))
    assert any("even spacing" in n for n in scan.notes) and any("tilt of 15.0" in n for n in scan.notes)
    inside = np.argwhere(scan.volume > stored.min() + 1)
    inside = inside[(inside[:, 0] > 1) & (inside[:, 0] < 18)]
    wanted = 1000 + 20 * scan.grid.to_mm(inside)[:, 2]
    assert np.quantile(abs(scan.volume[tuple(inside.T)] - wanted), 0.9) < 3  # the leaning ends aside
