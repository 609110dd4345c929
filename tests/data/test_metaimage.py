"""MetaImage volumes keep their voxels in place."""

import numpy as np
import pytest
import SimpleITK as sitk

from aneurysm.data.errors import ReadError
from aneurysm.data.metaimage import read_metaimage


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
