"""A case before it is opened: its files, and what the data set and the file names say about it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KINDS: Final = ("rsna", "bids", "dicom", "volumes")
VOLUME_SUFFIXES: Final = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
MASK_NAME: Final = re.compile(
    r"(?:^|[_\-. ])(?:mask|seg|cowseg|label|labels|aneurysm|lesion|vessels?)(?:[_\-. \d]|$)", re.I
)
LESION_NAME: Final = re.compile(r"lesion|aneurysm", re.I)
VESSEL_NAME: Final = re.compile(r"vessel|arter|cow", re.I)
# Names that technicians and data sets use; a bare "mr" does not tell which contrast it is.
_MODALITY: Final = (
    ("MRA", re.compile(r"(?:^|[_\-. ])(?:mra|tof|angio)", re.I)),
    ("CTA", re.compile(r"(?:^|[_\-. ])cta?(?:[_\-. ]|$)", re.I)),
    ("T2", re.compile(r"(?:^|[_\-. ])t2", re.I)),
    ("T1", re.compile(r"(?:^|[_\-. ])(?:t1|mprage|gd|mr_gd)", re.I)),
)


@dataclass(frozen=True)
class Item:
    """One case to check: all that a worker process needs, and nothing read yet."""

    kind: str  # of KINDS
    series_uid: str  # series UID, or file name without its suffix
    files: tuple[Path, ...]  # DICOM: every file of the folder; else the image
    modality: str | None = None  # as the data set says; None: guess
    row: dict[str, str] | None = None  # of train.csv
    points: tuple[dict[str, str], ...] = ()  # rows of train_localizers.csv
    vessels: tuple[Path, ...] = ()  # vessel label files
    lesions: tuple[Path, ...] = ()  # lesion mask files
    patient_id: str = ""
    sex: str = ""


def stem(path: Path) -> str:
    """File name without the ending of a volume."""
    ending = next(
        (s for s in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), ""
    )
    return path.name[: len(path.name) - len(ending)]


def modality_in(name: str) -> str | None:
    """CTA, MRA, T1 or T2 when a file name tells."""
    return next((modality for modality, pattern in _MODALITY if pattern.search(name)), None)
