"""Defects of files, geometry and intensities. Importing this module registers them."""

import shutil

import numpy as np
import pydicom
from phantom_copy import Series, defect
from pydicom.dataset import Dataset

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
