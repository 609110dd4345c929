"""NIfTI images and masks in and out.

A NIfTI array has axes (i, j, k) and an affine to RAS mm. A scan's `source` grid keeps just that: its array
axes are the file's (i, j, k) in order, whatever direction they run. `write_nifti` puts an array back on such
a grid, so that a written mask has the axes and affine of the input file and overlays on it voxel by voxel.
"""

import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import SpatialImage

from aneurysm.data.errors import ReadError
from aneurysm.data.files import replacing
from aneurysm.data.resample import canonicalise, resample
from aneurysm.data.scan import Grid, Scan

_MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 1e-3}
_LEAST_OVERLAP = 0.5  # of a mask's voxels must lie inside the image that it is for


def read_nifti(path: Path | str, modality: str, patient_id: str | None = None) -> Scan:
    """Read a 3D NIfTI image as a canonical scan; the series uid is the file name without its suffix.

    Args:
        modality: CTA, MRA, T1 or T2 (a NIfTI file does not say).
        patient_id: default: the series uid.

    Raises:
        ReadError: missing or unreadable file, not one 3D volume, NaN voxels, or a faulty affine.
    """
    path = Path(path)
    volume, source, notes = _load(path)
    series = series_name(path)
    if min(volume.shape) < 3:
        raise ReadError(
            f"{path}: shape {volume.shape} is not a volume; at least 3 voxels per axis are needed."
        )
    canonical, grid = canonicalise(volume.astype(np.float32, copy=False), source)
    return Scan(series, patient_id or series, modality, canonical, grid, source, notes=tuple(notes))


def read_mask(path: Path | str, like: Grid) -> np.ndarray:
    """Read a label image onto a grid, by affines and nearest voxels.

    Returns:
        uint8 of `like.shape`; 0 outside the mask's own field of view.

    Raises:
        ReadError: unreadable, labels that are not whole numbers in 0..255, or a mask that lies elsewhere:
            less than half of its voxels are inside `like`.
    """
    path = Path(path)
    volume, grid, _ = _load(path)
    labels = volume.astype(np.uint8) if volume.dtype.kind != "u" or volume.dtype.itemsize > 1 else volume
    if not np.array_equal(labels, volume):
        raise ReadError(
            f"{path}: a mask holds whole labels 0 to 255, found values from {volume.min()} to {volume.max()}."
        )
    marked = np.argwhere(labels)
    if len(marked):
        index = like.to_index(grid.to_mm(marked))
        inside = ((index > -0.5) & (index < np.array(like.shape) - 0.5)).all(axis=1).mean()
        if inside < _LEAST_OVERLAP:
            raise ReadError(
                f"{path}: {1 - inside:.0%} of the mask lies outside the image; their affines do not belong "
                "together. Check that the mask was drawn on this series."
            )
    return resample(labels, grid, like, order=0, fill=0)


def write_nifti(path: Path | str, array: np.ndarray, grid: Grid, source: Grid) -> None:
    """Write a canonical array on the grid of the input file, so that both overlay in a viewer.

    Args:
        array: (d, h, w) on `grid`; integers and booleans are resampled to the nearest voxel, floats linearly.
        source: where to write, usually `Scan.source`; outside `grid` the file holds 0.

    The file is written whole or not at all.
    """
    path = Path(path)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = array.astype(np.int32)  # viewers do not open 64-bit integers
    order = 0 if array.dtype.kind in "iu" else 1
    stored = resample(array, grid, source, order=order, fill=0)
    image = nib.Nifti1Image(stored, source.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(source.affine, code=1)
    directions = source.affine[:3, :3] / source.spacing
    # A quaternion cannot hold the shear of a tilted gantry; readers then use the sform.
    image.set_qform(source.affine, code=int(np.allclose(directions.T @ directions, np.eye(3), atol=1e-4)))
    with replacing(path) as part:
        nib.save(image, part)


def series_name(path: Path) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _load(path: Path) -> tuple[np.ndarray, Grid, list[str]]:
    """Scaled voxels (3D), their grid in mm, and notes."""
    if not path.is_file():
        raise ReadError(f"{path}: no such file. Check the path.")
    try:
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise ReadError(f"{path}: not an image but {type(image).__name__}. Give a NIfTI volume.")
        volume = np.asanyarray(image.dataobj)
    except ReadError:
        raise
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ReadError(f"{path}: not a readable NIfTI file ({error}). Copy or convert it again.") from error
    notes = []
    if volume.ndim > 3 and set(volume.shape[3:]) == {1}:
        volume = volume.reshape(volume.shape[:3])
    if volume.ndim != 3 or volume.dtype.kind not in "iuf":
        raise ReadError(
            f"{path}: an array {volume.shape} of {volume.dtype} is not one 3D volume. "
            "Save the volume of interest as a 3D file."
        )
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        bad = int((~np.isfinite(volume)).sum())
        raise ReadError(
            f"{path}: {bad} voxels are NaN or infinite. Replace them, or convert the image again."
        )
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    header = image.header
    if isinstance(header, nib.Nifti1Header):
        unit = str(header.get_xyzt_units()[0])
        if _MM_PER_UNIT.get(unit, 1.0) != 1.0:
            affine[:3] *= _MM_PER_UNIT[unit]
            notes.append(f"affine in {unit}, turned to mm")
        if header["sform_code"] == 0 and header["qform_code"] == 0:
            notes.append("no orientation in the file: left and right are a guess")
    try:
        i, j, k = np.array(volume.shape).tolist()
        return volume, Grid((i, j, k), affine), notes
    except ValueError as error:
        raise ReadError(f"{path}: {error} Convert the image again.") from error
