"""The two tables of an RSNA data set, read so that a wrong cell is a finding and not the end."""

import csv
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aneurysm.check.findings import Collector
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, PRESENT
from aneurysm.data.sources.people import parse_age, parse_sex
from aneurysm.data.sources.rsna_tables import MODALITY_NAMES, modality_named

_UNKNOWN: Final = ("", "nan", "na", "n/a", "none")


@dataclass(frozen=True)
class RsnaTables:
    """Rows as written; a series that is listed twice keeps its first row."""

    rows: dict[str, dict[str, str]]  # series uid -> row of train.csv
    points: dict[str, list[dict[str, str]]]  # series uid -> rows of train_localizers.csv
    findings: list[Collector] = field(default_factory=list)  # about the tables as a whole

    def modality(self, uid: str) -> str | None:
        """CTA, MRA, T1 or T2, or None when the row does not say so."""
        return modality_named(self.rows.get(uid, {}).get("Modality", ""))


def read_rsna_tables(root: Path) -> RsnaTables:
    """Read train.csv and train_localizers.csv; what is missing or listed twice is among the findings."""
    whole = Collector("")
    repeated: list[Collector] = []
    rows: dict[str, dict[str, str]] = {}
    listed: Counter[str] = Counter()
    needed = ("SeriesInstanceUID", "Modality", *LABEL_COLUMNS)
    for row in _rows(root / "train.csv", needed, whole, "table-missing"):
        uid = row.get("SeriesInstanceUID", "")
        listed[uid] += 1
        rows.setdefault(uid, row)
    for uid, count in listed.items():
        if count > 1:
            repeated.append(Collector(uid))
            repeated[-1].add("duplicate-row", f"train.csv lists it {count} times.")
    points: dict[str, list[dict[str, str]]] = {}
    needed = ("SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location")
    for row in _rows(root / "train_localizers.csv", needed, whole, "localizers-missing"):
        points.setdefault(row.get("SeriesInstanceUID", ""), []).append(row)
    return RsnaTables(rows, points, [whole, *repeated])


def _rows(path: Path, needed: tuple[str, ...], found: Collector, missing_code: str) -> list[dict[str, str]]:
    if not path.is_file():
        found.add(missing_code, f"{path} does not exist.")
        return []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        rows = [{key: str(cell or "").strip() for key, cell in row.items() if key} for row in reader]
    try:
        path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:  # the reader refuses the whole table
        found.add("bad-table", f"{path}: {error}.")
    if missing := [name for name in needed if name not in columns]:
        found.add("column-missing", f"{path} lacks {missing}; it has {columns[:20]}.")
    return rows


def check_row(row: dict[str, str], dicom_modality: str, header_age: float | None, found: Collector) -> None:
    """One row of train.csv against itself and against the DICOM header.

    Args:
        dicom_modality: the header's Modality (CT, MR), "" when absent.
        header_age: years, None when absent.
    """
    name = row.get("Modality", "")
    if "Modality" in row and modality_named(name) is None:
        found.add("unknown-modality", f"Modality is {name!r}; expected one of {sorted(MODALITY_NAMES)}.")
    elif (
        name
        and dicom_modality in ("CT", "MR")
        and (modality_named(name) == "CTA") != (dicom_modality == "CT")
    ):
        found.add("modality-mismatch", f"train.csv says {name} but the images are {dicom_modality}.")
    check_person(row, header_age, found)
    wrong = {key: row[key] for key in LABEL_COLUMNS if key in row and _label(row[key]) is None}
    for key, cell in wrong.items():
        if cell.strip().lower() not in _UNKNOWN:
            found.add("bad-label", f"{key} is {cell!r}.")
    present = _label(row.get(PRESENT, ""))
    values = {key: _label(row.get(key, "")) for key in LOCATIONS}
    positive = [key for key, value in values.items() if value == 1]
    if present == 0 and positive:
        found.add("location-without-present", f"{PRESENT} is 0 but {_listed(positive)} is 1.")
    if present == 1 and not positive and None not in values.values():
        found.add("present-without-location", f"{PRESENT} is 1 but all 13 locations are 0.")


def check_person(row: dict[str, str], header_age: float | None, found: Collector) -> None:
    """Age and sex of a row of train.csv or participants.tsv."""
    cell = row.get("PatientAge", "").strip()
    if cell.lower() not in _UNKNOWN:
        age = parse_age(cell)
        if math.isnan(age):
            if cell.rstrip("Yy").strip("0."):  # zero is a code for unknown
                found.add("impossible-age", f"PatientAge is {cell!r}.")
        # A birthday between scan and export makes one year; more is another patient.
        elif header_age is not None and abs(age - header_age) > 2:
            found.add("age-contradiction", f"The table says {age:g} years, the header {header_age:g}.")
    sex = row.get("PatientSex", "").strip()
    if not parse_sex(sex) and sex.lower() not in (*_UNKNOWN, "o", "other"):
        found.add("unknown-sex", f"PatientSex is {sex!r}.")


def check_points_against_row(
    row: dict[str, str], points: tuple[dict[str, str], ...], found: Collector
) -> None:
    """Localizers of one series against its labels and each other (not against the images)."""
    present = _label(row.get(PRESENT, ""))
    values = {key: _label(row.get(key, "")) for key in LOCATIONS}
    if present == 1 and not points:
        found.add("positive-without-localizer", f"{PRESENT} is 1, but train_localizers.csv has no point.")
    if present == 0 and points:
        found.add(
            "localizer-in-negative", f"{PRESENT} is 0, but train_localizers.csv has {len(points)} point(s)."
        )
    named = {point.get("location", "") for point in points}
    for name in sorted(named):
        if name and name not in LOCATIONS:
            found.add("localizer-unknown-location", f"location is {name!r}.")
        elif present != 0 and values.get(name) == 0:
            found.add("localizer-not-in-labels", f"A point lies in {name}, whose column is 0.")
    without = [key for key, value in values.items() if value == 1 and key not in named]
    if points and without and named <= set(LOCATIONS):
        found.add("location-without-localizer", f"{_listed(without)} is 1, but no point lies there.")
    check_repeated_points(points, found)


def check_repeated_points(points: tuple[dict[str, str], ...], found: Collector) -> None:
    """The same point twice, with the same or with another location."""
    places: dict[tuple[str, str], list[str]] = {}
    for point in points:
        place = point.get("SOPInstanceUID", ""), point.get("coordinates", "")
        places.setdefault(place, []).append(point.get("location", ""))
    for (_, coordinates), names in places.items():
        if len(set(names)) > 1:
            found.add("localizer-two-locations", f"{coordinates} is both {_listed(sorted(set(names)))}.")
        elif len(names) > 1:
            found.add("duplicate-localizer", f"{coordinates} ({names[0]}) is listed {len(names)} times.")


def _label(cell: str) -> int | None:
    """0, 1, or None for anything else."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return int(value) if value in (0, 1) else None


def _listed(names: list[str]) -> str:
    return ", ".join(names)
