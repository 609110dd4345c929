"""Ages, sexes and groups of a BIDS data set: participants.tsv, its JSON, sessions.tsv and sidecars."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from aneurysm.data.errors import ReadError
from aneurysm.data.sources.people import parse_age, parse_sex

log = logging.getLogger(__name__)

_GROUPS = {
    "control": 0.0, "controls": 0.0, "healthy": 0.0, "hc": 0.0,
    "patient": 1.0, "patients": 1.0, "aneurysm": 1.0,
}  # fmt: skip
_SEX_COLUMNS, _AGE_COLUMNS = ("sex", "gender"), ("age", "age_at_scan", "age_years")
_UNITS = {"y": "y", "m": "m", "w": "w", "d": "d"}


@dataclass(frozen=True)
class Person:
    """What the tables say about the subject of a session."""

    age: float = math.nan  # years
    sex: str = ""  # M, F or empty
    site: str = ""
    diseased: float = math.nan  # group: 0 control, 1 patient


class Participants:
    """Looks a subject up; every table may be missing, and every cell may be 'n/a'.

    A subject may have a row per session (column `session_id`, or `exam_date` as in ds003949); the row of the
    session counts, else the first. `sub-*/sub-*_sessions.tsv` comes before participants.tsv, a sidecar's
    PatientAge and PatientSex after it.

    Raises:
        ReadError: participants.tsv without column participant_id, or not text.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / "participants.tsv"
        self._rows: dict[str, list[dict[str, str]]] = {}
        self._sex_codes: dict[str, str] = {}
        self._age_unit = "y"
        if not path.is_file():
            log.warning("%s is missing: ages, sexes and controls are unknown", path)
            return
        for row in _read_tsv(path, "participant_id"):
            name = row["participant_id"]
            self._rows.setdefault(name if name.startswith("sub-") else f"sub-{name}", []).append(row)
        described = _read_json(path.with_suffix(".json"))
        lower = {str(k).lower(): v for k, v in described.items() if isinstance(v, dict)}
        for column in _SEX_COLUMNS:
            levels = lower.get(column, {}).get("Levels")
            if isinstance(levels, dict):
                self._sex_codes |= {str(code): _level(meaning) for code, meaning in levels.items()}
        for column in _AGE_COLUMNS:
            unit = str(lower.get(column, {}).get("Units", "y")).strip().lower()[:1]
            self._age_unit = _UNITS.get(unit, "y") if column in lower else self._age_unit

    def person(self, subject: str, session: str, sidecar: dict[str, Any] | None = None) -> Person:
        """What is known of `sub-...` at `ses-...` (or '')."""
        rows = self._rows.get(subject, [])
        date = session.removeprefix("ses-")
        own = [
            r for r in rows if session and date in (r.get("exam_date"), r.get("session_id", "")[-len(date) :])
        ]
        places = [self._session(subject, session), *(own or rows)[:1]]
        ages = [parse_age(_first(place, _AGE_COLUMNS), self._age_unit) for place in places]
        sexes = [parse_sex(_first(place, _SEX_COLUMNS), self._sex_codes) for place in places]
        if sidecar:
            ages.append(parse_age(sidecar.get("PatientAge", "")))
            sexes.append(parse_sex(sidecar.get("PatientSex", "")))
        groups = [_GROUPS.get(place.get("group", "").lower(), math.nan) for place in places]
        site = next((s for place in places if (s := _first(place, ("site", "institution", "center")))), "")
        return Person(
            age=next((a for a in ages if not math.isnan(a)), math.nan),
            sex=next((s for s in sexes if s), ""),
            site=site,
            diseased=next((g for g in groups if not math.isnan(g)), math.nan),
        )

    def _session(self, subject: str, session: str) -> dict[str, str]:
        path = self.root / subject / f"{subject}_sessions.tsv"
        if not session or not path.is_file():
            return {}
        found = [row for row in _read_tsv(path, "session_id") if row["session_id"] in (session, session[4:])]
        return found[0] if found else {}


def read_sidecar(image: Path) -> dict[str, Any]:
    """The JSON beside an image, {} when there is none."""
    return _read_json(image.with_name(image.name.split(".")[0] + ".json"))


def _first(row: dict[str, str], columns: tuple[str, ...]) -> str:
    return next((row[c] for c in columns if row.get(c, "") not in ("", "n/a")), "")


def _level(meaning: Any) -> str:
    """BIDS allows a text, or an object with a description."""
    return str(meaning.get("Description", "") if isinstance(meaning, dict) else meaning)


def _read_tsv(path: Path, key: str) -> list[dict[str, str]]:
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ReadError(f"{path}: not a tab-separated table in UTF-8 ({error}). Save it again.") from error
    table.columns = [str(column).strip().lower() for column in table.columns]
    if key not in table.columns:
        raise ReadError(f"{path}: column {key} is missing; it has {list(table.columns)}.")
    return [{str(k): str(v).strip() for k, v in row.items()} for row in table.to_dict("records")]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        log.warning("%s: not readable as JSON (%s); it was passed over", path, error)
        return {}
    return content if isinstance(content, dict) else {}
