"""What an image file holds, before it becomes a scan: voxels (i, j, k), their grid in RAS mm, and notes.

The checks that every file format needs are here, so that NIfTI, MetaImage and NRRD refuse the same things in
the same words.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aneurysm.data.errors import ReadError
from aneurysm.data.resample import canonicalise
from aneurysm.data.scan import Grid, Scan

_SMALLEST_MM, _LARGEST_MM = 0.01, 50.0  # a voxel of a head scan; outside, the unit of the file is wrong
_SHEAR_NOTED = 0.01  # cosine between two axes: half a degree from perpendicular
_SHEAR_REFUSED = 0.7  # 45 degrees: no scanner makes that


@dataclass(frozen=True, eq=False)
class Stored:
    """One 3D volume as it lies in a file."""

    path: Path
    volume: np.ndarray  # (i, j, k), the axes of the file in their order; real numbers
    grid: Grid  # index (i, j, k) -> RAS mm
    notes: tuple[str, ...] = ()

    def scan(self, series_uid: str, modality: str, patient_id: str | None = None) -> Scan:
        """The canonical scan; its `source` is the grid of the file.

        Raises:
            ReadError: fewer than 3 voxels along an axis.
        """
        if min(self.volume.shape) < 3:
            raise ReadError(
                f"{self.path}: shape {self.volume.shape} is not a volume; "
                "at least 3 voxels per axis are needed."
            )
        volume, grid = canonicalise(self.volume.astype(np.float32, copy=False), self.grid)
        return Scan(series_uid, patient_id or series_uid, modality, volume, grid, self.grid, notes=self.notes)


def stored_volume(path: Path, volume: np.ndarray, affine: np.ndarray, notes: list[str]) -> Stored:
    """Check voxels and geometry of a file.

    Args:
        volume: (i, j, k); further axes of length 1 are dropped.
        affine: (4, 4), index -> RAS mm.
        notes: what the reader decided; extended by what is odd but usable.

    Raises:
        ReadError: not one 3D volume of real numbers, NaN voxels, an affine that cannot be inverted, voxel
            sizes that no head scan has, or axes far from perpendicular.
    """
    shape = volume.shape
    if volume.dtype.names or volume.dtype.kind == "V":
        raise ReadError(
            f"{path}: a colour image ({len(volume.dtype.names or ())} channels per voxel), not a scan. "
            "Export the grey values instead of a screenshot or a colour map."
        )
    if volume.dtype.kind == "c":
        raise ReadError(f"{path}: complex values are not one 3D volume. Save the magnitude image.")
    if volume.ndim > 3 and set(shape[3:]) == {1}:
        volume = volume.reshape(shape[:3])
    if volume.ndim > 3:
        count = int(np.prod(shape[3:]))
        raise ReadError(
            f"{path}: an array {shape} is not one 3D volume but {count} of them. Split the file "
            "(fslsplit, nibabel.funcs.four_to_three) and give the volume of interest."
        )
    if volume.ndim != 3 or volume.dtype.kind not in "iufb" or not volume.size:
        raise ReadError(
            f"{path}: an array {shape} of {volume.dtype} is not one 3D volume. "
            "Save the volume of interest as a 3D file."
        )
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        bad = int((~np.isfinite(volume)).sum())
        raise ReadError(
            f"{path}: {bad} voxels are NaN or infinite. Replace them, or convert the image again."
        )
    spacing = np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)
    # A spacing of zero is no wrong unit but a broken affine, which Grid refuses.
    if spacing.min() > 0 and (spacing.min() < _SMALLEST_MM or spacing.max() > _LARGEST_MM):
        raise ReadError(
            f"{path}: voxels of {' x '.join(f'{v:.3g}' for v in spacing)} mm cannot be a head scan; the unit "
            "or the affine of the file is wrong. Correct its header (unit mm) or convert it again."
        )
    i, j, k = (int(n) for n in volume.shape)
    try:
        grid = Grid((i, j, k), affine)
    except ValueError as error:
        raise ReadError(f"{path}: {error} Convert the image again.") from error
    cosines = np.abs((grid.affine[:3, :3] / spacing).T @ (grid.affine[:3, :3] / spacing) - np.eye(3))
    if cosines.max() > _SHEAR_REFUSED:
        raise ReadError(
            f"{path}: two voxel axes are only {np.degrees(np.arccos(min(cosines.max(), 1))):.0f} degrees "
            "apart; the affine of the file is broken. Convert the image again."
        )
    if cosines.max() > _SHEAR_NOTED:
        notes = [
            *notes,
            f"voxel axes are {np.degrees(np.arcsin(cosines.max())):.1f} degrees from perpendicular (a tilted "
            "gantry, or a registration); positions follow the affine",
        ]
    return Stored(path, volume, grid, tuple(notes))
