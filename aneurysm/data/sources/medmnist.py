"""VesselMNIST3D and the other three-dimensional MedMNIST sets: one small volume per sample in one .npz file.

Keys are {train,val,test}_images (n, s, s, s) uint8 and {train,val,test}_labels (n, 1). Source: Yang et al.,
MedMNIST v2, Scientific Data 2023; VesselMNIST3D is made of IntrA (Yang et al., CVPR 2020).
"""

import csv
import hashlib
import logging
import zipfile
import zlib
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from aneurysm.data.errors import ReadError
from aneurysm.data.labels import UNNAMED_VESSEL
from aneurysm.data.resample import canonicalise
from aneurysm.data.scan import Case, Grid, Scan
from aneurysm.data.tables import INDEX, LOCATION_KEYS

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

# The files hold no voxel size and every sample was scaled to its box. The 85 annotated segments of IntrA are
# 18 mm long at the median and span 21 of 28 voxels: 0.86 mm at 28 voxels, in proportion at other sizes.
_FIELD_MM = 24.0
# Grey values 0 and 255 become what soft tissue and enhanced vessels have in a CTA.
_TISSUE_HU, _VESSEL_HU = 40.0, 340.0


class MedMnistSource:
    """Reads a MedMNIST 3D file; every sample is a series `<file>-<split>-<number>`.

    The images are grey values without unit or shapes of 0 and 255. They are given out as CTA with 0 at 40 HU
    and 255 at 340 HU, which the default preparation turns to 0 and 1. Where all samples are shapes, the
    shape is the vessel label too. Voxel size, axes, age, sex and artery are unknown: the voxel size is
    nominal (24 mm for the whole box, 0.86 mm at 28 voxels) and `Scan.notes` says so.

    The official split has samples of most patients on two sides. A table of patients
    (columns split, index, patient) keeps them together in the folds; without one every sample counts as a
    patient of its own, which is logged.

    Args:
        root: the .npz file.
        patients: CSV table; None looks for `<file>_patient_match.csv` beside the file, also without the size
            in the file's name (vesselmnist3d_64.npz and vesselmnist3d_patient_match.csv).
        splits: which of train, val, test to read.
        positive: the class that counts as an aneurysm.
        field_mm: nominal edge of the whole box.

    The first use of the index raises ReadError when the file or a table is missing or broken.
    """

    def __init__(
        self,
        root: Path | str,
        patients: Path | str | None = None,
        splits: tuple[str, ...] | list[str] = SPLITS,
        positive: int = 1,
        field_mm: float = _FIELD_MM,
    ) -> None:
        self.root = Path(root)
        self.patients = None if patients is None else Path(patients)
        self.splits = tuple(splits)
        self.positive = int(positive)
        self.field_mm = float(field_mm)
        if unknown := [s for s in self.splits if s not in SPLITS]:
            raise ValueError(f"Unknown splits {unknown}; known are {list(SPLITS)}.")
        if not self.splits or not self.field_mm > 0:
            raise ValueError(f"Expected splits and field_mm > 0, got {self.splits} and {field_mm}.")

    def index(self) -> pd.DataFrame:
        """One row per sample (`tables.INDEX`); `site` is the official split."""
        rows = []
        for split in self.splits:
            _, labels = self._arrays(split)
            for number, label in enumerate(labels):
                uid = self._uid(split, number)
                rows.append(
                    {
                        "series_uid": uid,
                        "patient_id": self._patient_of.get((split, number), uid),
                        "modality": "CTA",
                        "age": np.nan,
                        "sex": "",
                        "site": split,
                        "present": float(label == self.positive),
                        **dict.fromkeys(LOCATION_KEYS, np.nan),
                        "dataset": self.name,
                        "lesions": np.nan if label == self.positive else 0.0,
                        "has_vessel_mask": self._shapes,
                        "path": f"{self.root.name}:{split}_images[{number}]",
                    }
                )
        return INDEX.conform(pd.DataFrame(rows))

    def case(self, series_uid: str) -> Case:
        """One sample with its label; it has no lesion, because nobody marked where the aneurysm is.

        Raises:
            ReadError: no such sample.
        """
        split, number = self._parse(series_uid)
        images, labels = self._arrays(split)
        stored = images[number]
        size = self.field_mm / np.array(stored.shape)
        source = Grid(stored.shape, np.diag([*size, 1.0]))
        canonical, grid = canonicalise(stored, source)
        volume = _TISSUE_HU + canonical.astype(np.float32) * np.float32((_VESSEL_HU - _TISSUE_HU) / 255)
        scan = Scan(
            series_uid=series_uid,
            patient_id=self._patient_of.get((split, number), series_uid),
            modality="CTA",
            volume=volume,
            grid=grid,
            source=source,
            notes=(
                f"voxels of {size[0]:.3g} mm are nominal, axes and left and right are a guess",
                "grey values 0 to 255 were given out as 40 to 340 HU",
            ),
        )
        vessel = None
        if self._shapes:
            vessel = np.where(canonical > 127, UNNAMED_VESSEL, 0).astype(np.uint8)
        present = bool(labels[number] == self.positive)
        aneurysm = None if present else np.zeros(grid.shape, np.uint8)
        return Case(scan=scan, vessel=vessel, aneurysm=aneurysm, present=present)

    def fingerprint(self, series_uid: str) -> str:
        """A hash that changes when the file, the sample's patient or the reading changes."""
        split, number = self._parse(series_uid)
        status = self.root.stat()
        parts = (
            series_uid, status.st_size, status.st_mtime_ns, self._patient_of.get((split, number)),
            self.positive, self.field_mm,
        )  # fmt: skip
        return hashlib.sha256(str(parts).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """File name without its suffix."""
        return self.root.stem

    def _uid(self, split: str, number: int) -> str:
        return f"{self.name}-{split}-{number:04d}"

    def _parse(self, series_uid: str) -> tuple[str, int]:
        head, _, number = series_uid.rpartition("-")
        split = head.rpartition("-")[2]
        named = split in self.splits and number.isdigit() and series_uid == self._uid(split, int(number))
        if named and int(number) < len(self._arrays(split)[1]):
            return split, int(number)
        raise ReadError(f"{series_uid}: no such sample in {self.root}; they are {self.name}-train-0000 etc.")

    def _arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, s, s, s) uint8 and labels (n,) of a split."""
        if not self.root.is_file():
            raise ReadError(f"{self.root}: no such file. Set data.root to the .npz file of MedMNIST.")
        return _read(self.root, self.root.stat().st_mtime_ns, split)

    @cached_property
    def _shapes(self) -> bool:
        """Whether all samples are shapes of 0 and 255, told from the first hundred."""
        images, _ = self._arrays(self.splits[0])
        return bool(np.isin(images[:100], (0, 255)).all())

    @cached_property
    def _patient_of(self) -> dict[tuple[str, int], str]:
        path = self.patients
        if path is None:
            stem, _, size = self.name.rpartition("_")
            names = [self.name, *([stem] if size.isdigit() else [])]
            places = [self.root.with_name(f"{name}_patient_match.csv") for name in names]
            path = next((place for place in places if place.is_file()), None)
        if path is None:
            log.warning(
                "%s: no table of patients; every sample counts as a patient of its own, and samples of one "
                "patient may be in several folds", self.root,
            )  # fmt: skip
            return {}
        if not path.is_file():
            raise ReadError(f"{path}: no such file. Give the table of patients, or null.")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if missing := [c for c in ("split", "index", "patient") if c not in (reader.fieldnames or ())]:
            raise ReadError(f"{path}: columns {missing} are missing; it has {reader.fieldnames}.")
        try:
            found = {(row["split"], int(row["index"])): row["patient"].strip() for row in rows}
        except ValueError as error:
            raise ReadError(f"{path}: column index must hold whole numbers ({error}).") from error
        total = sum(len(self._arrays(split)[1]) for split in self.splits)
        named = sum(bool(found.get((s, n))) for s in self.splits for n in range(len(self._arrays(s)[1])))
        if named < total:
            log.warning(
                "%s names the patient of %d of %d samples; the others stand alone", path, named, total
            )
        # VesselMNIST3D is cut from IntrA: its patients have the names that IntraSource gives them.
        prefix = "intra-" if self.name.startswith("vesselmnist3d") else ""
        return {key: prefix + patient for key, patient in found.items() if patient}


@lru_cache(maxsize=len(SPLITS))
def _read(path: Path, changed: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decompress a split once per process; `changed` is the time of the file that was read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [k for k in (f"{split}_images", f"{split}_labels") if k not in file]
            if missing:
                raise ReadError(f"{path}: has no {missing}, only {sorted(file)}. Is it a MedMNIST file?")
            images, labels = file[f"{split}_images"], file[f"{split}_labels"]
    except ReadError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ReadError(f"{path}: not a readable .npz file ({error}). Download it again.") from error
    if images.ndim != 4 or min(images.shape[1:]) < 3 or images.dtype != np.uint8:
        raise ReadError(
            f"{path}: {split}_images is {images.shape} of {images.dtype}; the 3D sets of MedMNIST have "
            "(samples, s, s, s) of uint8. Use a file such as vesselmnist3d.npz."
        )
    labels = labels.reshape(len(labels), -1)
    if labels.shape != (len(images), 1):
        raise ReadError(
            f"{path}: {len(images)} images but labels {labels.shape}; one label each is expected."
        )
    return images, labels[:, 0]
