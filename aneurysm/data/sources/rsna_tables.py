"""The tables of RSNA 2025 (train.csv, train_localizers.csv), with the faults that they are known to have.

Every cell is read as text: identifiers are not numbers, coordinates are Python dicts in single quotes.
"""

import ast
import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aneurysm.data.errors import ReadError
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS

MODALITY_NAMES = {"CTA": "CTA", "MRA": "MRA", "MRI T2": "T2", "MRI T1post": "T1"}
_SPELLED = {
    **{name.lower().replace(" ", ""): modality for name, modality in MODALITY_NAMES.items()},
    "mrit1": "T1", "t1post": "T1", "t1": "T1", "t2": "T2",
}  # fmt: skip


@dataclass(frozen=True)
class Localizer:
    """A row of train_localizers.csv as it is written."""

    sop_uid: str
    coordinates: str  # "{'x': 258.36, 'y': 261.36}", in multi-frame series with 'f', the 0-based frame
    location: str  # one of LOCATIONS, or empty


def read_train(path: Path) -> list[dict[str, str]]:
    """The rows of train.csv; identifiers without the blanks around them.

    Raises:
        ReadError: missing, without a needed column, a series listed twice, or an unknown modality.
    """
    rows = read_table(path, ["SeriesInstanceUID", "Modality", *LABEL_COLUMNS])
    listed = [row["SeriesInstanceUID"] for row in rows]
    if repeated := sorted(uid for uid, count in Counter(listed).items() if count > 1):
        raise ReadError(
            f"{path}: {len(repeated)} series are listed twice, first {repeated[0]}. Keep one row of each."
        )
    if unknown := sorted({row["Modality"] for row in rows if modality_named(row["Modality"]) is None}):
        raise ReadError(f"{path}: unknown Modality {unknown}; expected {sorted(MODALITY_NAMES)}.")
    return rows


def read_localizers(path: Path) -> dict[str, list[Localizer]]:
    """Series uid -> its localizers; a row that is there twice counts once.

    Raises:
        ReadError: missing, or without a needed column.
    """
    points: dict[str, dict[Localizer, None]] = {}
    for row in read_table(path, ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]):
        point = Localizer(row["SOPInstanceUID"], row["coordinates"], row["location"])
        points.setdefault(row["SeriesInstanceUID"], {})[point] = None
    return {uid: list(found) for uid, found in points.items()}


def read_table(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """The rows of a CSV table as text without surrounding blanks; empty cells are ''.

    Raises:
        ReadError: missing, not text, or without one of the columns.
    """
    if not path.is_file():
        raise ReadError(f"{path} is missing. The root must be the folder that holds train.csv and series/.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = [{key: (cell or "").strip() for key, cell in row.items() if key} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReadError(f"{path}: not a CSV table in UTF-8 ({error}). Save it again as CSV UTF-8.") from error
    if missing := [column for column in columns if column not in names]:
        raise ReadError(f"{path}: columns {missing} are missing; it has {names}.")
    return rows


def modality_named(text: str) -> str | None:
    """CTA, MRA, T1 or T2 from 'MRI T1post' and the like; None when it is none of them."""
    return _SPELLED.get("".join(text.lower().replace("-", " ").replace("_", " ").split()))


def parse_label(cell: str, what: str) -> float:
    """0, 1, or NaN of an empty cell.

    Raises:
        ReadError: anything else; the message begins with `what`.
    """
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if value not in (0, 1) and cell.lower() not in ("", "nan", "n/a", "na"):
        raise ReadError(f"{what} must be 0, 1 or empty, found {cell!r}.")
    return value


def parse_coordinates(text: str) -> tuple[float, float, int | None]:
    """Column, row and 0-based frame from a cell such as "{'x': 258.36, 'y': 261.36, 'f': 12}".

    Raises:
        ReadError: not a Python dict with finite numbers x and y.
    """
    try:
        point = ast.literal_eval(text)
        x, y = float(point["x"]), float(point["y"])
        frame = None if point.get("f") is None else round(float(point["f"]))
    except (
        ValueError,
        SyntaxError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        MemoryError,
    ) as error:
        raise ReadError(f"coordinates {text!r} are not of the form {{'x': 1.0, 'y': 2.0}}.") from error
    if not np.isfinite([x, y]).all():
        raise ReadError(f"coordinates {text!r} are not finite.")
    return x, y, frame


def contradictions(
    present: float, locations: Sequence[float], points: Sequence[Localizer], has_mask: bool
) -> list[str]:
    """What the labels and the localizers of one series say against each other, one sentence each.

    Args:
        present: 0, 1 or NaN.
        locations: 13 of 0, 1 or NaN.
        has_mask: a lesion mask lies beside the series, so that a missing point is no loss.
    """
    found = []
    named = {p.location for p in points}
    positive = {name for name, value in zip(LOCATIONS, locations, strict=True) if value == 1}
    negative = {name for name, value in zip(LOCATIONS, locations, strict=True) if value == 0}
    if present == 0 and positive:
        found.append(f"labelled without aneurysm but with one at {', '.join(sorted(positive))}")
    if present == 1 and len(negative) == len(LOCATIONS):
        found.append("labelled with an aneurysm but at no location")
    if present == 1 and not points and not has_mask:
        found.append("labelled with an aneurysm but without a localizer")
    if present == 0 and points:
        found.append(f"labelled without aneurysm but has {len(points)} localizer(s), which were left out")
    elif points:
        if against := sorted(named & negative):
            found.append(f"a localizer at {', '.join(against)}, where the label says 0")
        if without := sorted(positive - named):
            found.append(f"no localizer for {', '.join(without)}")
    if strange := sorted(named - set(LOCATIONS) - {""}):
        found.append(f"localizer with unknown location {', '.join(map(repr, strange))}")
    places: dict[tuple[str, str], set[str]] = {}
    for p in points:
        places.setdefault((p.sop_uid, p.coordinates), set()).add(p.location)
    for (_, coordinates), names in places.items():
        if len(names) > 1:
            found.append(f"one point {coordinates} with {len(names)} locations: {', '.join(sorted(names))}")
        try:
            parse_coordinates(coordinates)
        except ReadError as error:
            found.append(f"localizer left out: {error}")
    return found
