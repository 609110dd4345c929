"""Stored pixel values of DICOM files, image by image, so that memory holds one image beside the volume.

Uncompressed images are read straight from their place in the file into one buffer. Compressed ones go
through permissively licensed decoders: pylibjpeg-rle, CharLS, OpenJPEG, and libjpeg-turbo for all JPEG.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import imagecodecs
import numpy as np
from pydicom import dcmread
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from rle.utils import decode_pixel_data as decode_rle

from aneurysm.data.dicom.headers import Header, broken_as_read_error, skip_element_start
from aneurysm.data.errors import ReadError

_JPEG = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
_PLUGINS = {  # transfer syntax: pydicom's name of the decoder
    JPEGLSLossless: "pyjpegls", JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg", JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg", HTJ2KLosslessRPCL: "pylibjpeg", HTJ2K: "pylibjpeg",
}  # fmt: skip
_PIXEL_DATA = 0x7FE00010
_FLOATS = {0x7FE00008: np.dtype(np.float32), 0x7FE00009: np.dtype(np.float64)}
_KINDS = (_PIXEL_DATA, *_FLOATS)
_UNDEFINED = 0xFFFFFFFF
_TRAILING = 1024  # some writers fill up the pixel data to a round number of bytes
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True)
class PixelFormat:
    """How one file stores its images."""

    syntax: UID
    frames: int
    shape: tuple[int, int]  # rows, columns
    allocated: int  # bits of storage per pixel
    stored: int  # bits of it that hold the value
    high_bit: int  # the value's most significant bit
    signed: bool
    inverted: bool  # MONOCHROME1: the lowest value is meant to be white
    padding: int | None  # the bits that mark pixels outside the scanner's field of view

    @classmethod
    def of(cls, header: Header) -> "PixelFormat":
        """The format that a header declares.

        Raises:
            ReadError: it is none that a scan can have.
        """
        allocated = header.integer("BitsAllocated", 16)
        stored = header.integer("BitsStored", allocated)
        high_bit = header.integer("HighBit", stored - 1)
        photometric = header.text("PhotometricInterpretation") or "MONOCHROME2"
        if (
            allocated not in (8, 16, 32, 64)
            or not 1 <= stored <= allocated
            or not stored - 1 <= high_bit < allocated
        ):
            raise ReadError(
                f"{header.path}: {stored} bits of {allocated}, highest {high_bit}, are no grey values. "
                "Export the file again."
            )
        if not photometric.startswith("MONOCHROME"):
            raise ReadError(
                f"{header.path}: photometric interpretation {photometric} (screenshot?), not a scan. "
                "Remove it from the series."
            )
        padding = header.integer("PixelPaddingValue", -1)
        return cls(
            header.syntax, header.integer("NumberOfFrames", 1) or 1,
            (header.integer("Rows"), header.integer("Columns")), allocated, stored, high_bit,
            bool(header.integer("PixelRepresentation")), photometric == "MONOCHROME1",
            None if padding < 0 or allocated != 16 else padding,
        )  # fmt: skip

    @property
    def dtype(self) -> np.dtype:
        """Of whole numbers."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest value that the stored bits can hold."""
        half = 1 << (self.stored - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    @property
    def padding_is_bright(self) -> bool:
        """Whether the padding lies in the upper half of the range, as -2000 does in unsigned values."""
        return self.padding is not None and not self.signed and self.padding >= 1 << (self.stored - 1)


def stored_images(header: Header, layout: PixelFormat, remarks: Counter[str]) -> Iterator[np.ndarray]:
    """The images (rows, columns) of one file in order, decoded one by one.

    An image may be overwritten by the next one. Bits outside the stored ones are cut off and counted in
    `remarks`; padding that would shine is set to the lowest value of its image.

    Raises:
        ReadError: no pixel data, fewer or more than the header says, or no decoder reads them.
    """
    problem = f"the pixels ({header.syntax.name}) cannot be decoded; the file is truncated or damaged"
    with broken_as_read_error(header.path, problem):
        for image in _raw_images(header, layout, remarks):
            if image.shape != layout.shape:
                raise ReadError(
                    f"{header.path}: pixels are {image.shape} but the header says {layout.shape}. "
                    "Export the file again."
                )
            yield _values(image, layout, remarks)


def _raw_images(header: Header, layout: PixelFormat, remarks: Counter[str]) -> Iterator[np.ndarray]:
    if header.deflated or (layout.allocated == 8 and not header.little):
        yield from _by_pydicom(header, layout, remarks)
        return
    with open(header.path, "rb", buffering=0) as file:
        file.seek(header.pixels_at)
        tag, length = skip_element_start(file, header)
        if tag not in _KINDS:
            raise ReadError(
                f"{header.path}: no pixel data (a truncated or header-only file). Export it again."
            )
        if header.syntax.is_encapsulated:
            yield from _encapsulated(file, length, header, layout)
        else:
            yield from _plain(file, tag, length, header, layout, remarks)


def _plain(
    file: BinaryIO, tag: int, length: int, header: Header, layout: PixelFormat, remarks: Counter[str]
) -> Iterator[np.ndarray]:
    dtype = layout.dtype if tag == _PIXEL_DATA else _FLOATS[tag]
    image = np.empty(layout.shape, dtype if header.little else dtype.newbyteorder(">"))
    _check_length(length, image.nbytes, header, layout, remarks)
    memory = image.data.cast("B")
    for _ in range(layout.frames):
        done = 0
        while done < image.nbytes:
            if not (more := file.readinto(memory[done:])):  # type: ignore[attr-defined]
                raise ReadError(
                    f"{header.path}: the file ends within its pixels (truncated). Export it again."
                )
            done += more
        yield image if header.little else image.astype(dtype)


def _check_length(
    length: int, per_image: int, header: Header, layout: PixelFormat, remarks: Counter[str]
) -> None:
    expected = per_image * layout.frames
    if expected <= length < expected + min(per_image, _TRAILING):
        remarks["trailing"] += length > expected + 1  # one byte makes the length even
        return
    if length == _UNDEFINED:
        raise ReadError(f"{header.path}: compressed pixels in a file that says {header.syntax.name}.")
    raise ReadError(
        f"{header.path}: {length} bytes of pixels, but {layout.frames} image(s) of {layout.shape[0]} x "
        f"{layout.shape[1]} need {expected}. The file is truncated or its header wrong; export it again."
    )


def _encapsulated(file: BinaryIO, length: int, header: Header, layout: PixelFormat) -> Iterator[np.ndarray]:
    if length != _UNDEFINED:
        raise ReadError(f"{header.path}: uncompressed pixels in a file that says {header.syntax.name}.")
    _check_fragments(file, header)
    if header.syntax == RLELossless or header.syntax in _JPEG:
        decode = _rle if header.syntax == RLELossless else _jpeg
        for frame in islice(generate_frames(file, number_of_frames=layout.frames), layout.frames):
            yield decode(frame, layout)
        return
    if header.syntax not in _PLUGINS:
        raise ReadError(
            f"{header.path}: the compression {header.syntax.name} is no known image format. "
            "Export the series uncompressed."
        )
    arrays = get_decoder(header.syntax).iter_array(
        file,
        raw=True,
        decoding_plugin=_PLUGINS[header.syntax],
        rows=layout.shape[0],
        columns=layout.shape[1],
        number_of_frames=layout.frames,
        samples_per_pixel=1,
        photometric_interpretation="MONOCHROME2",
        bits_allocated=layout.allocated,
        bits_stored=layout.stored,
        pixel_representation=int(layout.signed),
        pixel_keyword="PixelData",
    )
    for image, _ in islice(arrays, layout.frames):
        yield image


def _rle(frame: bytes, layout: PixelFormat) -> np.ndarray:
    rows, columns = layout.shape
    try:
        decoded = decode_rle(frame, version=2, rows=rows, columns=columns, bits_allocated=layout.allocated)
    except BaseException as error:  # a panic of the Rust code is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise ValueError(str(error)) from error
    return np.frombuffer(decoded, layout.dtype).reshape(layout.shape)


def _jpeg(frame: bytes, layout: PixelFormat) -> np.ndarray:
    if not frame.rstrip(b"\0").endswith(b"\xff\xd9"):  # the decoder would fill up the rest
        raise ValueError("its JPEG image has no end")
    image = imagecodecs.jpeg8_decode(frame)
    same_size = image.dtype.itemsize == layout.dtype.itemsize
    return image.view(layout.dtype) if same_size else image.astype(layout.dtype)


def _check_fragments(file: BinaryIO, header: Header) -> None:
    """Walk over the compressed pieces: decoders fill up what is missing without a word."""
    begin = file.tell()
    size = file.seek(0, 2)
    at = begin
    while at < size:
        file.seek(at)
        start = file.read(8)
        if start[:4] == _DELIMITER:
            break
        at += 8 + int.from_bytes(start[4:], "little")
        if len(start) < 8 or start[:4] != _ITEM or at > size:
            raise ReadError(
                f"{header.path}: its compressed pixels end early (truncated) or are damaged. Export it again."
            )
    file.seek(begin)


def _by_pydicom(header: Header, layout: PixelFormat, remarks: Counter[str]) -> Iterator[np.ndarray]:
    """Rare encodings, with the whole file in memory."""
    dataset = dcmread(header.path)
    if "PixelData" not in dataset:
        raise ReadError(f"{header.path}: no pixel data (a truncated or header-only file). Export it again.")
    per_image = layout.shape[0] * layout.shape[1] * layout.allocated // 8
    _check_length(len(dataset.PixelData), per_image, header, layout, remarks)
    pixels = dataset.pixel_array
    yield from pixels.reshape(layout.frames, *layout.shape)


def _values(image: np.ndarray, layout: PixelFormat, remarks: Counter[str]) -> np.ndarray:
    """The numbers that the stored bits mean."""
    if image.dtype.kind == "f":
        return image
    padding = image == layout.padding if layout.padding_is_bright else None
    spare = layout.allocated - layout.stored
    if spare and image.dtype.itemsize * 8 == layout.allocated:
        image = _without_spare_bits(image, layout, remarks)
    if padding is not None and padding.any() and not padding.all():
        remarks["padding"] += 1
        image = np.where(padding, image[~padding].min(), image)
    return image


def _without_spare_bits(image: np.ndarray, layout: PixelFormat, remarks: Counter[str]) -> np.ndarray:
    above = layout.allocated - 1 - layout.high_bit
    below = layout.high_bit + 1 - layout.stored
    if not below:
        low, high = layout.limits
        if image.min() >= low and image.max() <= high:
            return image
        remarks["spare bits"] += 1
    # Old scanners keep overlays above the value; shifting up and down again cuts them off and keeps the sign.
    return np.right_shift(np.left_shift(image, above), above + below)
