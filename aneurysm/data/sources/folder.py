"""A folder of scans, NIfTI, NRRD, MetaImage or DICOM, and a table of labels if there is one.

scans/
  labels.csv                       optional
  patient01/head_cta.nii.gz        a volume
  patient01/head_cta_vessel.nii.gz its vessel mask
  patient01/head_cta_aneurysm.nrrd its lesion mask
  patient02/dicom/*.dcm            a DICOM series
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aneurysm.data.dicom.modality import age_of, modality_of, sex_of
from aneurysm.data.dicom.series import read_series
from aneurysm.data.dicom.slices import read_header
from aneurysm.data.errors import ReadError
from aneurysm.data.formats.metaimage import SUFFIXES as META_SUFFIXES
from aneurysm.data.formats.metaimage import read_metaimage
from aneurysm.data.formats.nifti import read_mask, read_nifti, series_name
from aneurysm.data.labels import LOCATIONS, MODALITIES, PRESENT, UNNAMED_VESSEL
from aneurysm.data.scan import Case, Scan
from aneurysm.data.sources.folder_items import (
    LESION_SUFFIXES,
    VESSEL_SUFFIXES,
    Item,
    find_items,
    mask_beside,
    modality_in,
)
from aneurysm.data.sources.lesions import measure_lesions
from aneurysm.data.sources.people import parse_age, parse_sex
from aneurysm.data.sources.rsna_tables import parse_label, read_table
from aneurysm.data.tables import INDEX, LOCATION_KEYS

_COLUMNS = (
    "path", "series_uid", "patient_id", "modality", "age", "sex", "site", "present", "vessel_mask",
    "aneurysm_mask", PRESENT, *LOCATIONS, *LOCATION_KEYS,
)  # fmt: skip


class FolderSource:
    """Reads every volume file and every DICOM series below a folder.

    The uid of a series is its SeriesInstanceUID, or the file name; where two files have one name, the path.
    The patient is that of the table, else the PatientID of a DICOM series, else the first folder below
    `root` that the file lies in, else the file itself. The modality is that of the table, else `modality`,
    else what the DICOM header or the file name says.

    Masks lie beside their volume and have its name with `_vessel[s]`, `_cowseg`, `_aneurysm[s]` or
    `_lesion[s]` at its end, in any format; for a DICOM series they have its uid or the name of its folder.
    A 0/1 vessel mask becomes UNNAMED_VESSEL; a lesion mask holds k inside lesion k.

    The table has a row per scan: `path` (file or folder, relative to `root`) or `series_uid`, and any of
    patient_id, modality, age (years), sex, site, present (or `Aneurysm Present`), the 13 locations by their
    RSNA names or as location_0 ..., vessel_mask and aneurysm_mask (paths). Scans without a row are
    unlabelled. A table named labels.csv in `root` is read without being asked for.

    Args:
        labels: CSV table; None takes `root`/labels.csv when it is there.
        modality: CTA, MRA, T1 or T2, for scans that do not say it.
        site: where the table has none.

    The first use of the index raises ReadError: no scan here, a row of the table that fits no scan, columns
    that nobody reads, or a scan whose modality nothing tells.
    """

    def __init__(
        self,
        root: Path | str,
        labels: Path | str | None = None,
        modality: str | None = None,
        site: str = "folder",
    ) -> None:
        self.root = Path(root)
        self.labels = None if labels is None else Path(labels)
        self.modality = modality
        self.site = site
        if modality is not None and modality not in MODALITIES:
            raise ValueError(f"modality is one of {MODALITIES} or null, not {modality!r}.")

    def index(self) -> pd.DataFrame:
        """One row per scan (`tables.INDEX`)."""
        rows = [self._row(item) for item in self._items.values()]
        return INDEX.conform(pd.DataFrame(rows))

    def case(self, series_uid: str) -> Case:
        """A scan with its labels and masks.

        Raises:
            ReadError: no such scan, or its image or a mask cannot be read.
        """
        item = self._item(series_uid)
        row = self._row(item)
        scan = self._scan(item, row)
        notes = list(scan.notes)
        vessel = self._vessel(item, scan, notes)
        lesion_file = self._mask(item, "aneurysm_mask", LESION_SUFFIXES)
        aneurysm = None if lesion_file is None else read_mask(lesion_file, scan.grid, notes)
        lesions = measure_lesions(aneurysm, scan.grid)
        locations = np.array([row[key] for key in LOCATION_KEYS], np.float32)
        positive = np.flatnonzero(locations == 1)
        if len(lesions) == 1 and len(positive) == 1:
            lesions = [dataclasses.replace(lesions[0], location=int(positive[0]))]
        if aneurysm is not None and not lesions and row["present"] == 1:
            notes.append("labelled with an aneurysm but the lesion mask is empty")
        if lesions and row["present"] == 0:
            notes.append("labelled without aneurysm but the lesion mask marks one")
        return Case(
            scan=dataclasses.replace(scan, notes=tuple(notes)),
            vessel=vessel,
            aneurysm=aneurysm,
            lesions=tuple(lesions),
            present=None if np.isnan(row["present"]) else bool(row["present"]),
            locations=locations,
        )

    def fingerprint(self, series_uid: str) -> str:
        """A hash that changes when the files or the labels of a scan change on disk."""
        item = self._item(series_uid)
        masks = (
            self._mask(item, "vessel_mask", VESSEL_SUFFIXES),
            self._mask(item, "aneurysm_mask", LESION_SUFFIXES),
        )
        parts = [str(self._cells.get(item.uid, {}))]
        for path in (*(item.files or (item.path,)), *(m for m in masks if m is not None)):
            status = path.stat()
            parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def _items(self) -> dict[str, Item]:
        if not self.root.is_dir():
            raise ReadError(f"{self.root}: no such folder. Set data.root to the folder that holds the scans.")
        named = {p for row in self._table for key in ("vessel_mask", "aneurysm_mask") if (p := row.get(key))}
        return find_items(self.root, {self.root / name for name in named})

    @cached_property
    def _table(self) -> list[dict[str, str]]:
        path = self.labels or self.root / "labels.csv"
        if self.labels is None and not path.is_file():
            return []
        rows = read_table(path, [])
        names = set(rows[0]) if rows else set()
        if rows and not names & {"path", "series_uid"}:
            raise ReadError(f"{path}: needs a column path or series_uid; it has {sorted(names)}.")
        if unknown := sorted(names - set(_COLUMNS)):
            raise ReadError(f"{path}: nobody reads the columns {unknown}; known are {list(_COLUMNS)}.")
        return rows

    @cached_property
    def _cells(self) -> dict[str, dict[str, str]]:
        """Uid -> its row of the table."""
        by_path = {item.path.relative_to(self.root).as_posix(): uid for uid, item in self._items.items()}
        found: dict[str, dict[str, str]] = {}
        for row in self._table:
            place = row.get("path", "").replace("\\", "/").removeprefix("./").rstrip("/")
            uid = row.get("series_uid") or by_path.get(place) or (place if place in self._items else "")
            if uid not in self._items:
                raise ReadError(
                    f"{self.labels or self.root / 'labels.csv'}: no scan {row.get('series_uid') or place!r} "
                    f"in {self.root}; it has {', '.join(sorted(by_path)[:4])} ..."
                )
            if uid in found:
                raise ReadError(f"{self.labels or self.root / 'labels.csv'}: {uid} is listed twice.")
            found[uid] = row
        return found

    def _item(self, series_uid: str) -> Item:
        if series_uid not in self._items:
            raise ReadError(f"{series_uid}: not among the {len(self._items)} scans of {self.root}.")
        return self._items[series_uid]

    @cached_property
    def _headers(self) -> dict[str, Any]:
        """Uid -> header of the first file, for DICOM series."""
        return {uid: read_header(item.files[0]) for uid, item in self._items.items() if item.files}

    def _row(self, item: Item) -> dict[str, Any]:
        cells, header = self._cells.get(item.uid, {}), self._headers.get(item.uid)
        what = f"{self.labels or self.root / 'labels.csv'}, {item.uid}"
        labels = [
            parse_label(cells.get(name) or cells.get(key) or "", f"{what}: {name}")
            for name, key in zip(LOCATIONS, LOCATION_KEYS, strict=True)
        ]
        present = parse_label(cells.get("present") or cells.get(PRESENT) or "", f"{what}: present")
        age, sex = parse_age(cells.get("age", "")), parse_sex(cells.get("sex", ""))
        if header is not None:
            age = float(age_of(header) or np.nan) if np.isnan(age) else age
            sex = sex or sex_of(header) or ""
        return {
            "series_uid": item.uid,
            "patient_id": cells.get("patient_id") or self._patient(item, header),
            "modality": self._modality(item, cells, header),
            "age": age,
            "sex": sex,
            "site": cells.get("site") or self.site,
            **dict(zip(LOCATION_KEYS, labels, strict=True)),
            "present": present,
            "dataset": "folder",
            "lesions": 0.0 if present == 0 else np.nan,
            "has_vessel_mask": self._mask(item, "vessel_mask", VESSEL_SUFFIXES) is not None,
            "has_aneurysm_mask": self._mask(item, "aneurysm_mask", LESION_SUFFIXES) is not None,
            "path": item.path.relative_to(self.root).as_posix(),
            "note": "" if cells or not self._table else "no row in the table of labels",
        }

    def _patient(self, item: Item, header: Any) -> str:
        if header is not None and str(header.get("PatientID") or "").strip():
            return str(header.PatientID).strip()
        parts = item.path.relative_to(self.root).parts
        return parts[0] if len(parts) > 1 or (item.files and parts) else item.uid

    def _modality(self, item: Item, cells: Mapping[str, str], header: Any) -> str:
        stated = cells.get("modality", "").strip().upper()
        if stated:
            if (known := modality_in(stated)) is None:
                raise ReadError(f"{item.uid}: modality {stated!r} in the table; expected {MODALITIES}.")
            return known
        if self.modality is not None:
            return self.modality
        if header is not None:
            return modality_of(header, item.uid)[0]
        parts = item.path.relative_to(self.root).with_name(series_name(item.path)).parts
        for part in reversed(parts):  # the file's own name first, then its folders
            if (named := modality_in(part)) is not None:
                return named
        raise ReadError(
            f"{item.path}: nothing tells how it was acquired. Add a column modality to the table of labels, "
            "or set modality to CTA, MRA, T1 or T2."
        )

    def _scan(self, item: Item, row: Mapping[str, Any]) -> Scan:
        if item.files:
            scan = read_series(list(item.files), row["modality"])
        elif item.path.name.lower().endswith(META_SUFFIXES):
            scan = read_metaimage(item.path, row["modality"])
        else:
            scan = read_nifti(item.path, row["modality"])
        return dataclasses.replace(
            scan,
            series_uid=item.uid,
            patient_id=row["patient_id"],
            age=None if np.isnan(row["age"]) else float(row["age"]),
            sex=row["sex"] or None,
        )

    def _mask(self, item: Item, column: str, suffixes: tuple[str, ...]) -> Path | None:
        if named := self._cells.get(item.uid, {}).get(column):
            path = self.root / named
            if not path.is_file():
                raise ReadError(f"{path}: no such file; the table names it as {column} of {item.uid}.")
            return path
        return mask_beside(item, suffixes)

    def _vessel(self, item: Item, scan: Scan, notes: list[str]) -> np.ndarray | None:
        path = self._mask(item, "vessel_mask", VESSEL_SUFFIXES)
        if path is None:
            return None
        labels = read_mask(path, scan.grid, notes)
        if labels.max() > UNNAMED_VESSEL:
            raise ReadError(
                f"{path}: vessel label {labels.max()}, expected the RSNA numbers 1 to 13 or 0/1. "
                "Renumber them."
            )
        return labels * np.uint8(UNNAMED_VESSEL) if labels.max() == 1 else labels
