"""A prepared scan in memory and on disk: one safetensors file that is read whole or by crops."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aneurysm.data.errors import ReadError
from aneurysm.data.files import replacing
from aneurysm.data.resample import crop_grid
from aneurysm.data.scan import Grid, Lesion

FORMAT = 2  # raised when the meaning of a file changes; older files are then prepared again


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


def save_prepared(case: PreparedCase, path: Path) -> None:
    """Write one safetensors file, whole or not at all: image float16, labels uint8 where known."""
    arrays: dict[str, np.ndarray] = {"image": case.image.astype(np.float16)}
    for name in ("vessel", "aneurysm"):
        if (mask := getattr(case, name)) is not None:
            arrays[name] = np.ascontiguousarray(mask, dtype=np.uint8)
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
    }  # fmt: skip
    with replacing(path) as part:
        save_file(arrays, part, metadata={"case": json.dumps(described)})


def load_prepared(path: Path | str) -> PreparedCase:
    """Read a prepared case; the image comes back as float32.

    Raises:
        ReadError: not a prepared case, or one of another format.
    """
    return _load(Path(path), None, None)


def load_prepared_crop(
    path: Path | str, start: tuple[int, int, int], size: tuple[int, int, int]
) -> PreparedCase:
    """Read only a box of a prepared case, without loading the rest.

    Args:
        start: first voxel (d, h, w); may lie outside the volume.
        size: (d, h, w) of the result; what lies outside is background, 0 in masks.
    """
    return _load(Path(path), np.array(start, int), np.array(size, int))


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
    with _opened(Path(path)) as file:
        described, names = _described(file, Path(path)), set(file.keys())
        d, h, w = file.get_slice("image").get_shape()
    return Header(described["modality"], (int(d), int(h), int(w)), frozenset(names - {"image"}))


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise ReadError(f"{path}: no such prepared case. Run the preparation first.")
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ReadError(f"{path}: not a prepared case ({error}). Delete it and prepare again.") from error


def _described(file: Any, path: Path) -> dict[str, Any]:
    described = json.loads((file.metadata() or {}).get("case", "{}"))
    if described.get("format") != FORMAT:
        raise ReadError(
            f"{path}: prepared format {described.get('format')}, this version reads {FORMAT}. "
            "Delete the file and prepare again."
        )
    return described


def _load(path: Path, start: np.ndarray | None, size: np.ndarray | None) -> PreparedCase:
    with _opened(path) as file:
        described = _described(file, path)
        names = set(file.keys())
        full = np.array(file.get_slice("image").get_shape())
        start = np.zeros(3, int) if start is None else start
        size = full if size is None else size
        image = _box(file, "image", full, start, size, described["background"]).astype(np.float32)
        masks = {
            name: _box(file, name, full, start, size, 0) if name in names else None
            for name in ("vessel", "aneurysm")
        }
    whole = Grid(tuple(full), np.array(described["affine"]))
    return PreparedCase(
        series_uid=described["series_uid"],
        patient_id=described["patient_id"],
        modality=described["modality"],
        image=image,
        grid=crop_grid(whole, tuple(start), tuple(size)),
        lesions=tuple(
            Lesion(np.array(lesion["centre_mm"]), lesion["radius_mm"], lesion["location"])
            for lesion in described["lesions"]
        ),
        age=described["age"],
        sex=described["sex"],
        present=described["present"],
        locations=np.array([np.nan if v is None else v for v in described["locations"]], np.float32),
        source=Grid(tuple(described["source"]["shape"]), np.array(described["source"]["affine"])),
        background=described["background"],
        notes=tuple(described["notes"]),
        **masks,
    )


def _box(
    file: Any, name: str, full: np.ndarray, start: np.ndarray, size: np.ndarray, fill: float
) -> np.ndarray:
    first, last = np.maximum(start, 0), np.minimum(start + size, full)
    view = file.get_slice(name)
    if (first >= last).any():
        return np.full(size, fill, dtype=view[:1, :1, :1].dtype)
    array = view[first[0] : last[0], first[1] : last[1], first[2] : last[2]]
    before, after = first - start, start + size - last
    if before.any() or after.any():
        array = np.pad(array, list(zip(before, after, strict=True)), constant_values=fill)
    return array
