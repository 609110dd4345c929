"""DICOM reading against reference conversions, real vendor files and deliberately spoiled series."""

import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from synthetic_series import SERIES, write_series

from aneurysm.data.dicom.series import find_series, read_series, read_series_with_slices
from aneurysm.data.errors import ReadError
from aneurysm.data.resample import canonicalise
from aneurysm.data.scan import Grid


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (6, 10, 12)).astype(np.uint16)


@pytest.fixture(scope="session")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dicom")
    for name in ("siemens_xa30_enhanced", "dicom2nifti", "ge_head_ct_tilt", "vs_seg_t1ce_50slices"):
        with zipfile.ZipFile(shared_data / "dicom" / f"{name}.zip") as archive:
            archive.extractall(root / name)
    return root


def assert_same(folder: Path, reference: Path, modality: str | None = None) -> None:
    scan = read_series(folder, modality)
    image = nib.load(reference)
    volume = np.asarray(image.dataobj, np.float32).reshape(image.shape[:3])
    volume, grid = canonicalise(volume, Grid(image.shape[:3], image.affine))
    assert grid.same_as(scan.grid, 1e-3)
    np.testing.assert_allclose(scan.volume, volume, atol=1e-3)


@pytest.mark.parametrize("name", ["5_anat-T1w_acq-tfl", "6_anat-T1w_acq-tfl"])
def test_enhanced_multi_frame_equals_its_reference(real, name):
    root = real / "siemens_xa30_enhanced"
    assert_same(root / "In" / name, root / "Ref" / f"{name}.nii")


@pytest.mark.parametrize(
    "name",
    ["generic/anatomical/001", "generic/anatomical/001_implicit", "generic/anatomical/002_non_isotropic",
     "generic/compressed/001", "generic/compressed_jpegls/001", "generic/compressed_rle/001",
     "philips_enhanced/anatomical/001", "siemens_multiframe/anatomical/001", "hyperfine/anatomical/001"],
)  # fmt: skip
def test_vendor_files_equal_their_ground_truth(real, name):
    folder = real / "dicom2nifti/tests/data" / name
    assert_same(folder, folder.with_name(folder.name + "_ground_truth.nii.gz"), "T1")


@pytest.mark.parametrize(
    ("name", "message"),
    [("failing/notavolume/001", "same position"), ("failing/slicecount/001", "2 slices are not a volume"),
     ("failing/sliceincrement/001", "a slice is missing|different slice distances"),
     ("failing/sliceorientation/001", "no majority")],
)  # fmt: skip
def test_faulty_vendor_series_are_refused(real, name, message):
    with pytest.raises(ReadError, match=message):
        read_series(real / "dicom2nifti/tests/data" / name)


def test_head_ct_of_two_slice_distances_is_refused(real):
    with pytest.raises(ReadError, match=r"4 mm apart, but 1.08 mm .* 14.dcm and 15.dcm; .*different slice"):
        read_series(real / "ge_head_ct_tilt")


def test_real_contrast_t1(real):
    scan = read_series(real / "vs_seg_t1ce_50slices/dicom")
    assert scan.volume.shape == (50, 512, 512)
    np.testing.assert_allclose(scan.grid.spacing, [1.5, 0.41015625, 0.41015625], atol=1e-6)
    assert (scan.modality, scan.age, scan.sex) == ("T1", 60.0, "M")
    assert any("guessed" in note for note in scan.notes)


def test_axial_series_in_canonical_axes(tmp_path, stored):
    scan, slices = read_series_with_slices(write_series(tmp_path, stored))
    # Rows run to posterior and columns to the patient's left: both flip.
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])
    assert (np.diag(scan.grid.affine[:3, 2::-1]) > 0).all()
    np.testing.assert_allclose(scan.grid.spacing, [1.5, 0.5, 0.7])
    np.testing.assert_allclose(scan.source.to_mm([0, 0, 0]), [10, 20, 30])  # LPS to RAS
    assert (scan.modality, scan.patient_id, scan.age, scan.sex) == ("MRA", "patient 7", 61.0, "F")
    # Column 3, row 4 of the third slice is one and the same place by every route.
    mm = slices.to_mm(f"{SERIES}.3", 3, 4)
    np.testing.assert_allclose(mm, scan.source.to_mm([2, 4, 3]))
    d, h, w = np.rint(scan.grid.to_index(mm)).astype(int)
    assert scan.volume[d, h, w] == stored[2, 4, 3]
    with pytest.raises(ReadError, match=r"No image 1\.2\.3"):
        slices.to_mm("1.2.3", 0, 0)


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "oblique"])
def test_other_planes_keep_every_voxel_in_place(tmp_path, stored, plane):
    axes = {
        "sagittal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float),
        "coronal": np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float),
        "oblique": np.linalg.qr([[0.1, 0.2, 1], [0.2, 1, -0.1], [1, -0.1, 0.2]])[0],
    }[plane]
    scan, slices = read_series_with_slices(write_series(tmp_path, stored, axes=axes))
    for index in np.random.default_rng(1).integers(0, stored.shape, (20, 3)):
        mm = slices.to_mm(f"{SERIES}.{index[0] + 1}", index[2], index[1])
        d, h, w = np.rint(scan.grid.to_index(mm)).astype(int)
        assert scan.volume[d, h, w] == stored[tuple(index)]
    directions = scan.grid.affine[:3, :3] / scan.grid.spacing
    assert (np.diag(directions[::-1]) > 0.7).all()


def test_order_of_files_and_instance_numbers_do_not_matter(tmp_path, stored):
    straight = read_series(write_series(tmp_path / "a", stored))

    def permute(ds, i):
        ds.InstanceNumber = (i * 5) % 6 + 1

    files = write_series(tmp_path / "b", stored, change=permute)
    mixed = read_series([files[i] for i in (3, 0, 5, 1, 4, 2)])
    np.testing.assert_array_equal(mixed.volume, straight.volume)
    assert mixed.grid.same_as(straight.grid)


def test_rescale_is_applied_per_slice_once(tmp_path, stored):
    def steps(ds, i):
        ds.RescaleSlope = 1.0 + i

    scan = read_series(write_series(tmp_path, stored, intercept=-1024, change=steps, modality="CT"))
    expected = stored * (1.0 + np.arange(6))[:, None, None] - 1024
    np.testing.assert_allclose(scan.volume, expected[:, ::-1, ::-1], rtol=1e-6)
    assert scan.modality == "CTA"


def test_ct_stored_in_hounsfield_units_is_not_shifted_twice(tmp_path):
    stored = np.full((4, 32, 32), -1000, np.int16)
    stored[:, 8:24, 8:24] = 40
    scan = read_series(write_series(tmp_path, stored, intercept=-1024, modality="CT"))
    assert scan.volume.min() == -1000 and scan.volume.max() == 40
    assert any("Hounsfield" in note for note in scan.notes)


def test_minority_slices_are_dropped_and_named(tmp_path, stored):
    files = write_series(tmp_path / "a", stored)
    sagittal = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float)
    files += write_series(tmp_path / "scout", stored[:2], axes=sagittal)
    scan = read_series(files)
    assert scan.volume.shape == stored.shape
    assert any("dropped 2" in note and "000.dcm" in note for note in scan.notes)


def test_identical_duplicate_is_dropped_and_different_one_refused(tmp_path, stored):
    files = write_series(tmp_path / "a", stored)
    copy = files[2].with_name("copy.dcm")
    copy.write_bytes(files[2].read_bytes())
    scan = read_series([*files, copy])
    assert scan.volume.shape == stored.shape and any("copy" in note for note in scan.notes)
    spoiled = dcmread(copy)
    spoiled.PixelData = bytes(len(spoiled.PixelData))
    spoiled.save_as(copy)
    with pytest.raises(ReadError, match="different images at the same position"):
        read_series([*files, copy])


def test_missing_slice_is_named(tmp_path, stored):
    files = write_series(tmp_path, np.concatenate([stored, stored]))
    files.pop(4)
    expected = r"1.5 mm apart, but 3 mm between 003.dcm and 005.dcm; a slice is missing"
    with pytest.raises(ReadError, match=expected):
        read_series(files)


def test_small_jitter_is_resampled_to_even_spacing(tmp_path):
    z = np.arange(8) * 1.5 + np.array([0, 0.1, -0.1, 0.15, 0, -0.1, 0.1, 0])
    stored = np.broadcast_to((100 + 40 * z)[:, None, None], (8, 6, 6)).round().astype(np.uint16)

    def shift(ds, i):
        ds.ImagePositionPatient = [0, 0, float(z[i])]

    scan = read_series(write_series(tmp_path, stored, change=shift))
    np.testing.assert_allclose(scan.grid.spacing[0], 1.5)
    np.testing.assert_allclose(scan.volume[:, 0, 0], 100 + 40 * 1.5 * np.arange(8), atol=1)
    assert any("even spacing" in note for note in scan.notes)


def test_gantry_tilt_is_straightened(tmp_path):
    """A ball stays a ball, at its place, when the slices drift by 20 degrees."""
    tilt, spacing = np.radians(20), np.array([1.0, 0.8, 0.8])
    axes = np.stack([[0, 0, 1], [0, np.cos(tilt), -np.sin(tilt)], [1, 0, 0]], axis=1)  # slices, rows, columns
    lps = np.moveaxis(np.indices((40, 60, 50)), 0, -1) * spacing @ axes.T
    centre = lps[20, 30, 25]
    stored = (np.linalg.norm(lps - centre, axis=-1) < 8).astype(np.uint16) * 500
    files = write_series(tmp_path, stored, tuple(spacing), axes, (0, 0, 0))
    scan = read_series(files)
    assert any("tilt of 20.0 degrees" in note for note in scan.notes)
    directions = scan.grid.affine[:3, :3] / scan.grid.spacing
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)
    inside = np.argwhere(scan.volume > 250)
    np.testing.assert_allclose(scan.grid.to_mm(inside.mean(0)), centre * [-1, -1, 1], atol=0.15)
    np.testing.assert_allclose(len(inside) * scan.grid.voxel_mm3, 4 / 3 * np.pi * 8**3, rtol=0.03)
    extent = np.ptp(inside, axis=0) * scan.grid.spacing
    np.testing.assert_allclose(extent, 16, atol=1.6)
    assert scan.source.shape == stored.shape  # as stored, sheared


@pytest.mark.parametrize("tag", ["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"])
def test_missing_geometry_names_file_and_tag(tmp_path, stored, tag):
    def forget(ds, i):
        if i == 2:
            delattr(ds, tag)

    with pytest.raises(ReadError, match=rf"002.dcm: {tag} is missing"):
        read_series(write_series(tmp_path, stored, change=forget))


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
@pytest.mark.parametrize("spoil", ["text", "cut", "no pixels", "nan", "seg", "colour"])
def test_spoiled_file_is_one_clear_sentence(tmp_path, stored, spoil):
    def change(ds, i):
        if spoil == "no pixels" and i == 1:
            del ds.PixelData
        if spoil == "nan" and i == 1:
            ds.RescaleIntercept = "nan"
        if spoil == "seg":
            ds.Modality = "SEG"
        if spoil == "colour" and i == 1:
            ds.SamplesPerPixel = 3

    files = write_series(tmp_path, stored, change=change)
    if spoil == "text":
        files[1].write_text("not an image")
    if spoil == "cut":
        files[1].write_bytes(files[1].read_bytes()[:-40])
    message = {"text": "not a DICOM file", "cut": "truncated", "no pixels": "no pixel data",
               "nan": "RescaleIntercept nan", "seg": "modality SEG", "colour": "colour"}[spoil]  # fmt: skip
    with pytest.raises(ReadError, match=message) as caught:
        read_series(tmp_path)
    assert (SERIES if spoil == "seg" else "001.dcm") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders(tmp_path, stored):
    with pytest.raises(ReadError, match="no such folder"):
        find_series(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    for read in (find_series, read_series):
        with pytest.raises(ReadError, match="no DICOM"):
            read(tmp_path / "empty")
    with pytest.raises(ReadError, match="list is empty"):
        read_series([])
    one = write_series(tmp_path / "x/deep", stored)
    two = write_series(tmp_path / "x/flat", stored[:4], series=SERIES + ".9")
    two[0].rename(tmp_path / "x/deep/stray")
    (tmp_path / "x/README").write_text("hello")
    (tmp_path / "x/bad.dcm").write_text("hello")
    groups = find_series(tmp_path / "x")
    assert {uid: len(files) for uid, files in groups.items()} == {SERIES: len(one), SERIES + ".9": 4}
    (tmp_path / "x/bad.dcm").unlink()
    with pytest.raises(ReadError, match="2 series"):
        read_series(tmp_path / "x")
    assert read_series(groups[SERIES + ".9"]).volume.shape[0] == 4


def test_multi_frame_with_the_first_position_only(tmp_path, stored):
    path = write_series(tmp_path, stored[:1])[0]
    ds = dcmread(path)
    ds.NumberOfFrames, ds.PixelData, ds.SpacingBetweenSlices = 6, stored.tobytes(), 2.0
    ds.save_as(path)
    scan, slices = read_series_with_slices([path])
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])
    assert scan.grid.spacing[0] == 2.0 and any("evenly spaced" in note for note in scan.notes)
    np.testing.assert_allclose(slices.to_mm(f"{SERIES}.1", 1, 2, frame=3), scan.source.to_mm([3, 2, 1]))
    with pytest.raises(ReadError, match="multi-frame"):
        slices.to_mm(f"{SERIES}.1", 1, 2)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [({"SeriesDescription": "3D TOF multislab"}, "MRA"), ({"SeriesDescription": "AX T2 FSE"}, "T2"),
     ({"SeriesDescription": "SAG MPRAGE +C"}, "T1"), ({"ContrastBolusAgent": "Gadovist"}, "T1"),
     ({"EchoTime": 95.0}, "T2"), ({"EchoTime": 3.4, "RepetitionTime": 22.0, "ScanningSequence": "GR"}, "MRA"),
     ({"EchoTime": 10.0, "RepetitionTime": 600.0, "ScanningSequence": "SE"}, "T1")],
)  # fmt: skip
def test_mr_contrast_is_guessed_with_a_note(tmp_path, stored, tags, expected):
    def change(ds, i):
        ds.SeriesDescription = ""
        for tag, value in tags.items():
            setattr(ds, tag, value)

    scan = read_series(write_series(tmp_path, stored, change=change))
    assert scan.modality == expected and any("guessed" in note for note in scan.notes)
    assert read_series(tmp_path, "T2").modality == "T2"  # the argument wins


@pytest.mark.parametrize(("slice_mm", "expected"), [(0.8, "MRA"), (4.0, "T2")])
def test_anonymised_mr_is_guessed_from_its_slice_distance(tmp_path, stored, slice_mm, expected):
    def change(ds, i):
        ds.SeriesDescription = ""

    scan = read_series(write_series(tmp_path, stored, (slice_mm, 0.5, 0.5), change=change))
    assert scan.modality == expected and any("slice distance" in note for note in scan.notes)
