"""The RSNA 2025 intracranial aneurysm data set as it lies on disk: series, labels, points, vessel masks."""

import ast
import csv
import dataclasses
import hashlib
import logging
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from aneurysm.data.dicom import find_series, read_series_with_slices
from aneurysm.data.errors import ReadError
from aneurysm.data.extents import dicom_extent
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, PRESENT
from aneurysm.data.nifti import read_mask
from aneurysm.data.scan import Case, Grid, Lesion, Scan
from aneurysm.data.slices import SliceIndex, read_header
from aneurysm.data.tables import INDEX, LOCATION_KEYS
from aneurysm.data.workload import Extent

log = logging.getLogger(__name__)

MODALITY_NAMES = {"CTA": "CTA", "MRA": "MRA", "MRI T2": "T2", "MRI T1post": "T1"}
MATCH_MM = 5.0  # a point belongs to a mask's lesion up to this far outside the lesion's sphere


class RsnaSource:
    """Reads `series/<uid>/*.dcm`, `train.csv`, `train_localizers.csv` and `segmentations/`.

    Vessel labels are `segmentations/<uid>_cowseg.nii[.gz]` or `segmentations/<uid>/<uid>_cowseg.nii[.gz]`;
    lesion masks, which only our own data sets have, are `..._aneurysm.nii[.gz]` (k inside lesion k).
    Empty label cells mean unknown (NaN). Series without a folder are logged and left out of the index.

    The first use of the index raises ReadError when the root, train.csv or one of its columns is missing.
    """

    def __init__(self, root: Path | str, site: str = "rsna") -> None:
        self.root = Path(root)
        self.site = site

    def index(self) -> pd.DataFrame:
        """One row per series on disk (`tables.INDEX`); patients by the PatientID tag of the first image."""
        return self._index.copy()

    def case(self, series_uid: str) -> Case:
        """A scan with its vessel labels, lesions and locations.

        Lesions come from the lesion mask (centroid, and radius of the sphere of equal volume) with the
        location of the nearest point; points without a mask give lesions without a radius. What could
        not be used (a mask that does not fit, a point on a missing image) is in `scan.notes`.

        Raises:
            ReadError: the series is not in the index or its images cannot be read.
        """
        row = self._row(series_uid)
        scan, slices = self._scan(series_uid, row)
        notes = list(scan.notes)
        vessel = self._mask(series_uid, "cowseg", scan.grid, notes)
        aneurysm = self._mask(series_uid, "aneurysm", scan.grid, notes)
        locations = np.array([row[key] for key in LOCATION_KEYS], np.float32)
        points = self._points(series_uid, slices, notes)
        lesions = match_lesions(measure_lesions(aneurysm, scan.grid), points)
        positive = np.flatnonzero(locations == 1)
        if len(lesions) == 1 and lesions[0].location is None and len(positive) == 1:
            lesions = [dataclasses.replace(lesions[0], location=int(positive[0]))]
        present = None if np.isnan(row["present"]) else bool(row["present"])
        return Case(
            scan=dataclasses.replace(scan, notes=tuple(notes)),
            vessel=vessel,
            aneurysm=aneurysm,
            lesions=tuple(lesions),
            present=present,
            locations=locations,
        )

    def fingerprint(self, series_uid: str) -> str:
        """A hash that changes when the labels, masks or images of a series change on disk."""
        parts = [str(self._row(series_uid))]
        parts += [str(point) for point in self._localizers.get(series_uid, [])]
        folder = self.root / "series" / series_uid
        paths = [folder, *(self._mask_path(series_uid, kind) for kind in ("cowseg", "aneurysm"))]
        for path in paths:
            if path is not None and path.exists():
                status = path.stat()
                parts.append(f"{path.name} {status.st_size if path.is_file() else 0} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def extent(self, series_uid: str) -> Extent | None:
        """How large a series is, from the header of its first image."""
        return dicom_extent(sorted((self.root / "series" / series_uid).glob("*.dcm")))

    @cached_property
    def _index(self) -> pd.DataFrame:
        path = self.root / "train.csv"
        if not self.root.is_dir():
            raise ReadError(f"{self.root}: no such folder. Set data.root to the folder that holds train.csv.")
        table = _read_csv(path, ["SeriesInstanceUID", "Modality", *LABEL_COLUMNS])
        listed = [row["SeriesInstanceUID"] for row in table]
        if repeated := sorted(uid for uid, count in Counter(listed).items() if count > 1):
            raise ReadError(f"{path}: {len(repeated)} series are listed twice, first {repeated[0]}.")
        on_disk = {p.name for p in (self.root / "series").glob("*") if p.is_dir()}
        if missing := sorted(set(listed) - on_disk):
            more = " ..." if len(missing) > 3 else ""
            log.warning(
                "%s lists %d series without a folder in series/; left out: %s%s",
                path, len(missing), ", ".join(missing[:3]), more,
            )  # fmt: skip
        table = [row for row in table if row["SeriesInstanceUID"] in on_disk]
        if not table:
            raise ReadError(f"{self.root / 'series'}: none of the {len(listed)} series of train.csv is here.")
        if unknown := sorted({row["Modality"] for row in table} - set(MODALITY_NAMES)):
            raise ReadError(f"{path}: unknown Modality {unknown}; expected {sorted(MODALITY_NAMES)}.")
        return INDEX.conform(pd.DataFrame([self._indexed(row, path) for row in table]))

    def _indexed(self, row: dict[str, str], path: Path) -> dict[str, Any]:
        """A row of train.csv as a row of the index."""
        uid, sex = row["SeriesInstanceUID"], row.get("PatientSex", "").strip().upper()[:1]
        return {
            "series_uid": uid,
            "patient_id": self._patient(uid),
            "modality": MODALITY_NAMES[row["Modality"]],
            "age": _number(row.get("PatientAge", "").rstrip("Yy")),
            "sex": sex if sex in ("M", "F") else "",
            "site": self.site,
            **{
                key: _label(row[name], f"{path}, series {uid}: {name}")
                for key, name in zip(LOCATION_KEYS, LOCATIONS, strict=True)
            },
            "present": _label(row[PRESENT], f"{path}, series {uid}: {PRESENT}"),
        }

    @cached_property
    def _localizers(self) -> dict[str, list[tuple[str, str, str]]]:
        """Series uid -> (image uid, coordinates as written, location name)."""
        path = self.root / "train_localizers.csv"
        if not path.is_file():
            log.warning("%s is missing: lesions are known from masks only", path)
            return {}
        table = _read_csv(path, ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"])
        points: dict[str, list[tuple[str, str, str]]] = {}
        for row in table:
            point = row["SOPInstanceUID"], row["coordinates"], row["location"]
            points.setdefault(row["SeriesInstanceUID"], []).append(point)
        return points

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        return {str(row["series_uid"]): dict(row) for row in self._index.to_dict("records")}

    def _row(self, series_uid: str) -> dict[str, Any]:
        if series_uid not in self._rows:
            raise ReadError(f"{series_uid}: not in the index of {self.root} ({len(self._rows)} series).")
        return self._rows[series_uid]

    def _patient(self, series_uid: str) -> str:
        # Any image of the series names the patient; one series is one patient.
        first = next((p for p in sorted((self.root / "series" / series_uid).iterdir())), None)
        if first is None:
            return series_uid  # an empty folder: reading the case will say so
        try:
            return str(read_header(first).get("PatientID") or series_uid)
        except ReadError as error:
            log.warning("%s", error)
            return series_uid

    def _scan(self, series_uid: str, row: dict[str, Any]) -> tuple[Scan, SliceIndex]:
        groups = find_series(self.root / "series" / series_uid)
        if len(groups) > 1 and series_uid not in groups:
            raise ReadError(
                f"{self.root / 'series' / series_uid}: holds {len(groups)} series, none of them {series_uid}."
            )
        files = groups.get(series_uid) or next(iter(groups.values()))
        scan, slices = read_series_with_slices(files, row["modality"])
        age = None if np.isnan(row["age"]) else float(row["age"])
        scan = dataclasses.replace(
            scan,
            series_uid=series_uid,
            patient_id=row["patient_id"],
            age=scan.age if age is None else age,
            sex=row["sex"] or scan.sex,
        )
        return scan, slices

    def _mask_path(self, series_uid: str, kind: str) -> Path | None:
        folder = self.root / "segmentations"
        for place in (folder, folder / series_uid):
            for suffix in (".nii.gz", ".nii"):
                if (path := place / f"{series_uid}_{kind}{suffix}").is_file():
                    return path
        return None

    def _mask(self, series_uid: str, kind: str, grid: Grid, notes: list[str]) -> np.ndarray | None:
        path = self._mask_path(series_uid, kind)
        if path is None:
            return None
        try:
            return read_mask(path, grid)
        except ReadError as error:
            log.warning("%s; the case is used without this mask", error)
            notes.append(f"mask left out: {error}")
            return None

    def _points(self, series_uid: str, slices: SliceIndex, notes: list[str]) -> list[Lesion]:
        points = []
        for sop_uid, coordinates, location in self._localizers.get(series_uid, []):
            try:
                x, y, frame = parse_coordinates(coordinates)
                centre = slices.to_mm(sop_uid, x, y, frame)
            except ReadError as error:
                log.warning("%s: a localizer was left out: %s", series_uid, error)
                notes.append(f"localizer left out: {error}")
                continue
            if location not in LOCATIONS:
                notes.append(f"localizer with unknown location {location!r}")
            points.append(Lesion(centre, None, LOCATIONS.index(location) if location in LOCATIONS else None))
        return points


def parse_coordinates(text: str) -> tuple[float, float, int | None]:
    """Column, row and 0-based frame from a cell such as "{'x': 258.36, 'y': 261.36, 'f': 12}".

    Raises:
        ReadError: not a Python dict with finite numbers x and y.
    """
    try:
        point = ast.literal_eval(text)
        x, y = float(point["x"]), float(point["y"])
        frame = None if point.get("f") is None else round(float(point["f"]))
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ReadError(f"coordinates {text!r} are not of the form {{'x': 1.0, 'y': 2.0}}.") from error
    if not np.isfinite([x, y]).all():
        raise ReadError(f"coordinates {text!r} are not finite.")
    return x, y, frame


def measure_lesions(aneurysm: np.ndarray | None, grid: Grid) -> list[Lesion]:
    """Centroid (RAS mm) and radius of the sphere of equal volume (mm) of every id in a lesion mask."""
    lesions = []
    for k in np.unique(aneurysm[aneurysm > 0]) if aneurysm is not None else ():
        voxels = np.argwhere(aneurysm == k)
        radius = (3 * len(voxels) * grid.voxel_mm3 / (4 * np.pi)) ** (1 / 3)
        lesions.append(Lesion(grid.to_mm(voxels.mean(axis=0)), float(radius)))
    return lesions


def match_lesions(measured: list[Lesion], points: list[Lesion]) -> list[Lesion]:
    """Give measured lesions the locations of their points, one to one and nearest first.

    A point that lies more than `MATCH_MM` outside every measured lesion stays as a lesion of its own.
    """
    if not measured or not points:
        return measured or points
    distance = np.array([[np.linalg.norm(m.centre_mm - p.centre_mm) for p in points] for m in measured])
    reach = np.array([(m.radius_mm or 0) + MATCH_MM for m in measured])[:, None]
    rows, columns = linear_sum_assignment(np.where(distance <= reach, distance, 1e6))
    matched = {m: p for m, p in zip(rows, columns, strict=True) if distance[m, p] <= reach[m, 0]}
    lesions = [
        dataclasses.replace(lesion, location=points[matched[m]].location) if m in matched else lesion
        for m, lesion in enumerate(measured)
    ]
    return lesions + [point for p, point in enumerate(points) if p not in matched.values()]


def _read_csv(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """The rows of a table as they are written; empty cells are ''."""
    if not path.is_file():
        raise ReadError(f"{path} is missing. The root must be the folder that holds train.csv and series/.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = [{key: cell or "" for key, cell in row.items()} for row in reader]
    if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise ReadError(f"{path}: columns {missing} are missing; it has {reader.fieldnames}.")
    return rows


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _label(cell: str, what: str) -> float:
    value = _number(cell)
    if value not in (0, 1) and cell.strip() not in ("", "nan", "NaN"):
        raise ReadError(f"{what} must be 0, 1 or empty, found {cell!r}.")
    return value
