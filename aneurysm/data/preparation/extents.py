"""How large a series is, from its headers alone: an estimate for planning, never geometry to compute with."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from nibabel.spatialimages import SpatialImage

from aneurysm.data.preparation.workload import Extent

_TAGS = ["Rows", "Columns", "NumberOfFrames", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness"]


def dicom_extent(files: Sequence[Path]) -> Extent | None:
    """From the first file of a series; None when it has no size.

    Distances that the header does not tell are taken as 0.5 mm in plane and 1 mm between slices.
    """
    if not files:
        return None
    header = pydicom.dcmread(files[0], stop_before_pixels=True, specific_tags=_TAGS, force=True)
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    if not rows or not columns:
        return None
    images = max(int(header.get("NumberOfFrames") or 1), 1) * len(files)
    in_plane = [float(v) for v in header.get("PixelSpacing") or (0.5, 0.5)]
    between = float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0)
    return Extent((images, rows, columns), (abs(between) or 1.0, in_plane[0], in_plane[1]))


def nifti_extent(path: Path) -> Extent | None:
    """From the header of a NIfTI file; None when it is not one volume."""
    image = nib.load(path)
    if not isinstance(image, SpatialImage) or len(image.shape) < 3:
        return None
    i, j, k = (int(n) for n in image.shape[:3])
    x, y, z = (float(v) or 1.0 for v in np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0))
    return Extent((i, j, k), (x, y, z))
