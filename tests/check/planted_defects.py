"""Plants known defects into a copy of a phantom RSNA data set, each in a series of its own.

    python tests/check/planted_defects.py <clean data set> <copy>

The copy gets `planted.json` (series uid -> codes that the check must find there) and `folds.csv`.
A defect is a function that spoils one series of the copy; `Series` gives it the files and table rows.
"""

import argparse
import ast
import csv
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, PRESENT

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


# Files and geometry


@defect("missing-slices")
def _(series: Series) -> None:
    for path in series.files[15:17]:
        path.unlink()


@defect("conflicting-slices")
def _(series: Series) -> None:
    slice_ = pydicom.dcmread(series.files[10])
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{slice_.SOPInstanceUID[:-4]}.1"
    slice_.PixelData = np.flip(slice_.pixel_array).tobytes()
    slice_.save_as(series.folder / "second.dcm", enforce_file_format=True)


@defect("duplicate-slices")
def _(series: Series) -> None:
    slice_ = pydicom.dcmread(series.files[10])
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{slice_.SOPInstanceUID[:-4]}.1"
    slice_.save_as(series.folder / "second.dcm", enforce_file_format=True)


@defect("one-position")
def _(series: Series) -> None:
    place = pydicom.dcmread(series.files[0]).ImagePositionPatient
    series.edit(lambda slice_, i: setattr(slice_, "ImagePositionPatient", place))


@defect("mixed-geometry")
def _(series: Series) -> None:
    # A scout: one sagittal image with the UID of the series.
    slice_ = pydicom.dcmread(series.files[0])
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{slice_.SOPInstanceUID[:-4]}.1"
    slice_.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    slice_.save_as(series.folder / "scout.dcm", enforce_file_format=True)


@defect("mixed-gaps")
def _(series: Series) -> None:
    def stretch(slice_: Dataset, i: int) -> None:
        x, y, z = slice_.ImagePositionPatient
        slice_.ImagePositionPatient = [x, y, float(z) + max(i - 20, 0) * 1.5]

    series.edit(stretch)


@defect("shifted-slices")
def _(series: Series) -> None:
    def shift(slice_: Dataset, i: int) -> None:
        x, y, z = slice_.ImagePositionPatient
        slice_.ImagePositionPatient = [float(x) + (4 if 12 < i < 20 else 0), y, z]

    series.edit(shift)


@defect("missing-geometry")
def _(series: Series) -> None:
    series.edit(lambda slice_, i: delattr(slice_, "PixelSpacing"))


@defect(
    "implausible-spacing",
    also=("mask-misplaced", "mask-affine", "mask-unreadable", "mask-in-air"),
    positive=False,
)
def _(series: Series) -> None:
    def centimetres(slice_: Dataset, i: int) -> None:
        slice_.PixelSpacing = [float(s) * 10 for s in slice_.PixelSpacing]

    series.edit(centimetres)


@defect("truncated-file")
def _(series: Series) -> None:
    path = series.files[9]
    path.write_bytes(path.read_bytes()[:-700])


@defect("unreadable-file", also=("missing-slices",))
def _(series: Series) -> None:
    series.files[9].write_bytes(b"<html>404 Not Found</html>" * 40)


@defect("foreign-files")
def _(series: Series) -> None:
    for path in series.copy.spare[0].files[:3]:
        shutil.copy(path, series.folder / path.name)


@defect("wrong-folder", also=("localizer-unknown-image", "same-series-twice"), positive=False)
def _(series: Series) -> None:
    other = f"{series.uid[:-4]}0001"
    series.edit(lambda slice_, i: setattr(slice_, "SeriesInstanceUID", other))


@defect("row-without-folder", positive=False)
def _(series: Series) -> None:
    shutil.rmtree(series.folder)


@defect("folder-without-row", positive=False)
def _(series: Series) -> None:
    series.copy.train.remove(series.row)


# Units and intensities


@defect("not-hounsfield", modality="CTA", positive=False)
def _(series: Series) -> None:
    series.edit(lambda slice_, i: delattr(slice_, "RescaleIntercept"))


@defect("negative-mr", also=("mask-misplaced", "mask-in-air"), modality="MRI T1post", positive=False)
def _(series: Series) -> None:
    def signed(slice_: Dataset, i: int) -> None:
        slice_.PixelRepresentation = 1
        slice_.PixelData = (slice_.pixel_array.astype(np.int16) - 100).tobytes()

    series.edit(signed)


@defect("constant-image")
def _(series: Series) -> None:
    series.edit(lambda slice_, i: setattr(slice_, "PixelData", b"\0" * len(slice_.PixelData)))


@defect("clipped", also=("mask-misplaced",), modality="CTA", positive=False)
def _(series: Series) -> None:
    # Windowed to soft tissue: bone and contrast agent are equal.
    series.edit(
        lambda slice_, i: setattr(slice_, "PixelData", np.minimum(slice_.pixel_array, 1200).tobytes())
    )


@defect("blank-slices", positive=False)
def _(series: Series) -> None:
    def blank(slice_: Dataset, i: int) -> None:
        if i in (4, 5):
            slice_.PixelData = b"\0" * len(slice_.PixelData)

    series.edit(blank)


# Tables


@defect("modality-mismatch", modality="MRI T1post", positive=False)
def _(series: Series) -> None:
    series.row["Modality"] = "CTA"


@defect("unknown-modality", positive=False)
def _(series: Series) -> None:
    series.row["Modality"] = "MRI FLAIR"


@defect("bad-label", positive=False)
def _(series: Series) -> None:
    series.row[LOCATIONS[3]] = "2"


@defect("impossible-age", positive=False)
def _(series: Series) -> None:
    series.row["PatientAge"] = "570"


@defect("duplicate-row", positive=False)
def _(series: Series) -> None:
    series.copy.train.append(dict(series.row))


@defect("location-without-present", positive=False)
def _(series: Series) -> None:
    series.row[LOCATIONS[6]] = "1"


@defect("present-without-location", also=("localizer-not-in-labels",), positive=True)
def _(series: Series) -> None:
    for name in LOCATIONS:
        series.row[name] = "0"


@defect("positive-without-localizer", positive=True)
def _(series: Series) -> None:
    for point in series.points:
        series.copy.points.remove(point)


@defect("localizer-in-negative", also=("mask-in-negative",), positive=True)
def _(series: Series) -> None:
    for name in LABEL_COLUMNS:
        series.row[name] = "0"


@defect("sex-contradiction", also=("study-of-two-patients",), positive=False)
def _(series: Series) -> None:
    series.row["PatientSex"] = "Male" if series.row["PatientSex"] == "Female" else "Female"


# Localizers


@defect("localizer-unknown-image", positive=True)
def _(series: Series) -> None:
    series.points[0]["SOPInstanceUID"] = pydicom.dcmread(series.copy.spare[0].files[3]).SOPInstanceUID


@defect("localizer-outside", positive=True)
def _(series: Series) -> None:
    series.points[0]["coordinates"] = "{'x': 258.36, 'y': 261.36}"


@defect("localizer-unparsable", positive=True)
def _(series: Series) -> None:
    series.points[0]["coordinates"] = "{'x': 258.36, 'y':"


@defect("localizer-unknown-location", positive=True)
def _(series: Series) -> None:
    series.points[0]["location"] = "Left Pericallosal Artery"


@defect("duplicate-localizer", positive=True)
def _(series: Series) -> None:
    series.copy.points.append(dict(series.points[0]))


@defect("localizer-wrong-side", also=("localizer-far-from-vessel",), sided=True)
def _(series: Series) -> None:
    # Left and right swapped in point and row, as RSNA's early versions had it.
    (point,) = series.points
    name = point["location"]
    swapped = "Right" + name[4:] if name.startswith("Left") else "Left" + name[5:]
    point["location"], series.row[name], series.row[swapped] = swapped, "0", "1"


@defect("localizer-no-frame", also=("mask-affine",), modality="MRA", positive=True)
def _(series: Series) -> None:
    # The series becomes one enhanced multi-frame file; its point keeps x and y but gets no frame.
    slices = [pydicom.dcmread(path) for path in series.files]
    whole = slices[0]
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    whole.NumberOfFrames = len(slices)
    whole.PixelData = b"".join(s.PixelData for s in slices)
    frames = []
    for s in slices:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = s.ImagePositionPatient
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, orientation.ImageOrientationPatient = (
        whole.PixelSpacing,
        whole.ImageOrientationPatient,
    )
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = (
        Sequence([measures]),
        Sequence([orientation]),
    )
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames)
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "InstanceNumber"):
        delattr(whole, tag)
    for path in list(series.folder.glob("*.dcm")):
        path.unlink()
    whole.save_as(series.folder / f"{whole.SOPInstanceUID}.dcm", enforce_file_format=True)
    for point in series.points:
        point["SOPInstanceUID"] = whole.SOPInstanceUID


@defect("localizer-in-air", also=("mask-in-air", "mask-misplaced"), modality="CTA", positive=True)
def _(series: Series) -> None:
    point = ast.literal_eval(series.points[0]["coordinates"])
    sop = series.points[0]["SOPInstanceUID"]
    middle = next(i for i, path in enumerate(series.files) if path.stem == sop)

    def hole(slice_: Dataset, i: int) -> None:
        if abs(i - middle) <= 9:
            pixels = slice_.pixel_array.copy()
            x, y = round(point["x"]), round(point["y"])
            pixels[max(y - 9, 0) : y + 10, max(x - 9, 0) : x + 10] = 24  # -1000 HU
            slice_.PixelData = pixels.tobytes()

    series.edit(hole)


# Masks


@defect("mask-wrong-side", also=("localizer-wrong-side", "localizer-far-from-vessel"), positive=False)
def _(series: Series) -> None:
    table = np.arange(256, dtype=np.uint8)
    for a, b in ((3, 4), (5, 6), (7, 8), (9, 10), (11, 12)):
        table[a], table[b] = b, a
    series.edit_mask("cowseg", lambda labels: table[labels])


@defect("mask-shape", positive=False)
def _(series: Series) -> None:
    series.edit_mask("cowseg", lambda labels: labels[:, :, :-3])


@defect("mask-affine", also=("mask-misplaced", "mask-in-air"), positive=False)
def _(series: Series) -> None:
    path = series.mask("cowseg")
    image = nibabel.load(path, mmap=False)
    affine = image.affine.copy()
    affine[:3, 3] += (6, -5, 4)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), path)


@defect("mask-empty", positive=False)
def _(series: Series) -> None:
    series.edit_mask("cowseg", np.zeros_like)


@defect("mask-values", positive=False)
def _(series: Series) -> None:
    series.edit_mask("cowseg", lambda labels: np.where(labels == 9, 47, labels).astype(np.uint8))


@defect("mask-misplaced", also=("mask-wrong-side", "mask-in-air"), modality="MRA", positive=False)
def _(series: Series) -> None:
    # Saved as a plain array without regard to the direction of its rows.
    series.edit_mask("cowseg", lambda labels: labels[:, ::-1])


@defect("mask-unreadable", positive=False)
def _(series: Series) -> None:
    path = series.mask("cowseg")
    path.write_bytes(path.read_bytes()[:2000])


@defect("mask-in-negative", positive=False)
def _(series: Series) -> None:
    def sac(labels: np.ndarray) -> np.ndarray:
        labels[20:24, 20:24, 20:24] = 1
        return labels

    series.edit_mask("aneurysm", sac)


@defect(
    "localizer-far-from-aneurysm", also=("localizer-far-from-vessel", "localizer-wrong-side"), positive=True
)
def _(series: Series) -> None:
    # The point was set in a viewer that counts rows from below.
    point = ast.literal_eval(series.points[0]["coordinates"])
    rows = int(pydicom.dcmread(series.files[0]).Rows)
    far = 3.0 if point["y"] > rows / 2 else rows - 4.0
    series.points[0]["coordinates"] = str({"x": point["x"], "y": far})


# Across cases


@defect("duplicate-images", also=("localizer-unknown-image",), positive=False)
def _(series: Series) -> None:
    # The images of a clean series under the UIDs of this one; labels and masks stay as they are.
    other = series.copy.spare[1]
    uid, patient = series.uid, series.patient
    shutil.rmtree(series.folder)
    series.folder.mkdir()
    for i, path in enumerate(other.files):
        slice_ = pydicom.dcmread(path)
        slice_.SeriesInstanceUID, slice_.PatientID = uid, patient
        slice_.StudyInstanceUID = f"{uid[:-4]}.9"
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{uid[:-4]}.{i}"
        slice_.save_as(series.folder / f"{uid}.{i}.dcm", enforce_file_format=True)
    for kind in ("cowseg", "aneurysm"):
        series.mask(kind).unlink()
    for key in ("Modality", "PatientAge", "PatientSex", *LABEL_COLUMNS):
        series.row[key] = other.row[key]


@defect("patient-in-two-folds", positive=False)
def _(series: Series) -> None:
    fold = dict(series.copy.folds)[series.patient]
    series.copy.folds.append((series.patient, 1 - fold))


@defect("patient-without-fold", positive=False)
def _(series: Series) -> None:
    series.copy.folds[:] = [pair for pair in series.copy.folds if pair[0] != series.patient]


# Notes: nothing is wrong, but it is said


@defect("gantry-tilt", also=("mask-misplaced", "mask-in-air", "mask-affine"), positive=False)
def _(series: Series) -> None:
    def tilt(slice_: Dataset, i: int) -> None:
        x, y, z = slice_.ImagePositionPatient
        slice_.ImagePositionPatient = [x, float(y) + 0.2 * i, z]

        series.edit(tilt)


@defect("instance-order", positive=False)
def _(series: Series) -> None:
    order = np.random.default_rng(3).permutation(len(series.files)) + 1
    series.edit(lambda slice_, i: setattr(slice_, "InstanceNumber", int(order[i])))


def plant(clean: Path, root: Path) -> dict[str, str]:
    """Copy a phantom data set and spoil as many series as there are defects.

    Returns:
        series uid -> code. The first two series that fit no special need stay clean, and so do all others.

    Raises:
        ValueError: too few series of the kinds that the defects need.
    """
    shutil.copytree(clean, root)
    copy = Copy(root, _read(root / "train.csv"), _read(root / "train_localizers.csv"), [])
    free = [Series(copy, row["SeriesInstanceUID"]) for row in copy.train]
    copy.folds = [(series.patient, i % 2) for i, series in enumerate(free)]
    chosen: dict[str, Series] = {}
    # The most demanding defects choose first.
    for code in sorted(CODES, key=lambda c: -len(NEEDS[c]) - 2 * ("sided" in NEEDS[c])):
        series = next((s for s in free if _suits(s, **NEEDS[code])), None)
        if series is None:
            raise ValueError(f"No series is left for {code} ({NEEDS[code]}). Use more patients.")
        free.remove(series)
        chosen[code] = series
    copy.spare = [series for series in free if series.row[PRESENT] == "0"]
    if len(copy.spare) < 2:
        raise ValueError("Two negative series must stay clean. Use more patients.")
    for code, series in chosen.items():
        CODES[code](series)
    _write(root / "train.csv", copy.train, list(copy.train[0]))
    _write(root / "train_localizers.csv", copy.points, list(copy.points[0]))
    with (root / "folds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("patient_id", "fold"), *copy.folds])
    planted = {series.uid: code for code, series in chosen.items()}
    (root / "planted.json").write_text(json.dumps(planted, indent=1))
    return planted


def _suits(
    series: Series, modality: str | None = None, positive: bool | None = None, sided: bool = False
) -> bool:
    row = series.row
    if modality is not None and row["Modality"] != modality:
        return False
    if positive is not None and (row[PRESENT] == "1") != positive:
        return False
    if not sided:
        return True
    names = [point["location"] for point in series.points]
    return len(names) == 1 and "Middle" in names[0]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def lines(planted: dict[str, str]) -> Iterator[str]:
    """One line per planted defect."""
    for uid, code in sorted(planted.items(), key=lambda pair: pair[1]):
        yield f"{code:30} {uid}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clean", type=Path)
    parser.add_argument("copy", type=Path)
    given = parser.parse_args()
    print("\n".join(lines(plant(given.clean, given.copy))))
