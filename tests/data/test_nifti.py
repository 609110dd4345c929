"""NIfTI in and out: what is written overlays on what was read, for every orientation."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aneurysm.data.errors import ReadError
from aneurysm.data.formats.nifti import read_mask, read_nifti, write_nifti
from aneurysm.data.resample import isotropic, resample
from aneurysm.data.scan import Grid

AFFINES = {
    "RAS": np.diag([0.5, 0.6, 1.2, 1.0]),
    "LPS": np.diag([-0.5, -0.6, 1.2, 1.0]),
    "sagittal": np.array([[0, 0, 1.2, 5], [-0.5, 0, 0, 9], [0, -0.6, 0, -7], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.48, -0.1, 0.1, 3], [0.1, 0.59, -0.3, 4], [-0.05, 0.15, 1.1, 5], [0, 0, 0, 1.0]]),
}


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.mark.parametrize("name", AFFINES)
def test_written_array_is_the_input_voxel_by_voxel(tmp_path, name):
    volume = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    path = save(tmp_path / "in.nii.gz", volume, AFFINES[name])
    scan = read_nifti(path, "MRA")
    assert scan.series_uid == scan.patient_id == "in" and scan.source.shape == (9, 10, 11)
    write_nifti(tmp_path / "out.nii.gz", scan.volume, scan.grid, scan.source)
    out = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(out.affine, AFFINES[name], atol=1e-6)
    np.testing.assert_allclose(out.get_fdata(), volume, atol=1e-5)
    labels = (volume > 0.5).astype(np.uint8)
    on_scan = read_mask(save(tmp_path / "mask.nii.gz", labels, AFFINES[name]), scan.grid)
    np.testing.assert_array_equal(on_scan, (scan.volume > 0.5).astype(np.uint8))
    write_nifti(tmp_path / "mask_out.nii", on_scan > 0, scan.grid, scan.source)
    written = nib.load(tmp_path / "mask_out.nii")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)


def test_mask_from_the_prepared_grid_lands_on_the_input(tmp_path):
    """A ball drawn on the isotropic grid is a ball of the same size at the same place in the file."""
    affine = AFFINES["LPS"]
    scan = read_nifti(save(tmp_path / "in.nii", np.zeros((60, 50, 30), np.int16), affine), "MRA")
    grid = isotropic(scan.grid, 0.75)
    mm = grid.to_mm(np.moveaxis(np.indices(grid.shape), 0, -1))
    centre = grid.centre_mm + np.array([2, 1, -3])
    write_nifti(tmp_path / "out.nii.gz", np.linalg.norm(mm - centre, axis=-1) < 6, grid, scan.source)
    out = nib.load(tmp_path / "out.nii.gz")
    inside = np.argwhere(np.asarray(out.dataobj))
    np.testing.assert_allclose(nib.affines.apply_affine(out.affine, inside).mean(0), centre, atol=0.15)
    np.testing.assert_allclose(len(inside) * scan.source.voxel_mm3, 4 / 3 * np.pi * 6**3, rtol=0.05)


def test_real_head_keeps_its_orientation(shared_data):
    scan = read_nifti(shared_data / "head_volumes/CT_pitch.nii.gz", "CTA")
    image = nib.load(shared_data / "head_volumes/CT_pitch.nii.gz")
    stored = np.asarray(image.dataobj, np.float32)
    again = resample(scan.volume, scan.grid, Grid(image.shape, image.affine), order=0)
    np.testing.assert_array_equal(again, stored)
    assert (np.diag(scan.grid.affine[:3, 2::-1]) > 0).all()


def test_sheared_source_is_written_by_its_sform(tmp_path):
    sheared = np.array([[0, 0, 0.5, 0], [0.4, 0.5, 0, 0], [1.5, 0, 0, 0], [0, 0, 0, 1.0]])
    write_nifti(
        tmp_path / "a.nii.gz",
        np.ones((5, 6, 7), np.int64),
        Grid((5, 6, 7), sheared),
        Grid((5, 6, 7), sheared),
    )
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.affine, sheared, atol=1e-6)
    assert int(image.header["qform_code"]) == 0 and image.get_data_dtype() == np.int32


def test_units_and_missing_orientation_are_noted(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 4, 4, 1), np.float32), np.diag([0.002, 0.002, 0.002, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")
    scan = read_nifti(tmp_path / "metres.nii", "T1", "p1")
    np.testing.assert_allclose(scan.grid.spacing, 2.0, rtol=1e-5)
    assert scan.patient_id == "p1" and "meter" in scan.notes[0]
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), None), tmp_path / "nowhere.nii")
    assert any("guess" in note for note in read_nifti(tmp_path / "nowhere.nii", "T1").notes)


def test_unreadable_images(tmp_path):
    volume = np.zeros((4, 4, 4), np.float32)
    volume[1, 2, 3] = np.nan
    cases = {
        "NaN": save(tmp_path / "nan.nii", volume, np.eye(4)),
        "not one 3D volume": save(tmp_path / "series.nii", np.zeros((4, 4, 4, 2), np.int16), np.eye(4)),
        "is not a volume": save(tmp_path / "flat.nii", np.zeros((4, 4, 1), np.int16), np.eye(4)),
        "no such file": tmp_path / "missing.nii",
    }
    (tmp_path / "text.nii").write_text("hello")
    cases["not a readable NIfTI"] = tmp_path / "text.nii"
    good = save(tmp_path / "good.nii.gz", np.random.default_rng(0).normal(size=(20, 20, 20)), np.eye(4))
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:-4000])
    cases["cut.nii.gz: not a readable"] = tmp_path / "cut.nii.gz"
    singular = save(tmp_path / "singular.nii", np.zeros((4, 4, 4), np.int16), np.diag([1, 1, 1, 1.0]))
    raw = bytearray(singular.read_bytes())
    raw[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    singular.write_bytes(bytes(raw))
    cases["not invertible"] = singular
    for message, path in cases.items():
        with pytest.raises(ReadError, match=message) as caught:
            read_nifti(path, "MRA")
        assert path.name in str(caught.value)


def test_masks_that_cannot_belong_to_the_image(tmp_path):
    like = Grid((10, 10, 10), np.eye(4)[[2, 1, 0, 3]])
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:5, 2:5, 2:5] = 3
    away = np.eye(4)
    away[0, 3] = 500
    with pytest.raises(ReadError, match=r"100% of the mask lies outside"):
        read_mask(save(tmp_path / "away.nii", labels, away), like)
    with pytest.raises(ReadError, match="whole labels"):
        read_mask(save(tmp_path / "soft.nii", labels / 2.0, np.eye(4)), like)
    with pytest.raises(ReadError, match="whole labels"):
        read_mask(save(tmp_path / "big.nii", labels.astype(np.int16) * 100, np.eye(4)), like)
    floats = read_mask(save(tmp_path / "float.nii", labels.astype(np.float64), np.eye(4)), like)
    assert floats.dtype == np.uint8 and floats[2, 2, 2] == 3 and floats.sum() == 81


def affine_pair(tmp_path: Path, name: str, sform, qform, codes=(1, 1), **header) -> Path:
    image = nib.Nifti1Image(np.random.default_rng(1).normal(size=(6, 7, 8)).astype(np.float32), None)
    image.set_sform(sform, code=codes[0])
    image.set_qform(qform, code=codes[1])
    image.header.set_xyzt_units("mm")
    for key, value in header.items():
        image.header[key] = value
    path = tmp_path / f"{name}.nii"
    nib.save(image, path)
    return path


def test_sform_and_qform_that_disagree_are_decided_and_recorded(tmp_path):
    a, b = AFFINES["RAS"], AFFINES["LPS"]
    shifted = a.copy()
    shifted[0, 3] = 5.0
    scan = read_nifti(affine_pair(tmp_path, "shift", a, shifted), "MRA")
    np.testing.assert_allclose(scan.source.affine, a, atol=1e-6)
    assert scan.notes == ("sform and qform disagree by up to 5 mm; the sform was used",)
    turned = read_nifti(affine_pair(tmp_path, "turn", a, b), "MRA")
    assert "RAS against LPS: check left and right" in turned.notes[0]
    assert read_nifti(affine_pair(tmp_path, "same", a, a), "MRA").notes == ()
    only_q = read_nifti(affine_pair(tmp_path, "q", None, b, codes=(0, 1)), "MRA")
    np.testing.assert_allclose(only_q.source.affine, b, atol=1e-6)
    broken = affine_pair(tmp_path, "brokensform", a, b)
    raw = bytearray(broken.read_bytes())
    raw[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    broken.write_bytes(bytes(raw))
    scan = read_nifti(broken, "MRA")
    np.testing.assert_allclose(scan.source.affine, b, atol=1e-6)
    assert "sform cannot be inverted; the qform was used" in scan.notes[0]
    sized = affine_pair(tmp_path, "pixdim", a, None, codes=(2, 0), pixdim=[1, 0.4, 0.6, 1.2, 0, 0, 0, 0])
    assert "pixdim says voxels of 0.4 x 0.6 x 1.2" in read_nifti(sized, "MRA").notes[0]


@pytest.mark.parametrize(
    ("unit", "factor"), [("mm", 1.0), ("micron", 1000.0), ("meter", 1e-3), ("unknown", 1.0)]
)
def test_units_are_respected(tmp_path, unit, factor):
    affine = AFFINES["sagittal"].copy()
    affine[:3] *= factor
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.int16), affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    scan = read_nifti(tmp_path / "a.nii", "MRA")
    np.testing.assert_allclose(scan.source.affine, AFFINES["sagittal"], rtol=1e-5)
    assert {"mm": scan.notes == (), "unknown": "not state its unit" in "".join(scan.notes)}.get(
        unit, unit in "".join(scan.notes)
    )
    # Metres without saying so: a head of a tenth of a millimetre is refused, not believed.
    save(tmp_path / "b.nii", np.ones((4, 4, 4), np.int16), np.diag([5e-4, 5e-4, 5e-4, 1]))
    with pytest.raises(ReadError, match=r"b\.nii: voxels of 0\.0005 x .* the unit"):
        read_nifti(tmp_path / "b.nii", "MRA")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_versions_types_and_scaling(tmp_path, kind, dtype):
    stored = np.random.default_rng(2).integers(0, 200, (5, 6, 7)).astype(dtype)
    image = kind(stored, AFFINES["LPS"])
    image.header.set_slope_inter(2.0, -1024.0)
    suffix = ".img" if kind is nib.Nifti1Pair else ".nii.gz"
    nib.save(image, tmp_path / f"a{suffix}")
    # nibabel rescales on saving: what its own reader sees is the reference.
    expected = nib.load(tmp_path / f"a{suffix}").get_fdata()
    scan = read_nifti(tmp_path / f"a{suffix}", "CTA")
    assert scan.series_uid == "a" and scan.volume.dtype == np.float32
    np.testing.assert_allclose(
        resample(scan.volume, scan.grid, scan.source, order=0), expected, atol=1e-3, rtol=1e-5
    )


def test_slope_and_intercept_of_the_header_are_applied_once(tmp_path):
    path = save(tmp_path / "a.nii", np.full((4, 4, 4), 1064, np.int16), np.eye(4))
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([1.0, -1024.0], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(bytes(raw))
    assert (read_nifti(path, "CTA").volume == 40).all()
    raw[112:116] = np.float32(0).tobytes()  # a slope of zero means none
    path.write_bytes(bytes(raw))
    assert (read_nifti(path, "CTA").volume == 1064).all()


def test_sheared_affines_keep_every_voxel_in_place_and_broken_ones_are_refused(tmp_path):
    sheared = np.array([[0.5, 0, 0.0, 3], [0, 0.6, 0.4, 4], [0, 0, 1.2, 5], [0, 0, 0, 1.0]])
    volume = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    scan = read_nifti(save(tmp_path / "a.nii", volume, sheared), "CTA")
    assert any("degrees from perpendicular" in note for note in scan.notes)
    index = np.array([2, 7, 5])
    at = np.rint(scan.grid.to_index(nib.affines.apply_affine(sheared, index))).astype(int)
    assert scan.volume[tuple(at)] == volume[tuple(index)]
    sheared[1, 2] = 4
    with pytest.raises(ReadError, match=r"b\.nii: two voxel axes are only"):
        read_nifti(save(tmp_path / "b.nii", volume, sheared), "CTA")


def test_more_unreadable_images_name_the_file_and_the_fix(tmp_path):
    colour = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    good = save(tmp_path / "good.nii", np.ones((8, 8, 8), np.int16), np.eye(4))
    (tmp_path / "short.nii").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    huge = bytearray(good.read_bytes())
    huge[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "huge.nii").write_bytes(bytes(huge))
    nib.save(nib.Nifti1Pair(np.ones((4, 4, 4), np.int16), np.eye(4)), tmp_path / "pair.img")
    (tmp_path / "pair.img").unlink()
    for message, path in {
        "colour image": save(tmp_path / "rgb.nii", colour, np.eye(4)),
        "magnitude": save(tmp_path / "complex.nii", np.ones((4, 4, 4), np.complex64), np.eye(4)),
        "but 30 of them. Split": save(tmp_path / "bold.nii", np.zeros((4, 4, 4, 30), np.int16), np.eye(4)),
        "short.nii: not a readable": tmp_path / "short.nii",
        "empty.nii.gz: not a readable": tmp_path / "empty.nii.gz",
        "huge.nii: not a readable": tmp_path / "huge.nii",
        "pair.hdr: not a readable": tmp_path / "pair.hdr",
    }.items():
        with pytest.raises(ReadError, match=message) as caught:
            read_nifti(path, "MRA")
        assert path.name in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_headers_give_a_scan_or_a_read_error(tmp_path, changes):
    raw = bytearray(nib.Nifti1Image(np.ones((4, 5, 6), np.int16), AFFINES["LPS"]).to_bytes())
    for at, value in changes:
        raw[at] = value
    path = tmp_path / "damaged.nii"
    path.write_bytes(bytes(raw))
    try:
        scan = read_nifti(path, "MRA")
    except ReadError as error:
        assert "damaged.nii" in str(error)
    else:
        assert np.isfinite(scan.volume).all() and scan.grid.spacing.min() > 0


def test_a_mask_on_other_voxels_is_noted(tmp_path):
    like = Grid((10, 10, 10), np.eye(4)[[2, 1, 0, 3]])
    labels = np.ones((10, 10, 10), np.uint8)
    notes: list[str] = []
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 9
    read_mask(save(tmp_path / "flipped.nii", labels, flipped), like, notes)
    assert notes == []
    read_mask(save(tmp_path / "coarse.nii", labels[:5, :5, :5], np.diag([2.0, 2, 2, 1])), like, notes)
    assert len(notes) == 1 and "coarse.nii: the mask has other voxels" in notes[0]


def test_a_mask_that_reaches_outside_is_noted(tmp_path):
    like = Grid((10, 10, 10), np.eye(4)[[2, 1, 0, 3]])
    shifted = np.eye(4)
    shifted[0, 3] = 2
    notes: list[str] = []
    labels = read_mask(save(tmp_path / "m.nii", np.ones((10, 10, 10), np.uint8), shifted), like, notes)
    assert labels.sum() == 800 and "20.0% of the mask lies outside the image" in notes[0]


def test_analyze_files_are_read_with_a_warning_about_sides(tmp_path):
    nib.save(
        nib.AnalyzeImage(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.diag([2.0, 2, 2, 1])),
        tmp_path / "a.img",
    )
    scan = read_nifti(tmp_path / "a.hdr", "T1")
    np.testing.assert_allclose(scan.source.spacing, 2)
    assert "Analyze format" in scan.notes[0]
