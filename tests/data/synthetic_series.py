"""Writes tiny DICOM series for the tests of the readers; every tag can be spoiled by a callback."""

from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

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


JPEG = {  # transfer syntax: options of the encoder
    "1.2.840.10008.1.2.4.50": {"level": 100},
    "1.2.840.10008.1.2.4.51": {"level": 100},
    "1.2.840.10008.1.2.4.57": {"lossless": True, "predictor": 4},
    "1.2.840.10008.1.2.4.70": {"lossless": True, "predictor": 1},
}


def transcode(path: Path, syntax: UID) -> None:
    """Store an uncompressed file in another transfer syntax."""
    ds = dcmread(path)
    if str(syntax) in JPEG:
        pixels = np.frombuffer(ds.PixelData, f"<u{ds.BitsAllocated // 8}").reshape(ds.Rows, ds.Columns)
        pixels = pixels & ((1 << ds.BitsStored) - 1)
        frame = imagecodecs.jpeg8_encode(pixels, bitspersample=ds.BitsStored, **JPEG[str(syntax)])
        ds.PixelData = encapsulate([frame])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = syntax
    elif syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        ds.compress(syntax, generate_instance_uid=False)
    else:
        assert syntax in (ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)
        ds.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            words = "<u2" if ds["PixelData"].VR == "OW" else f"<u{ds.BitsAllocated // 8}"
            ds.PixelData = np.frombuffer(ds.PixelData, words).byteswap().tobytes()
            ds.decode()
            [element for element in ds]  # converted while the encoding is still known
            ds.set_original_encoding(False, False)
    ds.save_as(path)


def write_enhanced(
    path: Path,
    stored: np.ndarray,
    spacing: tuple[float, float, float] = (1.5, 0.5, 0.7),
    axes: np.ndarray | None = None,
    origin: tuple[float, float, float] = (-10.0, -20.0, 30.0),
    slopes: np.ndarray | None = None,
    order: np.ndarray | None = None,
    change: Callable[[FileDataset], None] | None = None,
) -> Path:
    """Write (slices, rows, columns) as one enhanced multi-frame file; `order[k]` is the slice in frame k."""
    path = write_series(path.parent, stored[:1], spacing, axes, origin)[0].rename(path)
    ds = dcmread(path)
    axes = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float) if axes is None else axes
    order = np.arange(len(stored)) if order is None else order
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ds.PixelSpacing, 99.0
    orientation.ImageOrientationPatient = ds.ImageOrientationPatient
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    frames = []
    for i in order:
        group, position, transformation = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [float(v) for v in np.array(origin) + axes[:, 0] * spacing[0] * i]
        transformation.RescaleSlope = 1.0 if slopes is None else float(slopes[i])
        transformation.RescaleIntercept = 0.0
        group.PlanePositionSequence = Sequence([position])
        group.PixelValueTransformationSequence = Sequence([transformation])
        frames.append(group)
    for tag in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "SliceThickness"):
        delattr(ds, tag)
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    ds.NumberOfFrames = len(order)
    ds.PixelData = np.ascontiguousarray(stored[order]).tobytes()
    if change is not None:
        change(ds)
    ds.save_as(path)
    return path
