"""MetaImage volumes keep their voxels in place."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from aneurysm.data.errors import ReadError
from aneurysm.data.formats.metaimage import read_metaimage
from aneurysm.data.formats.nifti import read_mask, read_nifti
from aneurysm.data.resample import resample


def written(path, volume, spacing=(0.5, 0.6, 0.9), origin=(10.0, -20.0, 30.0)):
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    sitk.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_every_voxel_is_where_the_file_says(tmp_path, suffix):
    volume = np.random.default_rng(0).normal(size=(7, 6, 5)).astype(np.float32)  # (k, j, i)
    image = written(tmp_path / f"scan{suffix}", volume)
    scan = read_metaimage(tmp_path / f"scan{suffix}", "MRA")
    for i, j, k in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
        lps = np.array(image.TransformIndexToPhysicalPoint((i, j, k)))
        ras = lps * [-1, -1, 1]
        assert np.allclose(scan.source.to_mm(np.array([i, j, k])), ras, atol=1e-5)
        index = np.round(scan.grid.to_index(ras)).astype(int)
        assert scan.volume[tuple(index)] == volume[k, j, i]


def test_nan_and_broken_files_are_refused(tmp_path):
    volume = np.zeros((4, 4, 4), np.float32)
    volume[1, 1, 1] = np.nan
    written(tmp_path / "nan.mha", volume)
    with pytest.raises(ReadError, match="NaN"):
        read_metaimage(tmp_path / "nan.mha", "CTA")
    (tmp_path / "text.mha").write_text("not an image")
    with pytest.raises(ReadError, match=r"text\.mha"):
        read_metaimage(tmp_path / "text.mha", "CTA")


def test_a_real_crop_is_read(shared_data):
    scan = read_metaimage(shared_data / "topcow/example_input_dummy_cta.mha", "CTA")
    assert min(scan.volume.shape) > 20 and np.allclose(np.sort(scan.grid.spacing)[:2], 0.44, atol=0.05)


NRRD = "NRRD0005\ntype: short\ndimension: 3\n{space}sizes: 5 6 7\nencoding: raw\nendian: little\n{tail}\n"
VECTORS = "space directions: (0.5,0,0) (0,0.6,0) (0,0,0.9)\nspace origin: (10,-20,30)\n"
VOXELS = np.arange(210, dtype="<i2")


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)), ("LPS", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)), ("RAS", (1, 1, 1)), ("LAS", (-1, 1, 1)),
    ],
)  # fmt: skip
def test_space_field_of_nrrd_decides_left_and_right(tmp_path, space, signs):
    path = tmp_path / "a.nrrd"
    path.write_bytes(NRRD.format(space=f"space: {space}\n", tail=VECTORS).encode() + VOXELS.tobytes())
    scan = read_metaimage(path, "CTA")
    assert scan.notes == ()
    np.testing.assert_allclose(
        scan.source.to_mm([1, 2, 3]), np.array([10.5, -20 + 1.2, 30 + 2.7]) * signs, atol=1e-6
    )
    at = np.rint(scan.grid.to_index(scan.source.to_mm([1, 2, 3]))).astype(int)
    assert scan.volume[tuple(at)] == 1 + 5 * (2 + 6 * 3)


def test_units_and_missing_orientation_of_headers(tmp_path):
    path = tmp_path / "a.nrrd"

    def read(space, tail):
        path.write_bytes(NRRD.format(space=space, tail=tail).encode() + VOXELS.tobytes())
        return read_metaimage(path, "CTA")

    micro = VECTORS.replace("0.5,", "500,").replace("0.6,", "600,").replace("0.9)", "900)")
    scan = read("space: RAS\n", micro + 'space units: "um" "um" "um"\n')
    np.testing.assert_allclose(scan.source.spacing, [0.5, 0.6, 0.9])
    assert "turned to mm" in scan.notes[0]
    with pytest.raises(ReadError, match=r"a\.nrrd: voxel sizes in inch"):
        read("space: RAS\n", VECTORS + 'space units: "inch" "inch" "inch"\n')
    with pytest.raises(ReadError, match=r"a\.nrrd: voxels of 500 x 600 x 900 mm"):
        read("space: RAS\n", micro)
    assert "guess" in read("", "spacings: 1 2 3\n").notes[0]
    assert "scanner-xyz" in read("space: scanner-xyz\n", VECTORS).notes[0]
    assert "no space field" in read("space dimension: 3\n", VECTORS).notes[0]
    meta = (
        "ObjectType = Image\nNDims = 3\nDimSize = 5 6 7\n{}ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    path = tmp_path / "a.mha"
    path.write_bytes(meta.format("").encode() + VOXELS.tobytes())
    assert [note[:6] for note in read_metaimage(path, "CTA").notes] == ["no ori", "no vox"]
    oriented = "TransformMatrix = 1 0 0 0 1 0 0 0 1\nElementSpacing = 1 2 3\n"
    path.write_bytes(meta.format(oriented).encode() + VOXELS.tobytes())
    assert read_metaimage(path, "CTA").notes == ()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_detached_truncated_and_missing_voxels(tmp_path, suffix, compressed):
    volume = np.random.default_rng(0).integers(0, 900, (7, 6, 5)).astype(np.int16)
    path = tmp_path / f"scan{suffix}"
    image = sitk.GetImageFromArray(volume)
    sitk.WriteImage(image, str(path), compressed)
    np.testing.assert_array_equal(resample_to_source(read_metaimage(path, "CTA")), volume.transpose(2, 1, 0))
    voxels = next((p for p in tmp_path.iterdir() if p != path), path)
    assert (voxels == path) == (suffix in (".mha", ".nrrd"))
    voxels.write_bytes(voxels.read_bytes()[:-60])
    with pytest.raises(ReadError, match=f"scan{suffix}: not a readable image"):
        read_metaimage(path, "CTA")
    if voxels != path:
        voxels.unlink()
        with pytest.raises(ReadError, match=f"scan{suffix}: not a readable image"):
            read_metaimage(path, "CTA")


def resample_to_source(scan):
    return resample(scan.volume, scan.grid, scan.source, order=0)


def test_colour_and_time_series_are_refused_and_single_volumes_are_not(tmp_path):
    colour = sitk.GetImageFromArray(np.zeros((4, 4, 4, 3), np.uint8), isVector=True)
    sitk.WriteImage(colour, str(tmp_path / "rgb.nrrd"))
    series = sitk.GetImageFromArray(np.zeros((2, 4, 4, 4), np.int16), isVector=False)
    sitk.WriteImage(series, str(tmp_path / "series.mha"))
    for name in ("rgb.nrrd", "series.mha"):
        with pytest.raises(ReadError, match=f"{name}: .* one 3D volume is expected"):
            read_metaimage(tmp_path / name, "CTA")
    one = np.random.default_rng(0).integers(0, 9, (1, 6, 5, 4)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(one, isVector=False), str(tmp_path / "one.mha"))
    scan = read_metaimage(tmp_path / "one.mha", "CTA")
    np.testing.assert_array_equal(resample_to_source(scan), one[0].transpose(2, 1, 0))


def test_masks_in_these_formats_fall_on_a_nifti_scan(tmp_path):
    """A lesion drawn in 3D Slicer (.nrrd) for a NIfTI scan lands on the voxels that it was drawn on."""
    affine = np.array([[-0.5, 0, 0, 9], [0, 0, 0.9, -7], [0, 0.6, 0, 5], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), affine), tmp_path / "scan.nii.gz")
    scan = read_nifti(tmp_path / "scan.nii.gz", "MRA")
    mask = np.zeros((8, 9, 10), np.uint8)
    mask[2:4, 5:7, 3] = 1
    image = sitk.GetImageFromArray(mask.transpose(2, 1, 0))
    lps = np.diag([-1, -1, 1]) @ affine[:3, :3]
    image.SetSpacing(np.linalg.norm(lps, axis=0).tolist())
    image.SetDirection((lps / np.linalg.norm(lps, axis=0)).ravel().tolist())
    image.SetOrigin((affine[:3, 3] * [-1, -1, 1]).tolist())
    sitk.WriteImage(image, str(tmp_path / "scan_aneurysm.nrrd"))
    on_scan = read_mask(tmp_path / "scan_aneurysm.nrrd", scan.grid)
    np.testing.assert_array_equal(resample(on_scan, scan.grid, scan.source, order=0), mask)
