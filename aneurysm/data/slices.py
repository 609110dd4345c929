"""Where each image of a DICOM series lies in the patient, from its header alone.

A `Slice` is one stored image: a single-frame file or one frame of a multi-frame file. DICOM's patient axes
point to left, posterior, superior; everything here is turned to right, anterior, superior (RAS) mm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from aneurysm.data.errors import ReadError

_RAS_FROM_LPS = np.array([-1.0, -1.0, 1.0])

HEADER_TAGS = [
    "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality", "PatientID", "PatientAge", "PatientSex",
    "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "SeriesDescription", "ProtocolName", "SequenceName", "PulseSequenceName", "ScanningSequence",
    "SequenceVariant", "ContrastBolusAgent", "AngioFlag", "EchoTime", "RepetitionTime", "InversionTime",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Slice:
    """One stored image and its place in the patient."""

    path: Path
    sop_uid: str
    frame: int | None  # 0-based, None in single-frame files
    shape: tuple[int, int]  # rows, columns
    position: np.ndarray  # (3,) RAS mm, centre of the first voxel
    across: np.ndarray  # (3,) RAS mm from one column to the next
    down: np.ndarray  # (3,) RAS mm from one row to the next
    slope: float  # stored value * slope + intercept = HU or MR units
    intercept: float

    @property
    def name(self) -> str:
        """How messages call this image."""
        return self.path.name if self.frame is None else f"{self.path.name} frame {self.frame}"

    @property
    def normal(self) -> np.ndarray:
        """Unit vector (3,) across the image plane."""
        cross = np.cross(self.across, self.down)
        return cross / np.linalg.norm(cross)

    def same_plane(self, other: "Slice") -> bool:
        """Whether both images have the same matrix, pixel spacing and orientation (to 0.1 %)."""
        pixel = 1e-3 * np.linalg.norm(self.across)
        return (
            self.shape == other.shape
            and bool(np.allclose(self.across, other.across, rtol=0, atol=pixel))
            and bool(np.allclose(self.down, other.down, rtol=0, atol=pixel))
        )


class SliceIndex:
    """Maps a pixel of a stored image to the patient, as point annotations need it."""

    def __init__(self, slices: list[Slice]) -> None:
        self._slices = {(s.sop_uid, s.frame): s for s in slices}

    def __contains__(self, sop_uid: str) -> bool:
        return any(uid == sop_uid for uid, _ in self._slices)

    def to_mm(self, sop_uid: str, x: float, y: float, frame: int | None = None) -> np.ndarray:
        """RAS position (3,) in mm of pixel column `x`, row `y` of an image.

        Args:
            frame: 0-based frame of a multi-frame file; not looked at for single-frame files.

        Raises:
            ReadError: the series has no such image, or a multi-frame image without `frame`.
        """
        found = self._slices.get((sop_uid, None))
        if found is None:
            found = self._slices.get((sop_uid, frame))
        if found is None:
            if sop_uid not in self:
                raise ReadError(f"No image {sop_uid} in this series of {len(self._slices)} images.")
            raise ReadError(
                f"{sop_uid} is a multi-frame image and has no frame {frame}; give a 0-based frame."
            )
        return found.position + x * found.across + y * found.down


def read_header(path: Path) -> Dataset:
    """The tags of one file that geometry, labels and modality need; no pixels.

    Raises:
        ReadError: not a DICOM file, or broken before its pixels.
    """
    try:
        return dcmread(path, stop_before_pixels=True, specific_tags=HEADER_TAGS)
    except InvalidDicomError as error:
        raise ReadError(
            f"{path}: not a DICOM file (no 'DICM' marker). Remove it from the folder or export it again."
        ) from error
    except OSError as error:
        raise ReadError(f"{path}: cannot be opened ({error.strerror or error}).") from error
    except Exception as error:  # pydicom raises many types on broken files
        raise ReadError(f"{path}: broken DICOM header ({error}). Export the file again.") from error


def slices_of(header: Dataset, path: Path) -> list[Slice]:
    """The images of one file with their geometry.

    Raises:
        ReadError: no image, colour image, or the geometry is missing, NaN or contradictory.
    """
    for tag in ("Rows", "Columns"):
        if not header.get(tag):
            raise ReadError(f"{path}: has no image ({tag} is missing). Remove it from the series.")
    if header.get("SamplesPerPixel", 1) != 1:
        raise ReadError(f"{path}: a colour image (screenshot?), not a scan. Remove it from the series.")
    shared = _first(header.get("SharedFunctionalGroupsSequence"))
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    count = int(header.get("NumberOfFrames") or 1)
    if per_frame:
        if len(per_frame) != count:
            raise ReadError(
                f"{path}: says it has {count} frames but describes {len(per_frame)}. Export it again."
            )
        return [_placed(path, header, i, [group, shared, header]) for i, group in enumerate(per_frame)]
    if count == 1:
        return [_placed(path, header, None, [header])]
    # Some anonymised multi-frame files keep only the first frame's place and the distance.
    first = _placed(path, header, 0, [shared, header])
    step = _number(path, header, "SpacingBetweenSlices") or _number(path, header, "SliceThickness")
    if not step:
        raise ReadError(
            f"{path}: {count} frames without positions or SpacingBetweenSlices; no volume is known."
        )
    return [
        Slice(
            path, first.sop_uid, i, first.shape, first.position + i * step * first.normal,
            first.across, first.down, first.slope, first.intercept,
        )
        for i in range(count)
    ]  # fmt: skip


def frames_are_placed(header: Dataset) -> bool:
    """False for a multi-frame file that gives the place of its first frame only."""
    return bool(header.get("PerFrameFunctionalGroupsSequence")) or int(header.get("NumberOfFrames") or 1) == 1


def _placed(path: Path, header: Dataset, frame: int | None, groups: list[Dataset | None]) -> Slice:
    name = str(path) if frame is None else f"{path} frame {frame}"
    position = _vector(name, groups, "PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = _vector(name, groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = _vector(name, groups, "PixelMeasuresSequence", "PixelSpacing", 2)
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise ReadError(
            f"{name}: ImageOrientationPatient {orientation.tolist()} is not two perpendicular axes."
        )
    if (spacing <= 0).any():
        raise ReadError(f"{name}: PixelSpacing {spacing.tolist()} must be positive.")
    slope = _value(groups, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _value(groups, "PixelValueTransformationSequence", "RescaleIntercept")
    slope, intercept = (1.0 if slope is None else float(slope)), float(intercept or 0.0)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ReadError(f"{name}: RescaleSlope {slope} and RescaleIntercept {intercept} make no image.")
    return Slice(
        path=path,
        sop_uid=str(header.get("SOPInstanceUID", path.stem)),
        frame=frame,
        shape=(int(header.Rows), int(header.Columns)),
        position=position * _RAS_FROM_LPS,
        across=row
        / lengths[0]
        * spacing[1]
        * _RAS_FROM_LPS,  # PixelSpacing = (between rows, between columns)
        down=column / lengths[1] * spacing[0] * _RAS_FROM_LPS,
        slope=slope,
        intercept=intercept,
    )


def _first(sequence: Any) -> Dataset | None:
    return sequence[0] if sequence else None


def _value(groups: list[Dataset | None], sequence: str, keyword: str) -> Any:
    """A tag from the first place that has it: the frame's group, the shared group, the file itself."""
    for group in groups:
        if group is None:
            continue
        inner = _first(group.get(sequence))
        for place in (inner, group):
            if place is not None and place.get(keyword) not in (None, ""):
                return place.get(keyword)
    return None


def _vector(name: str, groups: list[Dataset | None], sequence: str, keyword: str, n: int) -> np.ndarray:
    value = _value(groups, sequence, keyword)
    if value is None:
        raise ReadError(
            f"{name}: {keyword} is missing, so its place in the patient is unknown. "
            "Export the series again from the PACS with its geometry tags."
        )
    try:
        vector = np.array([float(v) for v in value])
    except (TypeError, ValueError) as error:
        raise ReadError(f"{name}: {keyword} is {value!r}, not {n} numbers.") from error
    if vector.shape != (n,) or not np.isfinite(vector).all():
        raise ReadError(f"{name}: {keyword} is {value!r}, not {n} finite numbers.")
    return vector


def _number(path: Path, header: Dataset, keyword: str) -> float | None:
    value = _value(
        [_first(header.get("SharedFunctionalGroupsSequence")), header], "PixelMeasuresSequence", keyword
    )
    try:
        return None if value is None else abs(float(value))
    except (TypeError, ValueError) as error:
        raise ReadError(f"{path}: {keyword} is {value!r}, not a number.") from error
