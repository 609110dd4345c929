"""The RSNA 2025 intracranial aneurysm data set as it lies on disk: series, labels, points, vessel masks."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aneurysm.data.dicom.series import find_series, read_series_with_slices
from aneurysm.data.dicom.slices import SliceIndex, read_header
from aneurysm.data.errors import ReadError
from aneurysm.data.formats.nifti import read_mask
from aneurysm.data.labels import LOCATIONS, PRESENT, UNNAMED_VESSEL
from aneurysm.data.preparation.extents import dicom_extent
from aneurysm.data.preparation.workload import Extent
from aneurysm.data.scan import Case, Grid, Lesion, Scan
from aneurysm.data.sources.lesions import match_lesions, measure_lesions, merge_points
from aneurysm.data.sources.people import parse_age, parse_sex
from aneurysm.data.sources.rsna_tables import (
    MODALITY_NAMES,
    Localizer,
    contradictions,
    modality_named,
    parse_coordinates,
    parse_label,
    read_localizers,
    read_train,
)
from aneurysm.data.tables import INDEX, LOCATION_KEYS

__all__ = ["MODALITY_NAMES", "RsnaSource", "match_lesions", "measure_lesions", "parse_coordinates"]

log = logging.getLogger(__name__)

# What anonymisers put in the place of every PatientID: series that share it are not of one patient.
PLACEHOLDER_IDS = {
    "", "anon", "anonymous", "anonymized", "anonymised", "deidentified", "unknown", "none", "removed", "na",
    "n/a", "0", "xxxx",
}  # fmt: skip


class RsnaSource:
    """Reads `series/<uid>/*.dcm`, `train.csv`, `train_localizers.csv` and `segmentations/`.

    Vessel labels are `segmentations/<uid>_cowseg.nii[.gz]` or `segmentations/<uid>/<uid>_cowseg.nii[.gz]`;
    lesion masks, which only our own data sets have, are `..._aneurysm.nii[.gz]` (k inside lesion k).
    Empty label cells mean unknown (NaN). Series without a folder are logged and left out of the index, and
    so are folders without a row. What labels and localizers say against each other is in column `note`.

    Args:
        site: goes into column `site`.
        exclude: series to leave out, or a file that lists them (first column, one per line).

    The first use of the index raises ReadError when the root, train.csv or one of its columns is missing.
    """

    dataset = "rsna"

    def __init__(
        self, root: Path | str, site: str = "rsna", exclude: Sequence[str] | Path | str | None = None
    ) -> None:
        self.root = Path(root)
        self.site = site
        self.exclude = exclude

    def index(self) -> pd.DataFrame:
        """One row per series on disk (`tables.INDEX`); patients by the PatientID tag of the first image."""
        return self._index.copy()

    def case(self, series_uid: str) -> Case:
        """A scan with its vessel labels, lesions and locations.

        Lesions come from the lesion mask (centroid, and radius of the sphere of equal volume) with the
        location of the nearest point; points without a mask give lesions without a radius. Points at one
        place are one aneurysm. In a series that is labelled negative there are none. What could not be used
        (a mask that does not fit, a point on a missing image) is in `scan.notes`.

        Raises:
            ReadError: the series is not in the index or its images cannot be read.
        """
        row = self._row(series_uid)
        scan, slices = self._scan(series_uid, row)
        notes = list(scan.notes)
        vessel = self._mask(series_uid, "cowseg", scan.grid, notes)
        aneurysm = self._mask(series_uid, "aneurysm", scan.grid, notes)
        locations = np.array([row[key] for key in LOCATION_KEYS], np.float32)
        if row["present"] == 0:
            points = []
        else:
            points = merge_points(self._points(series_uid, scan, slices, notes), locations, notes)
        notes += [note for note in self._odd(row) if note not in notes]
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
        table = read_train(path)
        listed = [row["SeriesInstanceUID"] for row in table]
        on_disk = {p.name for p in (self.root / "series").glob("*") if p.is_dir()}
        _log_some("%s lists %d series without a folder in series/; left out: %s", path, set(listed) - on_disk)
        _log_some("%s does not list %d folders of series/; left out: %s", path, on_disk - set(listed))
        stray = set(self._localizers) - set(listed)
        _log_some("%s: %d series are not in train.csv: %s", self.root / "train_localizers.csv", stray)
        excluded = self._excluded
        _log_some("%s: %d series to exclude are not there: %s", path, excluded - set(listed))
        kept = [row for row in table if row["SeriesInstanceUID"] in on_disk - excluded]
        if not kept:
            raise ReadError(f"{self.root / 'series'}: none of the {len(listed)} series of train.csv is here.")
        return INDEX.conform(pd.DataFrame([self._indexed(row, path) for row in kept]))

    @cached_property
    def _excluded(self) -> set[str]:
        if self.exclude is None:
            return set()
        if not isinstance(self.exclude, str | Path):
            return {str(uid) for uid in self.exclude}
        path = Path(self.exclude)
        if not path.is_file():
            raise ReadError(f"{path}: no such file; `exclude` is a list of series or a file that lists them.")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return {line.split(",")[0].strip() for line in lines if line.strip()}

    def _indexed(self, row: dict[str, str], path: Path) -> dict[str, Any]:
        """A row of train.csv as a row of the index."""
        uid = row["SeriesInstanceUID"]
        labels = [parse_label(row[name], f"{path}, series {uid}: {name}") for name in LOCATIONS]
        present = parse_label(row[PRESENT], f"{path}, series {uid}: {PRESENT}")
        points = self._localizers.get(uid, [])
        has_mask = self._mask_path(uid, "aneurysm") is not None
        places = len({(p.sop_uid, p.coordinates) for p in points})
        indexed = {
            "series_uid": uid,
            "patient_id": self._patient(uid),
            "modality": modality_named(row["Modality"]),
            "age": parse_age(row.get("PatientAge", "")),
            "sex": parse_sex(row.get("PatientSex", "")),
            "site": self.site,
            **dict(zip(LOCATION_KEYS, labels, strict=True)),
            "present": present,
            "dataset": self.dataset,
            "lesions": 0.0 if present == 0 else float(places or np.nan),
            "has_vessel_mask": self._mask_path(uid, "cowseg") is not None,
            "has_aneurysm_mask": has_mask,
            "path": f"series/{uid}",
        }
        return {**indexed, "note": "; ".join(self._odd(indexed))}

    def _odd(self, row: dict[str, Any]) -> list[str]:
        """What the tables say against each other about a row of the index."""
        labels = [row[key] for key in LOCATION_KEYS]
        if not self._localizers:  # no table of points: their absence says nothing
            return contradictions(row["present"], labels, [], True)
        points = self._localizers.get(str(row["series_uid"]), [])
        return contradictions(row["present"], labels, points, bool(row["has_aneurysm_mask"]))

    @cached_property
    def _localizers(self) -> dict[str, list[Localizer]]:
        """Series uid -> its points."""
        path = self.root / "train_localizers.csv"
        if not path.is_file():
            log.warning("%s is missing: lesions are known from masks only", path)
            return {}
        return read_localizers(path)

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        return {str(row["series_uid"]): dict(row) for row in self._index.to_dict("records")}

    def _row(self, series_uid: str) -> dict[str, Any]:
        if series_uid not in self._rows:
            raise ReadError(f"{series_uid}: not in the index of {self.root} ({len(self._rows)} series).")
        return self._rows[series_uid]

    def _patient(self, series_uid: str) -> str:
        # Any image of the series names the patient; one series is one patient.
        files = sorted(p for p in (self.root / "series" / series_uid).iterdir() if p.is_file())
        first = next((p for p in files if p.suffix.lower() == ".dcm"), files[0] if files else None)
        if first is None:
            return series_uid  # an empty folder: reading the case will say so
        try:
            patient = str(read_header(first).get("PatientID") or "").strip()
            return series_uid if patient.lower() in PLACEHOLDER_IDS else patient
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
            mask = read_mask(path, grid, notes)
            if kind == "cowseg" and mask.max() > UNNAMED_VESSEL:
                raise ReadError(f"{path}: vessel label {mask.max()}, expected 0 to 13. Renumber the vessels.")
            return mask
        except ReadError as error:
            log.warning("%s; the case is used without this mask", error)
            notes.append(f"mask left out: {error}")
            return None

    def _points(self, series_uid: str, scan: Scan, slices: SliceIndex, notes: list[str]) -> list[Lesion]:
        points = []
        for point in self._localizers.get(series_uid, []):
            try:
                x, y, frame = parse_coordinates(point.coordinates)
                centre = slices.to_mm(point.sop_uid, x, y, frame)
                index = scan.source.to_index(centre)
                if (index < -1).any() or (index > np.array(scan.source.shape)).any():
                    raise ReadError(
                        f"{point.coordinates} on image {point.sop_uid} lies outside the volume; the image is "
                        "a scout that was dropped, or the coordinates are wrong."
                    )
            except ReadError as error:
                log.warning("%s: a localizer was left out: %s", series_uid, error)
                notes.append(f"localizer left out: {error}")
                continue
            place = LOCATIONS.index(point.location) if point.location in LOCATIONS else None
            points.append(Lesion(centre, None, place))
        return points


def _log_some(message: str, path: Path, uids: set[str]) -> None:
    if uids:
        more = " ..." if len(uids) > 3 else ""
        log.warning(message, path, len(uids), ", ".join(sorted(uids)[:3]) + more)
