"""Writes a data set in the layout of the RSNA 2025 Intracranial Aneurysm Detection challenge.

    series/<series uid>/<SOP instance uid>.dcm   axial slices, file order is not slice order
    train.csv                                    one row per series, 13 locations and `Aneurysm Present`
    train_localizers.csv                         one row per aneurysm: a pixel of one slice
    segmentations/<series uid>.nii               the image, where masks exist
    segmentations/<series uid>_cowseg.nii        vessel labels (labels.VESSEL_LABEL, 14 = no name)
    segmentations/<series uid>_aneurysm.nii.gz   our extension: k inside lesion k

The same input writes the same bytes: identifiers are hashed from the series UID and no file holds a time.
"""

import gzip
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nibabel
import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from aneurysm.data.files import replacing
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, MODALITIES
from aneurysm.data.scan import Grid

RSNA_MODALITY: Final = {"CTA": "CTA", "MRA": "MRA", "T1": "MRI T1post", "T2": "MRI T2"}
TRAIN_COLUMNS: Final = ("SeriesInstanceUID", "PatientAge", "PatientSex", "Modality", *LABEL_COLUMNS)
LOCALIZER_COLUMNS: Final = ("SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location")
_SEX: Final = {"M": "Male", "F": "Female"}
_HU_OFFSET: Final = -1024  # stored CT pixels are unsigned: HU + 1024

LesionRow = tuple[Sequence[float] | np.ndarray, float | None, int | None]


@dataclass(frozen=True)
class SeriesRows:
    """What one series adds to the two tables."""

    train: dict[str, object]  # TRAIN_COLUMNS -> cell, "" when unknown
    localizers: tuple[dict[str, object], ...]  # LOCALIZER_COLUMNS -> cell, one per lesion


def series_uid_for(*parts: str | float) -> str:
    """A valid DICOM UID that depends on nothing but `parts`."""
    return str(generate_uid(entropy_srcs=["series", *map(str, parts)]))


def write_series(
    root: Path,
    *,
    series_uid: str,
    patient_id: str,
    modality: str,
    volume: np.ndarray,
    grid: Grid,
    age: float | None,
    sex: str | None,
    locations: np.ndarray | None,
    present: bool | None,
    lesions: Sequence[LesionRow],
    vessel: np.ndarray | None,
    aneurysm: np.ndarray | None,
) -> SeriesRows:
    """Write the DICOM slices and masks of one series and return its table rows; safe to call in parallel.

    Args:
        volume: (d, h, w) in canonical orientation; HU for CTA, units of at least some hundred for MR, because
            pixels are stored as whole numbers (MR below zero becomes zero).
        grid: of the volume, with axes at right angles.
        age, sex: years and "M" or "F", or None.
        locations: (13,) of 0, 1 or NaN where unknown; None for all unknown.
        lesions: (centre in RAS mm, radius in mm or None, location index or None); number k of the list is
            id k, counted from 1, in the aneurysm mask.
        vessel, aneurysm: (d, h, w) uint8 or None.

    Raises:
        ValueError: shapes disagree, unknown modality, the grid is not canonical, a lesion lies outside.
    """
    _check(series_uid, modality, volume, grid, vessel, aneurysm)
    sop_uids = _write_slices(root, series_uid, patient_id, modality, volume, grid, age, sex)
    if vessel is not None or aneurysm is not None:
        folder = root / "segmentations"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{series_uid}.nii").write_bytes(_nifti(_stored(volume, modality).astype(np.int16), grid))
        if vessel is not None:
            (folder / f"{series_uid}_cowseg.nii").write_bytes(_nifti(vessel.astype(np.uint8), grid))
        if aneurysm is not None:
            packed = gzip.compress(_nifti(aneurysm.astype(np.uint8), grid), compresslevel=6, mtime=0)
            (folder / f"{series_uid}_aneurysm.nii.gz").write_bytes(packed)
    labels = np.full(len(LOCATIONS), np.nan) if locations is None else np.asarray(locations, np.float64)
    cells = [_flag(value) for value in (*labels, np.nan if present is None else float(present))]
    train: dict[str, object] = {
        "SeriesInstanceUID": series_uid,
        "PatientAge": "" if age is None or math.isnan(age) else round(age),
        "PatientSex": "" if sex is None else _SEX.get(sex, sex),
        "Modality": RSNA_MODALITY[modality],
        **dict(zip(LABEL_COLUMNS, cells, strict=True)),
    }
    rows = tuple(_localizer(series_uid, sop_uids, grid, centre, place) for centre, _, place in lesions)
    return SeriesRows(train, rows)


def finish(root: Path, rows: Iterable[SeriesRows]) -> None:
    """Write train.csv and train_localizers.csv, sorted by series whatever the order of writing."""
    ordered = sorted(rows, key=lambda row: str(row.train["SeriesInstanceUID"]))
    tables = {
        "train.csv": pd.DataFrame([row.train for row in ordered], columns=list(TRAIN_COLUMNS), dtype=object),
        "train_localizers.csv": pd.DataFrame(
            [line for row in ordered for line in row.localizers],
            columns=list(LOCALIZER_COLUMNS),
            dtype=object,
        ),
    }
    for name, frame in tables.items():
        with replacing(root / name) as part:
            frame.to_csv(part, index=False, lineterminator="\n")


class RsnaWriter:
    """Collects the rows of the series that it writes, for a writer in one process.

    Workers in several processes call `write_series` and hand their rows to `finish`.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._rows: list[SeriesRows] = []

    def add_series(
        self,
        *,
        series_uid: str,
        patient_id: str,
        modality: str,
        volume: np.ndarray,
        grid: Grid,
        age: float | None,
        sex: str | None,
        locations: np.ndarray | None,
        present: bool | None,
        lesions: Sequence[LesionRow],
        vessel: np.ndarray | None,
        aneurysm: np.ndarray | None,
    ) -> SeriesRows:
        """Write one series as `write_series` does and remember its rows."""
        rows = write_series(
            self.root,
            series_uid=series_uid,
            patient_id=patient_id,
            modality=modality,
            volume=volume,
            grid=grid,
            age=age,
            sex=sex,
            locations=locations,
            present=present,
            lesions=lesions,
            vessel=vessel,
            aneurysm=aneurysm,
        )
        self._rows.append(rows)
        return rows

    def finish(self) -> None:
        """Write the tables of all series added so far."""
        finish(self.root, self._rows)


def _check(
    uid: str,
    modality: str,
    volume: np.ndarray,
    grid: Grid,
    vessel: np.ndarray | None,
    aneurysm: np.ndarray | None,
) -> None:
    if modality not in MODALITIES:
        raise ValueError(f"{uid}: modality must be one of {MODALITIES}, got {modality!r}.")
    for name, array in (("volume", volume), ("vessel", vessel), ("aneurysm", aneurysm)):
        if array is not None and array.shape != grid.shape:
            raise ValueError(f"{uid}: {name} {array.shape} does not lie on its grid {grid.shape}.")
    axes = grid.affine[:3, :3] / grid.spacing
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-4):
        raise ValueError(f"{uid}: DICOM slices need axes at right angles, got directions {axes.tolist()}.")
    # d, h, w grow to superior, anterior, right: the matrix is closest to the reversed identity.
    if axes[2, 0] < 0.7 or axes[1, 1] < 0.7 or axes[0, 2] < 0.7:
        raise ValueError(
            f"{uid}: the grid is not canonical (d superior, h anterior, w right); its directions are "
            f"{axes.tolist()}. Reorient the volume first."
        )


def _write_slices(
    root: Path,
    series_uid: str,
    patient_id: str,
    modality: str,
    volume: np.ndarray,
    grid: Grid,
    age: float | None,
    sex: str | None,
) -> list[str]:
    """Write one file per axial slice and return the SOP instance UIDs from inferior to superior."""
    folder = root / "series" / series_uid
    folder.mkdir(parents=True, exist_ok=True)
    common = _header(series_uid, patient_id, modality, grid, age, sex)
    # Rows of an axial slice run to posterior and columns to the patient's left: both of our axes turn round.
    pixels = np.ascontiguousarray(_stored(volume, modality)[:, ::-1, ::-1])
    if modality == "CTA":
        pixels = (pixels - _HU_OFFSET).astype(np.uint16)
    corner = np.array([grid.shape[1] - 1, grid.shape[2] - 1])
    sop_uids = []
    for k, plane in enumerate(pixels):
        sop_uid = str(generate_uid(entropy_srcs=[series_uid, str(k)]))
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = common.SOPClassUID
        meta.MediaStorageSOPInstanceUID = UID(sop_uid)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        common.SOPInstanceUID = sop_uid
        common.InstanceNumber = k + 1
        common.ImagePositionPatient = _ds(grid.to_mm(np.array([k, *corner])) * (-1, -1, 1))
        common.PixelData = plane.astype("<u2").tobytes()
        FileDataset(sop_uid, common, file_meta=meta, preamble=b"\0" * 128).save_as(
            folder / f"{sop_uid}.dcm", enforce_file_format=True
        )
        sop_uids.append(sop_uid)
    return sop_uids


def _header(
    series_uid: str, patient_id: str, modality: str, grid: Grid, age: float | None, sex: str | None
) -> Dataset:
    """The tags that all slices of a series share."""
    head = Dataset()
    head.SOPClassUID = CTImageStorage if modality == "CTA" else MRImageStorage
    head.Modality = "CT" if modality == "CTA" else "MR"
    head.SeriesDescription = RSNA_MODALITY[modality]
    head.PatientID = patient_id
    head.PatientName = patient_id
    head.PatientSex = sex or ""
    if age is not None and not math.isnan(age):
        head.PatientAge = f"{round(age):03d}Y"
    head.SliceThickness = _ds(grid.spacing[:1])[0]
    head.SpacingBetweenSlices = _ds(grid.spacing[:1])[0]
    head.StudyInstanceUID = str(generate_uid(entropy_srcs=["study", series_uid]))
    head.SeriesInstanceUID = series_uid
    head.FrameOfReferenceUID = str(generate_uid(entropy_srcs=["frame", series_uid]))
    axes = grid.affine[:3, :3] / grid.spacing * np.array([[-1], [-1], [1]])  # LPS
    head.ImageOrientationPatient = _ds(np.concatenate([-axes[:, 2], -axes[:, 1]]))
    head.SamplesPerPixel = 1
    head.PhotometricInterpretation = "MONOCHROME2"
    head.Rows, head.Columns = grid.shape[1:]
    head.PixelSpacing = _ds(grid.spacing[1:])
    head.BitsAllocated = head.BitsStored = 16
    head.HighBit = 15
    head.PixelRepresentation = 0
    if modality == "CTA":
        head.RescaleIntercept = str(_HU_OFFSET)
        head.RescaleSlope = "1"
        head.RescaleType = "HU"
    return head


def _stored(volume: np.ndarray, modality: str) -> np.ndarray:
    """The whole numbers that DICOM and NIfTI keep: HU, or MR units from zero."""
    low, high = (_HU_OFFSET, 3071) if modality == "CTA" else (0, 32767)
    return np.clip(np.rint(volume), low, high).astype(np.int32)


def _nifti(array: np.ndarray, grid: Grid) -> bytes:
    """A NIfTI-1 file with axes left, anterior, superior: as dcm2niix converts an axial series."""
    affine = np.eye(4)
    affine[:3, 0] = -grid.affine[:3, 2]
    affine[:3, 1] = grid.affine[:3, 1]
    affine[:3, 2] = grid.affine[:3, 0]
    affine[:3, 3] = grid.to_mm(np.array([0, 0, grid.shape[2] - 1]))
    image = nibabel.Nifti1Image(np.ascontiguousarray(array[:, :, ::-1].transpose(2, 1, 0)), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def _localizer(
    series_uid: str, sop_uids: list[str], grid: Grid, centre: Sequence[float] | np.ndarray, place: int | None
) -> dict[str, object]:
    """The slice and pixel nearest to a lesion's centre."""
    d, h, w = grid.to_index(np.asarray(centre, np.float64))
    size = np.array(grid.shape)
    if not (np.array([d, h, w]) > -0.5).all() or not (np.array([d, h, w]) < size - 0.5).all():
        raise ValueError(
            f"{series_uid}: a lesion at {np.round(centre, 1).tolist()} mm lies outside the volume (index "
            f"{d:.1f}, {h:.1f}, {w:.1f} of {grid.shape}). Leave it out or enlarge the grid."
        )
    point = {"x": round(float(size[2] - 1 - w), 3), "y": round(float(size[1] - 1 - h), 3)}
    return {
        "SeriesInstanceUID": series_uid,
        "SOPInstanceUID": sop_uids[min(max(round(float(d)), 0), len(sop_uids) - 1)],
        "coordinates": str(point),
        "location": "" if place is None else LOCATIONS[place],
    }


def _flag(value: float) -> object:
    return "" if math.isnan(value) else int(value)


def _ds(values: np.ndarray) -> list[str]:
    """Decimal strings of at most 16 characters, as DICOM demands."""
    return [format_number_as_ds(float(np.round(value, 9)) + 0.0) for value in values]
