"""NIfTI images (.nii, .nii.gz, .hdr with .img; versions 1 and 2) and masks in and out.

A NIfTI array has axes (i, j, k) and an affine to RAS mm. A scan's `source` grid keeps just that: its array
axes are the file's (i, j, k) in order, whatever direction they run. `write_nifti` puts an array back on such
a grid, so that a written mask has the axes and affine of the input file and overlays on it voxel by voxel.
"""

import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, SpatialImage

from aneurysm.data.errors import ReadError
from aneurysm.data.files import replacing
from aneurysm.data.formats.metaimage import SUFFIXES as META_SUFFIXES
from aneurysm.data.formats.metaimage import load_metaimage
from aneurysm.data.formats.stored import Stored, stored_volume
from aneurysm.data.resample import resample
from aneurysm.data.scan import Grid, Scan

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img")

_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 1e-3}
_LEAST_OVERLAP = 0.5  # of a mask's voxels must lie inside the image that it is for


def read_nifti(path: Path | str, modality: str, patient_id: str | None = None) -> Scan:
    """Read a 3D NIfTI image as a canonical scan; the series uid is the file name without its suffix.

    Where sform and qform disagree the sform counts, as in nibabel, FSL and SPM, unless it cannot be
    inverted; by how much they disagree is in `Scan.notes`. So are a unit other than mm, an unstated unit, a
    missing orientation and a sheared affine (kept as it is: positions follow the affine).

    Args:
        modality: CTA, MRA, T1 or T2 (a NIfTI file does not say).
        patient_id: default: the series uid.

    Raises:
        ReadError: missing or unreadable file, not one 3D volume, NaN voxels, or a faulty affine.
    """
    path = Path(path)
    return load_nifti(path, np.float32).scan(series_name(path), modality, patient_id)


def read_mask(path: Path | str, like: Grid, notes: list[str] | None = None) -> np.ndarray:
    """Read a label image (NIfTI, MetaImage or NRRD) onto a grid, by affines and nearest voxels.

    Args:
        notes: gets a sentence when the mask was stored on other voxels than those of `like`, and when a part
            of it lies outside.

    Returns:
        uint8 of `like.shape`; 0 outside the mask's own field of view.

    Raises:
        ReadError: unreadable, labels that are not whole numbers in 0..255, or a mask that lies elsewhere:
            less than half of its voxels are inside `like`.
    """
    path = Path(path)
    meta = path.name.lower().endswith(META_SUFFIXES)
    stored = load_metaimage(path) if meta else load_nifti(path)
    volume, grid = stored.volume, stored.grid
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
        if notes is not None and inside < 1:
            notes.append(f"{path.name}: {1 - inside:.1%} of the mask lies outside the image and was cut off")
    if notes is not None and not _same_voxels(grid, like):
        notes.append(
            f"{path.name}: the mask has other voxels than the image (shape {grid.shape} against "
            f"{like.shape} as read); brought onto it by its affine"
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
    """File name without its suffix; `.nii.gz` counts as one."""
    name = path.name
    for suffix in sorted((*SUFFIXES, *META_SUFFIXES), key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem


def load_nifti(path: Path, dtype: type | None = None) -> Stored:
    """The voxels of a NIfTI file with its intensity scaling applied, and their grid.

    Args:
        dtype: floating type to scale in, to save memory; None keeps whole numbers and scales in float64.

    Raises:
        ReadError: as `read_nifti`.
    """
    if not path.is_file():
        raise ReadError(f"{path}: no such file. Check the path.")
    try:
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise ReadError(f"{path}: not an image but {type(image).__name__}. Give a NIfTI volume.")
        if any(n != 1 for n in image.shape[3:]):  # refuse a time series before it fills the memory
            stored_volume(path, np.broadcast_to(np.float32(0), image.shape), np.eye(4), [])
        cast = dtype if image.get_data_dtype().kind in "iuf" else None
        volume = np.asanyarray(image.dataobj, dtype=cast)
        affine, notes = _placed(image)
    except ReadError:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReadError(f"{path}: not a readable NIfTI file ({reason}). Copy or convert it again.") from error
    return stored_volume(path, volume, affine, notes)


_UNREADABLE = (
    ImageFileError, HeaderDataError, HeaderTypeError, OSError, EOFError, ValueError, OverflowError,
    MemoryError, KeyError, zlib.error,
)  # fmt: skip


def _placed(image: SpatialImage) -> tuple[np.ndarray, list[str]]:
    """The affine (4, 4) index -> RAS mm, and what had to be decided for it."""
    header, notes = image.header, []
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    if not isinstance(header, nib.Nifti1Header):
        return affine, ["no orientation in the file (Analyze format): left and right are a guess"]
    sform, qform = image.get_sform(coded=True), image.get_qform(coded=True)  # pyright: ignore
    if sform[0] is not None and qform[0] is not None:
        usable = abs(np.linalg.det(sform[0][:3, :3])) > 1e-9 and np.isfinite(sform[0]).all()
        if not usable:
            affine = np.asarray(qform[0], np.float64).copy()
            notes.append("the sform cannot be inverted; the qform was used")
        else:
            notes += _disagreement(sform[0], qform[0], image.shape[:3])
    elif sform[0] is None and qform[0] is None:
        notes.append("no orientation in the file: left and right are a guess")
    elif sform[0] is not None:
        columns = np.linalg.norm(sform[0][:3, :3], axis=0)
        stated = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
        if (stated > 0).all() and np.abs(columns / stated - 1).max() > 0.02:
            notes.append(
                f"pixdim says voxels of {_times(stated)} but the sform {_times(columns)}; the sform was used"
            )
    unit = str(header.get_xyzt_units()[0])
    if unit == "unknown":
        notes.append("the file does not state its unit; taken as mm")
    elif (factor := _MM_PER_UNIT.get(unit, 1.0)) != 1.0:
        affine[:3] *= factor
        notes.append(f"affine in {unit}, turned to mm")
    return affine, notes


def _disagreement(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    """A note when the two affines put a corner of the volume at different places."""
    size = np.array([*shape, 1, 1, 1][:3])
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij")).reshape(3, -1).T
    apart = corners @ (sform - qform)[:3, :3].T + (sform - qform)[:3, 3]
    worst = float(np.linalg.norm(apart, axis=1).max())
    if worst <= 0.1 * np.linalg.norm(sform[:3, :3], axis=0).min():  # a quaternion of float32 is not exact
        return []
    axes = ["".join(nib.aff2axcodes(a)) for a in (sform, qform)]
    turned = f"; they even turn the axes differently, {axes[0]} against {axes[1]}: check left and right"
    return [
        f"sform and qform disagree by up to {worst:.3g} mm; the sform was used"
        + (turned if axes[0] != axes[1] else "")
    ]


def _times(values: np.ndarray) -> str:
    return " x ".join(f"{v:.3g}" for v in values)


def _same_voxels(a: Grid, b: Grid) -> bool:
    """Whether two grids share their voxels, in whatever order and direction their axes run."""
    if sorted(a.shape) != sorted(b.shape):
        return False
    size = np.array(a.shape) - 1
    corners = np.array(np.meshgrid(*[(0, n) for n in size], indexing="ij")).reshape(3, -1).T
    index = b.to_index(a.to_mm(corners))
    whole = np.abs(index - np.rint(index)).max() < 0.05
    return bool(whole and (index > -0.1).all() and (index < np.array(b.shape) - 0.9).all())
