"""Writes tiny DICOM series for the tests of the readers; every tag can be spoiled by a callback."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

SERIES = "1.2.826.0.1.3680043.8.498.1000"


def write_series(
    folder: Path,
    stored: np.ndarray,
    spacing: tuple[float, float, float] = (1.5, 0.5, 0.7),
    axes: np.ndarray | None = None,
    origin: tuple[float, float, float] = (-10.0, -20.0, 30.0),
    intercept: float = 0.0,
    change: Callable[[FileDataset, int], None] | None = None,
    modality: str = "MR",
    series: str = SERIES,
) -> list[Path]:
    """Write (slices, rows, columns) uint16 as single-frame files.

    Args:
        spacing: mm between slices, rows, columns.
        axes: (3, 3), columns are the unit LPS directions along slices, rows, columns.
        origin: LPS mm of the first voxel.
        change: called with every data set before it is written; may raise StopIteration to leave it out.
    """
    axes = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float) if axes is None else axes
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, plane in enumerate(stored):
        path = folder / f"{i:03d}.dcm"
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series}.{i + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.SeriesInstanceUID, ds.PatientID, ds.Modality = series, "patient 7", modality
        ds.PatientAge, ds.PatientSex = "061Y", "F"
        ds.SeriesDescription = "TOF 3D"
        ds.InstanceNumber = i + 1
        ds.ImagePositionPatient = [float(v) for v in np.array(origin) + axes[:, 0] * spacing[0] * i]
        ds.ImageOrientationPatient = [float(v) for v in (*axes[:, 2], *axes[:, 1])]
        ds.PixelSpacing = [spacing[1], spacing[2]]
        ds.SliceThickness = 99.0  # must not be believed
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, int(plane.dtype.kind == "i")
        ds.RescaleSlope, ds.RescaleIntercept = 1.0, intercept
        ds.PixelData = np.ascontiguousarray(plane).tobytes()
        if change is not None:
            try:
                change(ds, i)
            except StopIteration:
                continue
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
