"""BIDS data sets of angiographies, as OpenNeuro ds003949 (Lausanne) and ds005096 (Brisbane) lay them out.

participants.tsv
sub-013/ses-20101220/anat/sub-013_ses-20101220_angio.nii.gz
derivatives/manual_masks/sub-013/ses-20101220/anat/sub-013_ses-20101220_desc-Lesion_1_mask.nii.gz
derivatives/sub-000/ses-20190420/anat/Nifti Aneurysm Only/<any name>.nii
"""

import dataclasses
import hashlib
import logging
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aneurysm.data.errors import ReadError
from aneurysm.data.formats.nifti import read_mask, read_nifti, series_name
from aneurysm.data.labels import LOCATIONS, UNNAMED_VESSEL
from aneurysm.data.preparation.extents import nifti_extent
from aneurysm.data.preparation.workload import Extent
from aneurysm.data.scan import Case, Grid
from aneurysm.data.sources.bids_people import Participants, Person, read_sidecar
from aneurysm.data.sources.lesions import measure_lesions
from aneurysm.data.tables import INDEX, LOCATION_KEYS

log = logging.getLogger(__name__)

_SUFFIXES = {"angio": "MRA", "T1w": "T1", "T2w": "T2"}
_MASK_FILE = re.compile(r"mask|seg|label|dseg", re.IGNORECASE)
_LESION = re.compile(r"lesion|aneurysm", re.IGNORECASE)
_VESSEL = re.compile(r"vessel|arter|cow", re.IGNORECASE)
# Not masks, whatever they are called: images with the mask burnt in, meshes' folders, atlases in percent.
_NO_MASKS = re.compile(r"^(mask|3d model|slicer|registrations|n4_bias.*|reg_.*)$", re.IGNORECASE)
_WITH_PARENT = re.compile(r"parent", re.IGNORECASE)
_ONLY = re.compile(r"aneurysm\s*only", re.IGNORECASE)


class BidsSource:
    """Reads `sub-*/[ses-*/]anat/*_{angio,T1w,T2w}.nii[.gz]` with the masks under `derivatives/`.

    One series per image; its uid is the file name. A mask belongs to the angiography of its subject and
    session, and to the one with the same `acq-` and `run-` where the mask's name has them:
    `*desc-Lesion*_mask`, `*aneurysm*` label files and the files in a folder `Nifti Aneurysm Only` are lesions
    (one file each), `*vessel*`, `*artery*` or `*cow*` label files are vessels (RSNA numbering; a 0/1 mask
    becomes UNNAMED_VESSEL). Masks drawn on another modality (folders `ct`, `ds`) and masks of the one artery
    that carries the aneurysm (`with Parent Artery`: every other vessel would count as background) are not
    used. A series has an aneurysm when its session has a lesion mask; without one, column `group` of
    participants.tsv (control, patient) decides; otherwise that is unknown. Locations are 0 in controls and
    otherwise unknown. Images of which only the link is here (git-annex) are logged and left out.

    Args:
        site: where participants.tsv has no column `site`.
        suffixes: which images to read, of angio, T1w, T2w; default all.
        contrast: CTA when the `angio` images are CT angiographies; a sidecar with Modality CT says so too.

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
        return INDEX.conform(pd.DataFrame([self._row(uid) for uid in self._images]))

    def case(self, series_uid: str) -> Case:
        """A scan with its lesions and, where the derivatives have them, vessel labels.

        Raises:
            ReadError: unknown series, unreadable image, or a mask that does not fit its image.
        """
        path = self._images.get(series_uid)
        if path is None:
            raise ReadError(f"{series_uid}: not among the {len(self._images)} images of {self.root}.")
        person = self._person(series_uid)
        scan = read_nifti(path, self._modality(series_uid), _entity(series_uid, "sub"))
        lesion_files, vessel_files = self._masks(path)
        present = self._present(series_uid, person)
        notes = list(scan.notes)
        aneurysm = _numbered(lesion_files, scan.grid, notes)
        if aneurysm is None and present == 0:
            aneurysm = np.zeros(scan.grid.shape, np.uint8)
        return Case(
            scan=dataclasses.replace(
                scan,
                age=None if np.isnan(person.age) else person.age,
                sex=person.sex or None,
                notes=tuple(notes),
            ),
            vessel=_vessels(vessel_files, scan.grid, notes),
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
        parts = [str(self._person(series_uid))]
        for file in (path, *self._masks(path)[0], *self._masks(path)[1]):
            parts.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _row(self, uid: str) -> dict[str, Any]:
        """The row of the index for an image."""
        path, person = self._images[uid], self._person(uid)
        lesion_files, vessel_files = self._masks(path)
        present = self._present(uid, person)
        notes = []
        if lesion_files and person.diseased == 0:
            notes.append("participants.tsv says control but there is a lesion mask")
        if person.diseased == 1 and not lesion_files and self._modality(uid) == self.contrast:
            notes.append("participants.tsv says patient but there is no lesion mask")
        return {
            "series_uid": uid,
            "patient_id": _entity(uid, "sub"),
            "modality": self._modality(uid),
            "age": person.age,
            "sex": person.sex,
            "site": person.site or self.site,
            "present": present,
            **dict.fromkeys(LOCATION_KEYS, _locations(present)),
            "dataset": "bids",
            "lesions": 0.0 if present == 0 else float(len(lesion_files) or np.nan),
            "has_vessel_mask": bool(vessel_files),
            "has_aneurysm_mask": bool(lesion_files),
            "path": path.relative_to(self.root).as_posix(),
            "note": "; ".join(notes),
        }

    @cached_property
    def _images(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise ReadError(
                f"{self.root}: no such folder. Set data.root to the BIDS folder that holds sub-*."
            )
        found = [*self.root.glob("sub-*/anat/*.nii*"), *self.root.glob("sub-*/ses-*/anat/*.nii*")]
        images, absent = {}, []
        for path in sorted(found):
            uid = series_name(path)
            if "_" in uid and uid.rsplit("_", 1)[1] in self.suffixes:
                if path.is_file():
                    images[uid] = path
                else:
                    absent.append(uid)
        if absent:
            log.warning(
                "%s: of %d images only the link is here, first %s; left out. Fetch them (datalad get, "
                "git annex get).", self.root, len(absent), absent[0],
            )  # fmt: skip
        if not images:
            raise ReadError(
                f"{self.root}: no sub-*/[ses-*/]anat/*_{{{','.join(self.suffixes)}}}.nii.gz here. "
                "Is it the BIDS folder, and were the images downloaded (not only their links)?"
            )
        return images

    @cached_property
    def _participants(self) -> Participants:
        return Participants(self.root)

    @cached_property
    def _sidecars(self) -> dict[str, dict[str, Any]]:
        return {uid: read_sidecar(path) for uid, path in self._images.items()}

    def _person(self, uid: str) -> Person:
        return self._participants.person(_entity(uid, "sub"), _entity(uid, "ses"), self._sidecars[uid])

    @cached_property
    def _derivatives(self) -> dict[tuple[str, str], list[Path]]:
        """(subject, session) -> lesion and vessel label files, by one walk over the tree."""
        files: dict[tuple[str, str], list[Path]] = {}
        root = self.root / "derivatives"
        for path in sorted(root.rglob("*.nii*")):
            parts = path.relative_to(root).parts
            if path.is_file() and _kind(path, root) is not None:
                files.setdefault((_placed(parts, "sub"), _placed(parts, "ses")), []).append(path)
        return files

    def _masks(self, image: Path) -> tuple[list[Path], list[Path]]:
        """Lesion files and vessel files of an image."""
        name = series_name(image)
        if self._modality(name) != self.contrast:
            return [], []  # masks are drawn on the angiography
        session = _entity(name, "sub"), _entity(name, "ses")
        kinds: dict[str, list[Path]] = {"lesion": [], "vessel": []}
        for file in self._derivatives.get(session, []):
            mask = series_name(file)
            # A mask that names its acquisition or run is for that image alone.
            if all(_entity(mask, key) in ("", _entity(name, key)) for key in ("acq", "run")):
                kinds[_kind(file, self.root / "derivatives") or ""].append(file)
        return kinds["lesion"], kinds["vessel"]

    def _present(self, series_uid: str, person: Person) -> float:
        session = _entity(series_uid, "sub"), _entity(series_uid, "ses")
        files = self._derivatives.get(session, [])
        if any(_kind(f, self.root / "derivatives") == "lesion" for f in files):
            return 1.0
        return person.diseased

    def _modality(self, uid: str) -> str:
        suffix = uid.rsplit("_", 1)[1]
        if suffix != "angio":
            return _SUFFIXES[suffix]
        computed = str(self._sidecars.get(uid, {}).get("Modality", "")).upper() == "CT"
        return "CTA" if computed else self.contrast


def _kind(path: Path, derivatives: Path) -> str | None:
    """'lesion', 'vessel', or None for a file under derivatives/ that is neither."""
    *folders, _ = path.relative_to(derivatives).parts
    name = series_name(path)
    if any(_NO_MASKS.match(folder) for folder in folders) or {"ct", "ds"} & set(folders):
        return None
    if any(_ONLY.search(folder) for folder in folders):
        return "lesion"
    if _WITH_PARENT.search(" ".join([*folders, name])) or not _MASK_FILE.search(name):
        return None
    if _LESION.search(name):
        return "lesion"
    return "vessel" if _VESSEL.search(name) else None


def _placed(parts: tuple[str, ...], key: str) -> str:
    """The entity of a file by its own name, or by the folder that it lies in."""
    own = _entity(parts[-1].split(".")[0], key)
    return own or next((part for part in parts if part.startswith(f"{key}-")), "")


def _entity(name: str, key: str) -> str:
    """`sub-013` from `sub-013_ses-20101220_angio`; '' when the name has no such part."""
    return next((part for part in name.split("_") if part.startswith(f"{key}-")), "")


def _locations(present: float) -> float:
    """Without an aneurysm there is none anywhere; with one, nobody says where."""
    return 0.0 if present == 0 else float("nan")


def _vessels(files: list[Path], grid: Grid, notes: list[str]) -> np.ndarray | None:
    if not files:
        return None
    labels = read_mask(files[0], grid, notes)
    if labels.max() > UNNAMED_VESSEL:
        raise ReadError(
            f"{files[0]}: vessel label {labels.max()}, expected the RSNA numbers 1 to 13 or 0/1. "
            "Renumber them."
        )
    return labels * np.uint8(UNNAMED_VESSEL) if labels.max() == 1 else labels


def _numbered(files: list[Path], grid: Grid, notes: list[str]) -> np.ndarray | None:
    """Lesion files on one grid: k inside the k-th file's lesion; a label file keeps its lesions apart."""
    if not files:
        return None
    aneurysm, k = np.zeros(grid.shape, np.uint8), 0
    for file in files:
        mask = read_mask(file, grid, notes)
        if not mask.any():
            notes.append(f"{file.name}: the lesion mask is empty on this image")
        for label in np.unique(mask[mask > 0]):
            k += 1
            aneurysm[(mask == label) & (aneurysm == 0)] = k
    return aneurysm
