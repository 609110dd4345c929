"""MetaImage and NRRD volumes (.mha, .mhd, .nrrd), as research data sets such as TopCoW ship them."""

from pathlib import Path

import numpy as np

from aneurysm.data.errors import ReadError
from aneurysm.data.resample import canonicalise
from aneurysm.data.scan import Grid, Scan

SUFFIXES = (".mha", ".mhd", ".nrrd")


def read_metaimage(path: Path, modality: str, patient_id: str | None = None) -> Scan:
    """Read a 3D volume as a canonical scan; the series uid is the file name without its suffix.

    `Scan.source` has the file's axes (i, j, k), so masks written for it overlay on the input.

    Args:
        modality: CTA, MRA, T1 or T2 (the file does not say).
        patient_id: default: the series uid.

    Raises:
        ReadError: missing or unreadable file, not one 3D volume, or NaN voxels.
    """
    # A large library that only these formats need.
    import SimpleITK as sitk

    if not path.is_file():
        raise ReadError(f"{path}: no such file. Check the path.")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ReadError(f"{path}: not a readable image ({reason}). Copy or convert it again.") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ReadError(
            f"{path}: {image.GetDimension()} dimensions with {image.GetNumberOfComponentsPerPixel()} values "
            "per voxel; one 3D volume is expected. Save the volume of interest on its own."
        )
    volume = sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float32)  # (i, j, k)
    if not np.isfinite(volume).all():
        bad = int((~np.isfinite(volume)).sum())
        raise ReadError(
            f"{path}: {bad} voxels are NaN or infinite. Replace them, or convert the image again."
        )
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1  # LPS to RAS
    source = Grid((volume.shape[0], volume.shape[1], volume.shape[2]), affine)
    canonical, grid = canonicalise(volume, source)
    return Scan(path.stem, patient_id or path.stem, modality, canonical, grid, source)
