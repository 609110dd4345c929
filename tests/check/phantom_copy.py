"""A copy of a phantom RSNA data set that is to be spoiled, and the register of the defects."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset

# Defects by code; some codes come with a second one that is as true.
CODES: dict[str, Callable[["Series"], None]] = {}
ALSO: dict[str, set[str]] = {}
NEEDS: dict[str, dict] = {}


@dataclass
class Copy:
    """The spoiled data set while it is being spoiled."""

    root: Path
    train: list[dict[str, str]]
    points: list[dict[str, str]]
    folds: list[tuple[str, int]]
    spare: list["Series"] = field(default_factory=list)  # clean series that a defect may refer to


@dataclass
class Series:
    """One series of the copy."""

    copy: Copy
    uid: str

    @property
    def row(self) -> dict[str, str]:
        return next(row for row in self.copy.train if row["SeriesInstanceUID"] == self.uid)

    @property
    def points(self) -> list[dict[str, str]]:
        return [point for point in self.copy.points if point["SeriesInstanceUID"] == self.uid]

    @property
    def folder(self) -> Path:
        return self.copy.root / "series" / self.uid

    @property
    def files(self) -> list[Path]:
        """In the order of the slices, from inferior to superior."""
        return sorted(self.folder.glob("*.dcm"), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])

    @property
    def modality(self) -> str:
        return self.row["Modality"]

    @property
    def patient(self) -> str:
        return str(pydicom.dcmread(next(self.folder.glob("*.dcm"))).PatientID)

    def mask(self, kind: str) -> Path:
        return next((self.copy.root / "segmentations").glob(f"{self.uid}_{kind}.nii*"))

    def edit(self, change: Callable[[Dataset, int], None]) -> None:
        """Change every slice: `change(dataset, number)`."""
        for i, path in enumerate(self.files):
            slice_ = pydicom.dcmread(path)
            change(slice_, i)
            slice_.save_as(path, enforce_file_format=True)

    def edit_mask(self, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        path = self.mask(kind)
        image = nibabel.load(path, mmap=False)
        nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj).copy()), image.affine), path)


def defect(code: str, also: tuple[str, ...] = (), **needs: object) -> Callable:
    """Register a defect.

    Args:
        also: codes that may be found as well, because they are true too.
        needs: what the series must be: `modality` (table names), `positive`, `sided` (an aneurysm of the
            middle cerebral or supraclinoid carotid artery, far from the middle).
    """

    def register(function: Callable[[Series], None]) -> Callable[[Series], None]:
        CODES[code], ALSO[code], NEEDS[code] = function, set(also), needs
        return function

    return register
