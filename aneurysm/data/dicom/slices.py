"""Where each image of a DICOM series lies in the patient, from its header alone.

A `Slice` is one stored image: a single-frame file or one frame of a multi-frame file. DICOM's patient axes
point to left, posterior, superior; everything here is turned to right, anterior, superior (RAS) mm.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset

from aneurysm.data.dicom.headers import Header, broken_as_read_error
from aneurysm.data.dicom.headers import read_header as read_header
from aneurysm.data.errors import ReadError

_RAS_FROM_LPS = np.array([-1.0, -1.0, 1.0])
_MOST_FRAMES = 100_000  # more is a broken header
_MOST_RESCALE = 1e25  # 32-bit values stay within float32


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
        if self.across is other.across and self.down is other.down:  # one array for equal tags
            return self.shape == other.shape
        pixel = 1e-3 * np.linalg.norm(self.across)
        return (
            self.shape == other.shape
            and bool(np.allclose(self.across, other.across, rtol=0, atol=pixel))
            and bool(np.allclose(self.down, other.down, rtol=0, atol=pixel))
        )


def by_plane(slices: list[Slice]) -> list[list[Slice]]:
    """Sets of slices with one matrix size, pixel spacing and orientation, the largest first."""
    groups: list[list[Slice]] = []
    for s in slices:
        group = next((g for g in groups if g[0].same_plane(s)), None)
        if group is None:
            groups.append([s])
        else:
            group.append(s)
    return sorted(groups, key=len, reverse=True)


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


def slices_of(header: Header) -> list[Slice]:
    """The images of one file with their geometry.

    Raises:
        ReadError: no image, colour image, or the geometry is missing, NaN or contradictory.
    """
    with broken_as_read_error(header.path, "its header contradicts itself"):
        return _slices_of(header)


def frames_are_placed(header: Header) -> bool:
    """False for a multi-frame file that gives the place of its first frame only."""
    return header.integer("NumberOfFrames", 1) <= 1 or bool(header.get("PerFrameFunctionalGroupsSequence"))


def _slices_of(header: Header) -> list[Slice]:
    path = header.path
    for tag in ("Rows", "Columns"):
        if not header.integer(tag):
            raise ReadError(f"{path}: has no image ({tag} is missing). Remove it from the series.")
    if header.integer("SamplesPerPixel", 1) != 1:
        raise ReadError(f"{path}: a colour image (screenshot?), not a scan. Remove it from the series.")
    if header.get("ModalityLUTSequence"):
        raise ReadError(
            f"{path}: a table (ModalityLUTSequence) maps its stored values, not a slope. "
            "Export it with RescaleSlope and RescaleIntercept."
        )
    count = header.integer("NumberOfFrames", 1) or 1
    if not 1 <= count <= _MOST_FRAMES:
        raise ReadError(f"{path}: NumberOfFrames is {count}. Export it again.")
    shared = _first(header.get("SharedFunctionalGroupsSequence"))
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    if per_frame:
        if len(per_frame) != count:
            raise ReadError(
                f"{path}: says it has {count} frames but describes {len(per_frame)}. Export it again."
            )
        return [_placed(header, i, [group, shared]) for i, group in enumerate(per_frame)]
    if count == 1:
        return [_placed(header, None, [shared])]
    # Some anonymised multi-frame files keep only the first frame's place and the distance.
    first = _placed(header, 0, [shared])
    groups = [shared]
    step = _value(header, groups, "PixelMeasuresSequence", "SpacingBetweenSlices")
    step = step or _value(header, groups, "PixelMeasuresSequence", "SliceThickness")
    if step is None or not np.isfinite(step[0]) or step[0] == 0:
        raise ReadError(
            f"{path}: {count} frames without positions or SpacingBetweenSlices; no volume is known. "
            "Export it with its PerFrameFunctionalGroupsSequence."
        )
    along = abs(step[0]) * first.normal
    return [
        Slice(
            path, first.sop_uid, i, first.shape, first.position + i * along,
            first.across, first.down, first.slope, first.intercept,
        )
        for i in range(count)
    ]  # fmt: skip


def _placed(header: Header, frame: int | None, groups: list[Dataset | None]) -> Slice:
    name = str(header.path) if frame is None else f"{header.path} frame {frame}"
    orientation = _vector(name, header, groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = _vector(name, header, groups, "PixelMeasuresSequence", "PixelSpacing", 2)
    position = _vector(name, header, groups, "PlanePositionSequence", "ImagePositionPatient", 3)
    try:
        across, down = _axes(orientation, spacing)
    except ValueError as error:
        raise ReadError(f"{name}: {error}") from error
    slope = _value(header, groups, "PixelValueTransformationSequence", "RescaleSlope") or (1.0,)
    intercept = _value(header, groups, "PixelValueTransformationSequence", "RescaleIntercept") or (0.0,)
    if not 0 < abs(slope[0]) < _MOST_RESCALE or not abs(intercept[0]) < _MOST_RESCALE:
        raise ReadError(
            f"{name}: RescaleSlope {slope[0]} and RescaleIntercept {intercept[0]} make no image. "
            "Export the file again."
        )
    return Slice(
        path=header.path,
        sop_uid=header.text("SOPInstanceUID") or header.path.stem,
        frame=frame,
        shape=(header.integer("Rows"), header.integer("Columns")),
        position=np.array(position) * _RAS_FROM_LPS,
        across=across,
        down=down,
        slope=slope[0],
        intercept=intercept[0],
    )


@lru_cache(maxsize=256)
def _axes(orientation: tuple[float, ...], spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """RAS mm (3,) from one column to the next and from one row to the next; equal tags share the arrays."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise ValueError(
            f"ImageOrientationPatient {list(orientation)} is not two perpendicular axes. Export it again."
        )
    if min(spacing) <= 0:
        raise ValueError(f"PixelSpacing {list(spacing)} must be positive. Export it again.")
    # PixelSpacing = (between rows, between columns)
    return row / lengths[0] * spacing[1] * _RAS_FROM_LPS, column / lengths[1] * spacing[0] * _RAS_FROM_LPS


def _first(sequence: Any) -> Dataset | None:
    return sequence[0] if sequence else None


def _value(
    header: Header, groups: list[Dataset | None], sequence: str, keyword: str
) -> tuple[float, ...] | None:
    """A tag from the first place that has it: the frame's group, the shared group, the file itself."""
    for group in groups:
        if group is None:
            continue
        inner = _first(group.get(sequence))
        for place in (inner, group):
            if place is not None and (value := place.get(keyword)) not in (None, ""):
                return tuple(map(float, value)) if hasattr(value, "__iter__") else (float(value),)
    return header.numbers(keyword)


def _vector(
    name: str, header: Header, groups: list[Dataset | None], sequence: str, keyword: str, n: int
) -> tuple[float, ...]:
    try:
        vector = _value(header, groups, sequence, keyword)
    except (TypeError, ValueError) as error:
        raise ReadError(f"{name}: {keyword} is not {n} numbers ({error}). Export it again.") from error
    if vector is None:
        raise ReadError(
            f"{name}: {keyword} is missing, so its place in the patient is unknown. "
            "Export the series again from the PACS with its geometry tags."
        )
    if len(vector) != n or not np.isfinite(vector).all():
        raise ReadError(f"{name}: {keyword} is {list(vector)}, not {n} finite numbers. Export it again.")
    return vector
