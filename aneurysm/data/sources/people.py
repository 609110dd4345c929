"""Ages and sexes as hospitals, anonymisers and spreadsheets write them."""

import math
import re
from collections.abc import Mapping

_PER_YEAR = {"y": 1.0, "m": 12.0, "w": 52.18, "d": 365.25}
_AGE = re.compile(
    r"[<>≥≤~]?=?\s*(\d+(?:[.,]\d+)?)\s*(?:\+|and over|or older)?\s*"
    r"(y|yr|yrs|years?|yo|m|mo|months?|w|weeks?|d|days?)?\.?(?:\s*old)?\s*\+?"
)
_OLDEST = 120.0
_SEX = {
    "m": "M", "male": "M", "man": "M", "boy": "M", "f": "F", "female": "F", "woman": "F", "girl": "F",
    "w": "F", "h": "M", "homme": "M", "femme": "F", "männlich": "M", "weiblich": "F",
}  # fmt: skip


def parse_age(text: object, unit: str = "y") -> float:
    """Age in years from '63', '063Y', '18 months', '90+', '>89' or '45,5'; NaN when it says nothing.

    A bound ('90+') becomes its number. Zero and ages above 120 are codes for 'removed' or 'unknown'.

    Args:
        unit: of a bare number: y, m, w or d.
    """
    match = _AGE.fullmatch(str(text).strip().lower())
    if not match:
        return math.nan
    age = float(match[1].replace(",", ".")) / _PER_YEAR[(match[2] or unit)[0]]
    return age if 0 < age <= _OLDEST else math.nan


def parse_sex(text: object, codes: Mapping[str, str] | None = None) -> str:
    """'M', 'F' or '' when it says nothing or something else ('O', 'n/a').

    Args:
        codes: what a data set says its codes mean, such as {'1': 'male', '2': 'female'}. A bare number
            without them is unknown: 0/1 and 1/2 are both in use, either way round.
    """
    word = str(text).strip()
    if codes and word in codes:
        word = codes[word]
    return _SEX.get(word.strip().lower().split(" ")[0], "")
