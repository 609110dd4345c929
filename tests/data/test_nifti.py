"""NIfTI in and out: what is written overlays on what was read, for every orientation."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aneurysm.data.errors import ReadError
from aneurysm.data.nifti import read_mask, read_nifti, write_nifti
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
