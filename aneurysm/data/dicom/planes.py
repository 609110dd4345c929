"""The pixels of a stack: decoded file by file, rescaled once, written straight to where they belong."""

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aneurysm.data.dicom.headers import Header
from aneurysm.data.dicom.hounsfield import intercept_is_lost, is_hounsfield_already
from aneurysm.data.dicom.pixels import PixelFormat, stored_images
from aneurysm.data.dicom.slices import Slice
from aneurysm.data.errors import ReadError

_SAMPLED = 4  # every 4th row and column tells the kind of values
_BLOCK = 16  # planes that are turned together: 16 float32 fill a cache line


@dataclass(frozen=True, eq=False)
class Planes:
    """Where the images of a series are stored and what their values mean."""

    headers: dict[Path, Header]
    ct: bool

    def stored(self, s: Slice) -> np.ndarray:
        """The stored values (rows, columns) of one image.

        Raises:
            ReadError: they cannot be decoded.
        """
        header = self.headers[s.path]
        for frame, image in enumerate(stored_images(header, PixelFormat.of(header), Counter())):
            if frame == (s.frame or 0):
                return image
        raise self._too_few(s.path, frame + 1 if (s.frame or 0) else 0)

    def same(self, one: Slice, other: Slice) -> bool:
        """Whether two images show the same values."""
        if (one.slope, one.intercept) != (other.slope, other.intercept):
            return False
        return np.array_equal(self.stored(one).copy(), self.stored(other))

    def fill(self, volume: np.ndarray, slices: list[Slice], threads: int, notes: list[str]) -> None:
        """Write the rescaled images into `volume` (n, rows, columns) float32, a view of any layout.

        Memory beside the volume is one image per thread.

        Raises:
            ReadError: an image cannot be decoded.
        """
        wanted: dict[Path, dict[int, int]] = defaultdict(dict)  # frame -> place in the volume
        for i, s in enumerate(slices):
            wanted[s.path][s.frame or 0] = i
        sample = None
        if self.ct:
            rows, columns = volume[0, ::_SAMPLED, ::_SAMPLED].shape
            sample = np.zeros((len(slices), rows, columns), dtype=np.float32)

        def read(paths: list[Path]) -> Counter[str]:
            writer, remarks = _Writer(volume), Counter()
            for path in paths:
                self._read_file(path, wanted[path], slices, writer, sample, remarks)
            writer.flush()
            return remarks

        paths = list(wanted)
        if threads == 1:
            remarks = read(paths)
        else:
            share = -(-len(paths) // threads)
            with ThreadPoolExecutor(threads) as pool:
                parts = [paths[i : i + share] for i in range(0, len(paths), share)]
                remarks = sum(pool.map(read, parts), Counter())
        if sample is not None:
            self._check_hounsfield(volume, slices, sample, notes)
        self._note(remarks, notes)

    def _read_file(
        self,
        path: Path,
        wanted: dict[int, int],
        slices: list[Slice],
        writer: "_Writer",
        sample: np.ndarray | None,
        remarks: Counter[str],
    ) -> None:
        header = self.headers[path]
        layout = PixelFormat.of(header)
        left = len(wanted)
        count = 0
        for frame, image in enumerate(stored_images(header, layout, remarks)):
            count = frame + 1
            if (i := wanted.get(frame)) is None:
                continue
            if image.dtype.kind == "f" and not np.isfinite(image).all():
                raise ReadError(f"{path}: some pixels are NaN or infinite. Export the series again.")
            if sample is not None:
                sample[i] = image[::_SAMPLED, ::_SAMPLED]
            if layout.inverted:
                remarks["inverted"] += 1
                if not self.ct and image.dtype.kind != "f":
                    image = np.float32(sum(layout.limits)) - image
            writer.put(i, image, slices[i].slope, slices[i].intercept)
            left -= 1
            if not left:
                return
        raise self._too_few(path, count)

    def _check_hounsfield(
        self, volume: np.ndarray, slices: list[Slice], sample: np.ndarray, notes: list[str]
    ) -> None:
        if any(s.slope != 1 for s in slices):
            return
        intercepts = np.array([s.intercept for s in slices])
        if is_hounsfield_already(sample, float(intercepts.max())):
            notes.append("stored values are Hounsfield units already; the rescale intercept was not applied")
            for plane, intercept in zip(volume, intercepts, strict=True):
                plane -= np.float32(intercept)
        elif self._without_intercept(slices) and intercept_is_lost(sample):
            notes.append("no rescale intercept in the header; soft tissue lies at 1024, so -1024 was applied")
            volume -= np.float32(1024)

    def _without_intercept(self, slices: list[Slice]) -> bool:
        missing = all(header.numbers("RescaleIntercept") is None for header in self.headers.values())
        return missing and not any(s.intercept for s in slices)

    def _note(self, remarks: Counter[str], notes: list[str]) -> None:
        if n := remarks["spare bits"]:
            notes.append(f"bits outside the stored ones (an overlay?) were cut off in {n} images")
        if n := remarks["padding"]:
            notes.append(f"padding, stored as a high value, was set to the lowest value in {n} images")
        if n := remarks["trailing"]:
            notes.append(f"bytes behind the pixels were passed over in {n} files")
        if n := remarks["inverted"]:
            what = "values are Hounsfield units all the same" if self.ct else "values were inverted"
            notes.append(f"{n} images are MONOCHROME1; {what}")

    def _too_few(self, path: Path, count: int) -> ReadError:
        return ReadError(f"{path}: only {count} of its images could be read (truncated). Export it again.")


class _Writer:
    """Rescales images into a volume; where its rows do not lie together, a block of images at a time."""

    def __init__(self, volume: np.ndarray) -> None:
        self._volume = volume
        strides = [abs(s) for s in volume.strides]
        turned = strides[0] < max(strides[1:])
        self._block = np.empty((_BLOCK, *volume.shape[1:]), np.float32) if turned else None
        self._first = self._count = 0

    def put(self, i: int, image: np.ndarray, slope: float, intercept: float) -> None:
        if self._block is None:
            out = self._volume[i]
        else:
            if self._count == _BLOCK or (self._count and i != self._first + self._count):
                self.flush()
            if not self._count:
                self._first = i
            out = self._block[self._count]
            self._count += 1
        if slope == 1:
            np.add(image, np.float32(intercept), out=out, casting="same_kind")
        elif intercept == 0:
            np.multiply(image, np.float32(slope), out=out, casting="same_kind")
        else:
            # A sum of two terms loses digits in float32; a product alone does not.
            out[...] = np.multiply(image, slope, dtype=np.float64) + intercept

    def flush(self) -> None:
        if self._block is not None and self._count:
            self._volume[self._first : self._first + self._count] = self._block[: self._count]
        self._count = 0
