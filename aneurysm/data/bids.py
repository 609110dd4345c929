"""BIDS data sets of angiographies, laid out as OpenNeuro ds003949 (Lausanne TOF-MRA aneurysms) is.

participants.tsv
sub-013/ses-20101220/anat/sub-013_ses-20101220_angio.nii.gz
derivatives/manual_masks/sub-013/ses-20101220/anat/sub-013_ses-20101220_desc-Lesion_1_mask.nii.gz
"""

import dataclasses
import hashlib
import logging
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from aneurysm.data.errors import ReadError
from aneurysm.data.extents import nifti_extent
from aneurysm.data.labels import LOCATIONS, UNNAMED_VESSEL
from aneurysm.data.nifti import read_mask, read_nifti, series_name
from aneurysm.data.rsna import measure_lesions
from aneurysm.data.scan import Case, Grid
from aneurysm.data.tables import INDEX, LOCATION_KEYS
from aneurysm.data.workload import Extent

log = logging.getLogger(__name__)

_SUFFIXES = {"angio": "MRA", "T1w": "T1", "T2w": "T2"}
_LABEL_FILE = re.compile(r"mask|seg|label", re.IGNORECASE)
_LESION = re.compile(r"lesion|aneurysm", re.IGNORECASE)
_VESSEL = re.compile(r"vessel|arter|cow", re.IGNORECASE)
_GROUPS = {"control": 0.0, "healthy": 0.0, "patient": 1.0, "aneurysm": 1.0}


class BidsSource:
    """Reads `sub-*/[ses-*/]anat/*_{angio,T1w,T2w}.nii.gz` with the masks under `derivatives/`.

    One series per image; its uid is the file name. A mask belongs to the angiography of its subject and
    session: `*desc-Lesion*_mask` or `*aneurysm*` files are lesions (one file each), `*vessel*`, `*artery*` or
    `*cow*` label files are vessels (RSNA numbering; a 0/1 mask becomes UNNAMED_VESSEL). A series has an
    aneurysm when its session has a lesion mask; without one, column `group` of participants.tsv (control,
    patient) decides; otherwise that is unknown. Locations are 0 in controls and otherwise unknown.

    Args:
        contrast: CTA when the `angio` images are CT angiographies.

    The first use of the index raises ReadError when the folder is missing or holds no such image.
    """

    def __init__(
        self, root: Path | str, site: str = "bids", suffixes: list[str] | None = None, contrast: str = "MRA"
    ) -> None:
        self.root = Path(root)
        self.site = site
        self.suffixes = list(suffixes or _SUFFIXES)
        self.contrast = contrast
        if unknown := [s for s in self.suffixes if s not in _SUFFIXES]:
            raise ValueError(f"Unknown BIDS suffixes {unknown}; known are {list(_SUFFIXES)}.")
        if contrast not in ("MRA", "CTA"):
            raise ValueError(f"An angiography is an MRA or a CTA, not {contrast!r}.")

    def index(self) -> pd.DataFrame:
        """One row per image (`tables.INDEX`); age and sex from participants.tsv, 'n/a' is unknown."""
        rows = []
        for uid in self._images:
            subject, suffix = _entity(uid, "sub"), uid.rsplit("_", 1)[1]
            person = self._participants.get(subject, {})
            present = self._present(uid, person)
            rows.append(
                {
                    "series_uid": uid,
                    "patient_id": subject,
                    "modality": self._modality(suffix),
                    "age": _number(person.get("age", "")),
                    "sex": {"M": "M", "F": "F"}.get(person.get("sex", "")[:1].upper(), ""),
                    "site": self.site,
                    "present": present,
                    **dict.fromkeys(LOCATION_KEYS, _locations(present)),
                }
            )
        return INDEX.conform(pd.DataFrame(rows))

    def case(self, series_uid: str) -> Case:
        """A scan with its lesions and, where the derivatives have them, vessel labels.

        Raises:
            ReadError: unknown series, unreadable image, or a mask that does not fit its image.
        """
        path = self._images.get(series_uid)
        if path is None:
            raise ReadError(f"{series_uid}: not among the {len(self._images)} images of {self.root}.")
        subject = _entity(series_uid, "sub")
        person = self._participants.get(subject, {})
        scan = read_nifti(path, self._modality(series_uid.rsplit("_", 1)[1]), subject)
        age, sex = _number(person.get("age", "")), person.get("sex", "")[:1].upper()
        scan = dataclasses.replace(
            scan, age=None if np.isnan(age) else age, sex=sex if sex in ("M", "F") else None
        )
        lesion_files, vessel_files = self._masks(path)
        present = self._present(series_uid, person)
        aneurysm = _numbered(lesion_files, scan.grid)
        if aneurysm is None and present == 0:
            aneurysm = np.zeros(scan.grid.shape, np.uint8)
        return Case(
            scan=scan,
            vessel=_vessels(vessel_files[0], scan.grid) if vessel_files else None,
            aneurysm=aneurysm,
            lesions=tuple(measure_lesions(aneurysm, scan.grid)),
            present=None if np.isnan(present) else bool(present),
            locations=np.full(len(LOCATIONS), _locations(present), np.float32),
        )

    def extent(self, series_uid: str) -> Extent | None:
        """How large a series is, from the header of its image."""
        return nifti_extent(self._images[series_uid])

    def fingerprint(self, series_uid: str) -> str:
        """A hash that changes when the image, its masks or the participant's row change on disk."""
        path = self._images[series_uid]
        parts = [str(self._participants.get(_entity(series_uid, "sub"), {}))]
        for file in (path, *self._masks(path)[0], *self._masks(path)[1]):
            parts.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def _images(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise ReadError(
                f"{self.root}: no such folder. Set data.root to the BIDS folder that holds sub-*."
            )
        found = [*self.root.glob("sub-*/anat/*.nii*"), *self.root.glob("sub-*/ses-*/anat/*.nii*")]
        images = {}
        for path in sorted(found):
            uid = series_name(path)
            if "_" in uid and uid.rsplit("_", 1)[1] in self.suffixes:
                images[uid] = path
        if not images:
            raise ReadError(
                f"{self.root}: no sub-*/[ses-*/]anat/*_{{{','.join(self.suffixes)}}}.nii.gz here. "
                "Is it the BIDS folder, and were the images downloaded (not only their links)?"
            )
        return images

    @cached_property
    def _participants(self) -> dict[str, dict[str, str]]:
        path = self.root / "participants.tsv"
        if not path.is_file():
            log.warning("%s is missing: ages, sexes and controls are unknown", path)
            return {}
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        if "participant_id" not in table.columns:
            raise ReadError(f"{path}: column participant_id is missing; it has {list(table.columns)}.")
        # A subject may have one row per session; the first is as good as any for age and group.
        return {row["participant_id"]: row for row in reversed(table.to_dict("records"))}

    @cached_property
    def _derivatives(self) -> dict[tuple[str, str], list[Path]]:
        """(subject, session) -> label files of the derivatives, by one walk over the tree."""
        files: dict[tuple[str, str], list[Path]] = {}
        for path in sorted((self.root / "derivatives").rglob("sub-*.nii*")):
            name = series_name(path)
            if not _LABEL_FILE.search(name):
                continue
            files.setdefault((_entity(name, "sub"), _entity(name, "ses")), []).append(path)
        return files

    def _masks(self, image: Path) -> tuple[list[Path], list[Path]]:
        """Lesion files and vessel files of an image."""
        name = series_name(image)
        if self._modality(name.rsplit("_", 1)[1]) != self.contrast:
            return [], []  # masks are drawn on the angiography
        files = self._derivatives.get((_entity(name, "sub"), _entity(name, "ses")), [])
        lesions = [f for f in files if _LESION.search(series_name(f))]
        return lesions, [f for f in files if _VESSEL.search(series_name(f)) and f not in lesions]

    def _present(self, series_uid: str, person: dict[str, str]) -> float:
        session = _entity(series_uid, "sub"), _entity(series_uid, "ses")
        if any(_LESION.search(series_name(f)) for f in self._derivatives.get(session, [])):
            return 1.0
        return _GROUPS.get(person.get("group", "").strip().lower(), float("nan"))

    def _modality(self, suffix: str) -> str:
        return self.contrast if suffix == "angio" else _SUFFIXES[suffix]


def _entity(name: str, key: str) -> str:
    """`sub-013` from `sub-013_ses-20101220_angio`; '' when the name has no such part."""
    return next((part for part in name.split("_") if part.startswith(f"{key}-")), "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _locations(present: float) -> float:
    """Without an aneurysm there is none anywhere; with one, nobody says where."""
    return 0.0 if present == 0 else float("nan")


def _vessels(file: Path, grid: Grid) -> np.ndarray:
    labels = read_mask(file, grid)
    if labels.max() > UNNAMED_VESSEL:
        raise ReadError(
            f"{file}: vessel label {labels.max()}, expected the RSNA numbers 1 to 13 or 0/1. Renumber them."
        )
    return labels * np.uint8(UNNAMED_VESSEL) if labels.max() == 1 else labels


def _numbered(files: list[Path], grid: Grid) -> np.ndarray | None:
    """Lesion files on one grid: k inside the k-th file's lesion; a label file keeps its lesions apart."""
    if not files:
        return None
    aneurysm, k = np.zeros(grid.shape, np.uint8), 0
    for file in files:
        mask = read_mask(file, grid)
        for label in np.unique(mask[mask > 0]):
            k += 1
            aneurysm[(mask == label) & (aneurysm == 0)] = k
    return aneurysm
