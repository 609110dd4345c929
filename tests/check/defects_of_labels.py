"""Defects of tables, localizers, masks and folds. Importing this module registers them."""

import ast
import shutil

import nibabel
import numpy as np
import pydicom
from phantom_copy import Series, defect
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS

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


def show_images_of(other: Series, series: Series, same_fold: bool) -> None:
    """The images of a clean series under the UIDs of this one, without its masks."""
    uid, patient = series.uid, series.patient
    folds = dict(series.copy.folds)
    folds[patient] = folds[other.patient] if same_fold else 1 - folds[other.patient]
    series.copy.folds[:] = folds.items()
    shutil.rmtree(series.folder)
    series.folder.mkdir()
    for i, path in enumerate(other.files):
        slice_ = pydicom.dcmread(path)
        slice_.SeriesInstanceUID, slice_.PatientID = uid, patient
        slice_.StudyInstanceUID = f"{uid[:-4]}.9"
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{uid[:-4]}.{i}"
        slice_.save_as(series.folder / f"{uid[:-4]}.{i}.dcm", enforce_file_format=True)
    for kind in ("cowseg", "aneurysm"):
        series.mask(kind).unlink()
    for key in ("Modality", "PatientAge", "PatientSex", *LABEL_COLUMNS):
        series.row[key] = other.row[key]


@defect("duplicate-images", positive=False)
def _(series: Series) -> None:
    show_images_of(series.copy.spare[1], series, same_fold=True)


@defect("duplicate-across-folds", positive=False)
def _(series: Series) -> None:
    show_images_of(series.copy.spare[2], series, same_fold=False)


@defect("patient-in-two-folds", positive=False)
def _(series: Series) -> None:
    fold = dict(series.copy.folds)[series.patient]
    series.copy.folds.append((series.patient, 1 - fold))


@defect("patient-without-fold", positive=False)
def _(series: Series) -> None:
    series.copy.folds[:] = [pair for pair in series.copy.folds if pair[0] != series.patient]
