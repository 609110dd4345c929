"""A prepared scan in memory and on disk: one file of chunked arrays, read whole or by boxes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aneurysm.data.errors import ReadError
from aneurysm.data.preparation.chunked import ArrayFile, open_arrays, write_arrays
from aneurysm.data.resample import crop_grid
from aneurysm.data.scan import Grid, Lesion

FORMAT = 3  # raised when the meaning of a file changes; older files are then prepared again
SUFFIX = ".blosc2"
# Intensities are kept in steps of 1/1024: 0.3 HU of a CTA, a thousandth of the spread of an MR head. Noise is
# tens of steps wide, so nothing that a net could see is lost; the error is half a step at most.
IMAGE_STEP = 2.0**-10
_MOST_STEPS = np.iinfo(np.int16).max

Index = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A scan as the nets see it, or a crop of one, with its labels on the same grid."""

    series_uid: str
    patient_id: str
    modality: str
    image: np.ndarray  # (d, h, w) float32, normalised
    grid: Grid  # of `image`, to RAS mm
    vessel: np.ndarray | None  # (d, h, w) uint8 vessel labels, 0 background; None when unlabelled
    aneurysm: np.ndarray | None  # (d, h, w) uint8, k inside lesion k; None when unlabelled
    lesions: tuple[Lesion, ...]  # of the whole scan, also in a crop
    age: float | None  # years
    sex: str | None  # "M", "F"
    present: bool | None
    locations: np.ndarray  # (13,) float32: 0, 1, NaN unknown
    source: Grid  # of the input files; predictions are written back on it
    background: float  # value of air in `image`, for padding
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("image", "vessel", "aneurysm"):
            array = getattr(self, name)
            if array is not None and array.shape != self.grid.shape:
                raise ValueError(
                    f"{self.series_uid}: {name} {array.shape} does not lie on the grid {self.grid.shape}."
                )

    @property
    def masks(self) -> frozenset[str]:
        """Those of "vessel" and "aneurysm" that are known."""
        return frozenset(name for name in ("vessel", "aneurysm") if getattr(self, name) is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the voxels."""
        arrays = (self.image, self.vessel, self.aneurysm)
        return sum(array.nbytes for array in arrays if array is not None)

    @cached_property
    def image_range(self) -> tuple[float, float]:
        """Lowest and highest intensity of the image."""
        return float(self.image.min()), float(self.image.max())

    @cached_property
    def lumen_voxels(self) -> np.ndarray | None:
        """Flat indices of the voxels of vessels and their sacs, rising; None where vessels are unknown."""
        if self.vessel is None:
            return None
        lumen = self.vessel > 0
        return np.flatnonzero(lumen if self.aneurysm is None else lumen | (self.aneurysm > 0))

    @cached_property
    def sac_voxels(self) -> np.ndarray | None:
        """Flat indices of the voxels of sacs, rising; None where their mask is unknown."""
        return None if self.aneurysm is None else np.flatnonzero(self.aneurysm)

    def box(self, name: str, start: Index, size: Index, fill: float = 0) -> np.ndarray:
        """A box of "image", "vessel" or "aneurysm" from index `start`, which may lie outside.

        Raises:
            KeyError: the mask is unknown.
        """
        array = getattr(self, name)
        if array is None:
            raise KeyError(name)
        return box_of(array, start, size, fill)


@dataclass(frozen=True, eq=False)
class StoredCase:
    """A prepared case on disk: all that is known about it is in memory, voxels are read by boxes.

    Fields mean what they mean in `PreparedCase`.
    """

    file: ArrayFile
    series_uid: str
    patient_id: str
    modality: str
    grid: Grid
    lesions: tuple[Lesion, ...]
    age: float | None
    sex: str | None
    present: bool | None
    locations: np.ndarray
    source: Grid
    background: float
    notes: tuple[str, ...]
    image_range: tuple[float, float]
    step: float  # of intensities in the file
    offset: float  # intensity of the stored 0

    @property
    def masks(self) -> frozenset[str]:
        """Those of "vessel" and "aneurysm" that are known."""
        return frozenset({"vessel", "aneurysm"} & self.file.frames.keys())

    @property
    def nbytes(self) -> int:
        """Bytes of the voxels once they are in memory."""
        return int(np.prod(self.grid.shape)) * (4 + len(self.masks))

    @cached_property
    def lumen_voxels(self) -> "StoredList | None":
        """As in `PreparedCase`, read entry by entry."""
        return StoredList(self.file, "lumen_voxels") if "vessel" in self.masks else None

    @cached_property
    def sac_voxels(self) -> "StoredList | None":
        """As in `PreparedCase`, read entry by entry."""
        return StoredList(self.file, "sac_voxels") if "aneurysm" in self.masks else None

    def box(self, name: str, start: Index, size: Index, fill: float = 0) -> np.ndarray:
        """As in `PreparedCase`; reads only the blocks of the file that the box touches."""
        decoded = name == "image"
        if name not in self.file.frames:
            raise KeyError(name)
        inside, window = overlap_windows(self.grid.shape, start, size)
        if inside is None or window is None:
            return np.full(size, fill, np.float32 if decoded else np.uint8)
        part = self.file.read(name, window)
        part = self._intensities(part) if decoded else part
        if part.shape == tuple(size):
            return part
        out = np.full(size, fill, part.dtype)
        out[inside] = part
        return out

    def crop(self, start: Index, size: Index) -> PreparedCase:
        """A box with all its labels."""
        masks = {
            name: self.box(name, start, size) if name in self.masks else None
            for name in ("vessel", "aneurysm")
        }
        image = self.box("image", start, size, fill=self.background)
        return self._with(image, crop_grid(self.grid, start, size), masks)

    def load(self) -> PreparedCase:
        """The whole case."""
        masks = {
            name: self.file.read(name) if name in self.masks else None for name in ("vessel", "aneurysm")
        }
        return self._with(self._intensities(self.file.read("image")), self.grid, masks)

    def _intensities(self, stored: np.ndarray) -> np.ndarray:
        image = np.multiply(stored, np.float32(self.step), dtype=np.float32)
        image += np.float32(self.offset)
        return image

    def _with(self, image: np.ndarray, grid: Grid, masks: dict[str, np.ndarray | None]) -> PreparedCase:
        return PreparedCase(
            series_uid=self.series_uid,
            patient_id=self.patient_id,
            modality=self.modality,
            image=image,
            grid=grid,
            lesions=self.lesions,
            age=self.age,
            sex=self.sex,
            present=self.present,
            locations=self.locations.copy(),
            source=self.source,
            background=self.background,
            notes=self.notes,
            vessel=masks["vessel"],
            aneurysm=masks["aneurysm"],
        )


@dataclass(frozen=True)
class StoredList:
    """A list of whole numbers in a file; an entry costs one block."""

    file: ArrayFile
    name: str

    def __len__(self) -> int:
        return self.file.frames[self.name].shape[0]

    def __getitem__(self, entry: int) -> int:
        return int(self.file.read(self.name, (slice(entry, entry + 1),))[0])


def save_prepared(case: PreparedCase, path: Path) -> None:
    """Write one file, whole or not at all: the image as int16, labels as uint8 where known.

    Equal cases give equal bytes. Intensities come back within half of `IMAGE_STEP` (a coarser step only where
    the image spans more than 32 units), the lowest one exactly.
    """
    low, high = case.image_range
    step = max(IMAGE_STEP, (high - low) / _MOST_STEPS)
    highest = np.float32(np.rint((high - low) / step)) * np.float32(step) + np.float32(low)
    arrays = {"image": _quantised(case.image, low, step)}
    for name in ("vessel", "aneurysm"):
        if (mask := getattr(case, name)) is not None:
            arrays[name] = np.ascontiguousarray(mask, dtype=np.uint8)
    # A patch is often centred on a vessel: one of these entries says where, without reading the mask.
    small = case.image.size <= np.iinfo(np.int32).max
    for name in ("lumen_voxels", "sac_voxels"):
        if (voxels := getattr(case, name)) is not None:
            arrays[name] = voxels.astype(np.int32 if small else np.int64)
    described = {
        "format": FORMAT,
        "series_uid": case.series_uid,
        "patient_id": case.patient_id,
        "modality": case.modality,
        "affine": case.grid.affine.tolist(),
        "source": {"shape": case.source.shape, "affine": case.source.affine.tolist()},
        "lesions": [
            {"centre_mm": np.asarray(lesion.centre_mm).tolist(), "radius_mm": lesion.radius_mm,
             "location": lesion.location}
            for lesion in case.lesions
        ],
        "age": case.age,
        "sex": case.sex,
        "present": case.present,
        "locations": [None if np.isnan(v) else float(v) for v in case.locations],
        "background": case.background,
        "notes": case.notes,
        "intensity": {"step": step, "offset": low, "highest": float(highest)},
    }  # fmt: skip
    write_arrays(path, arrays, described)


def open_prepared(path: Path | str) -> StoredCase:
    """Open a prepared case without reading a voxel: a thousand of them take a second.

    Raises:
        ReadError: not a prepared case, one that is cut short, or one of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ReadError(f"{path}: no such prepared case. Run the preparation first.")
    try:
        file = open_arrays(path)
    except ReadError as error:
        raise ReadError(f"{path}: not a prepared case. Delete it and prepare again. ({error})") from error
    described = file.header
    if described.get("format") != FORMAT:
        raise ReadError(
            f"{path}: prepared format {described.get('format')}, this version reads {FORMAT}. "
            "Delete the file and prepare again."
        )
    intensity = described["intensity"]
    return StoredCase(
        file=file,
        grid=Grid(_three(file.frames["image"].shape), np.array(described["affine"])),
        image_range=(float(intensity["offset"]), float(intensity["highest"])),
        step=float(intensity["step"]),
        offset=float(intensity["offset"]),
        **_facts(described),
    )


def load_prepared(path: Path | str) -> PreparedCase:
    """Read a prepared case; the image comes back as float32.

    Raises:
        ReadError: not a prepared case, or one of another format.
    """
    return open_prepared(path).load()


def load_prepared_crop(path: Path | str, start: Index, size: Index) -> PreparedCase:
    """Read only a box of a prepared case, without loading the rest.

    Args:
        start: first voxel (d, h, w); may lie outside the volume.
        size: (d, h, w) of the result; what lies outside is background, 0 in masks.
    """
    return open_prepared(path).crop(_three(start), _three(size))


@dataclass(frozen=True)
class Header:
    """What a prepared file says of itself before any voxel is read."""

    modality: str
    shape: tuple[int, int, int]  # (d, h, w)
    masks: frozenset[str]  # those of "vessel" and "aneurysm" that it holds


def prepared_header(path: Path | str) -> Header:
    """Read the header alone: a thousand scans take a second.

    Raises:
        ReadError: not a prepared case, or one of another format.
    """
    case = open_prepared(path)
    return Header(case.modality, case.grid.shape, case.masks)


def box_of(array: np.ndarray, start: Index, size: Index, fill: float = 0) -> np.ndarray:
    """A box of (d, h, w) from index `start`, which may lie outside; what is outside is `fill`."""
    out = np.full(size, fill, array.dtype)
    inside, window = overlap_windows(_three(array.shape), start, size)
    if inside is not None and window is not None:
        out[inside] = array[window]
    return out


def overlap_windows(
    shape: Index, start: Index, size: Index
) -> tuple[tuple[slice, ...] | None, tuple[slice, ...] | None]:
    """Where a box and a volume meet: slices into the box and into the volume, or None twice."""
    first = [max(s, 0) for s in start]
    last = [min(s + n, whole) for s, n, whole in zip(start, size, shape, strict=True)]
    if any(a >= b for a, b in zip(first, last, strict=True)):
        return None, None
    inside = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))
    return inside, tuple(slice(a, b) for a, b in zip(first, last, strict=True))


def _quantised(image: np.ndarray, offset: float, step: float) -> np.ndarray:
    # Plane by plane: whole volumes of intermediate results would cost more memory than the image.
    stored = np.empty(image.shape, np.int16)
    for plane, values in zip(stored, image, strict=True):
        plane[...] = np.rint((values - np.float32(offset)) / np.float32(step))
    return stored


def _facts(described: dict[str, Any]) -> dict[str, Any]:
    return {
        "series_uid": described["series_uid"],
        "patient_id": described["patient_id"],
        "modality": described["modality"],
        "lesions": tuple(
            Lesion(np.array(lesion["centre_mm"]), lesion["radius_mm"], lesion["location"])
            for lesion in described["lesions"]
        ),
        "age": described["age"],
        "sex": described["sex"],
        "present": described["present"],
        "locations": np.array([np.nan if v is None else v for v in described["locations"]], np.float32),
        "source": Grid(_three(described["source"]["shape"]), np.array(described["source"]["affine"])),
        "background": described["background"],
        "notes": tuple(described["notes"]),
    }


def _three(values: Any) -> Index:
    d, h, w = (int(v) for v in values)
    return d, h, w
