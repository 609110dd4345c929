"""The header of one DICOM file: the tags that geometry, labels, modality and pixels need, and nothing else.

Only the tags of `HEADER_TAGS` are kept and reading stops before the pixels. Values that every slice of a
series needs are taken from the raw bytes, because pydicom's full conversion costs more than the pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import Dataset
from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.filereader import data_element_generator, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from aneurysm.data.errors import ReadError

HEADER_TAGS = [
    "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality", "PatientID", "PatientAge", "PatientSex",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "InstanceNumber",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "SeriesDescription", "ProtocolName", "SequenceName", "PulseSequenceName", "ScanningSequence",
    "SequenceVariant", "ContrastBolusAgent", "AngioFlag", "EchoTime", "RepetitionTime", "InversionTime",
]  # fmt: skip

_TAGS: dict[str, int] = {keyword: tag_for_keyword(keyword) or 0 for keyword in HEADER_TAGS}
_WANTED: list[BaseTag | int] = [BaseTag(tag) for tag in _TAGS.values()]
_SYNTAX, _CHARSET = 0x00020010, 0x00080005
_LITTLE_ENDIAN = {str(u): u for u in AllTransferSyntaxes if u.is_little_endian and not u.is_deflated}
_FIRST_PIXEL_TAG = 0x7FE00008  # FloatPixelData, DoubleFloatPixelData and PixelData follow each other
_MAGIC_AT = 128
_LONGEST = 128  # characters of a UID or a code string
# A data set without file meta information starts in group 0002 or 0008.
_BARE_STARTS = (
    b"\x02\0\0\0",
    b"\x08\0\0\0",
    b"\x08\0\x05\0",
    b"\x08\0\x08\0",
    b"\x08\0\x16\0",
    b"\x08\0\x18\0",
)

Elements = dict[int, RawDataElement | DataElement]


class Header:
    """The tags of one file, where its pixels start, and how they are encoded.

    Every accessor raises ReadError, with the file and the tag, for values that cannot be understood.
    """

    def __init__(
        self, path: Path, elements: Elements, syntax: UID, implicit: bool, little: bool, pixels_at: int
    ) -> None:
        self.path = path
        self.syntax = syntax
        self.implicit, self.little = implicit, little  # the encoding of the tags
        self.pixels_at = pixels_at  # byte offset of the pixel data element, or of the end of the file
        self.has_meta = True
        self._elements = elements

    @property
    def deflated(self) -> bool:
        """Whether the file is compressed as a whole, so that `pixels_at` is no place in it."""
        return self.syntax == DeflatedExplicitVRLittleEndian

    def get(self, keyword: str, default: Any = None) -> Any:
        """A tag as pydicom converts it, `default` when it is absent or not among `HEADER_TAGS`."""
        if _TAGS.get(keyword) not in self._elements:
            return default
        try:
            return self._dataset.get(keyword, default)
        except Exception as error:  # the conversion of broken values raises many types
            raise self._unclear(keyword, error) from error

    def __getattr__(self, keyword: str) -> Any:
        """`header.Rows` as with a pydicom data set."""
        if _TAGS.get(keyword) not in self.__dict__.get("_elements", {}):
            raise AttributeError(f"{self.__dict__.get('path')}: the header has no {keyword}")
        return self.get(keyword)

    @cached_property
    def _dataset(self) -> Dataset:
        dataset = Dataset({BaseTag(tag): element for tag, element in self._elements.items()})
        charset = self._elements.get(_CHARSET)
        value = getattr(charset, "value", None)
        encoding = convert_encodings(_text(value).split("\\")) if value else default_encoding
        dataset.set_original_encoding(self.implicit, self.little, encoding)
        return dataset

    def text(self, keyword: str) -> str:
        """A tag of plain characters, '' when it is absent or empty; cut where a broken file makes it long."""
        value = self._raw(keyword)
        text = "" if value is None else _text(value)
        return text if text.isprintable() and len(text) <= _LONGEST else repr(text[:_LONGEST])

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """A tag of decimal numbers, None when it is absent or empty."""
        value = self._raw(keyword)
        try:
            if isinstance(value, bytes):
                parts = value.strip(b" \0").split(b"\\")
                return tuple(map(float, parts)) if parts != [b""] else None
            if value is None or value == "":
                return None
            return tuple(float(v) for v in value) if hasattr(value, "__iter__") else (float(value),)
        except (TypeError, ValueError) as error:
            raise self._unclear(keyword, error) from error

    def number(self, keyword: str) -> float | None:
        """The first of `numbers`."""
        values = self.numbers(keyword)
        return None if values is None else values[0]

    def integer(self, keyword: str, default: int = 0) -> int:
        """A whole number, `default` when it is absent or empty; stored two's complement reads as unsigned."""
        value = self._raw(keyword)
        if isinstance(value, bytes) and keyword != "NumberOfFrames":  # that one is text
            return int.from_bytes(value[:2], "little" if self.little else "big") if value else default
        try:
            value = _text(value) if isinstance(value, bytes) else value
            return default if value in (None, "") else int(float(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise self._unclear(keyword, error) from error

    def _raw(self, keyword: str) -> Any:
        """Bytes as stored where pydicom has not converted them; else its value."""
        item = self._elements.get(_TAGS[keyword])
        if item is None:
            return None
        if type(item) is RawDataElement and type(item.value) is bytes and item.VR not in ("FD", "FL"):
            return item.value
        return self.get(keyword)

    def _unclear(self, keyword: str, error: Exception) -> ReadError:
        reason = " ".join(str(error).split())[:120]
        return ReadError(f"{self.path}: {keyword} cannot be understood ({reason}). Export the file again.")


def read_header(path: Path) -> Header:
    """The tags of one file that geometry, labels, modality and pixels need; no pixels.

    A file without the 'DICM' marker is read when it starts as a DICOM data set does.

    Raises:
        ReadError: not a DICOM file, or broken before its pixels.
    """
    path = Path(path)
    with broken_as_read_error(path, "broken DICOM header"), open(path, "rb") as file:
        start = file.read(_MAGIC_AT + 4)
        if start[_MAGIC_AT:] != b"DICM" and start[:4] not in _BARE_STARTS:
            raise InvalidDicomError
        return _usual(path, file) or _unusual(path, file, start[_MAGIC_AT:] != b"DICM")


def _usual(path: Path, file: BinaryIO) -> Header | None:
    """Little endian with file meta information; a file object after the 'DICM' marker."""
    meta = data_element_generator(file, False, True, stop_when=_after_meta)
    syntax = next((_text(e.value) for e in meta if e.tag + 0 == _SYNTAX and e.value), "")
    if syntax not in _LITTLE_ENDIAN:
        return None
    for _ in meta:
        pass
    implicit = syntax == ImplicitVRLittleEndian
    # Some writers lie about the encoding: an explicit tag has its two letters behind it.
    peek = file.read(6)[4:]
    file.seek(-len(peek) - 4, 1)
    if len(peek) < 2 or peek.isalpha() == implicit:
        return None
    elements: Elements = {  # by plain numbers: pydicom's tags are slow to compare
        e.tag + 0: e
        for e in data_element_generator(file, implicit, True, stop_when=_at_pixels, specific_tags=_WANTED)
    }
    return Header(path, elements, _LITTLE_ENDIAN[syntax], implicit, True, file.tell())


def _unusual(path: Path, file: BinaryIO, bare: bool) -> Header:
    """Whatever else pydicom can make sense of."""
    file.seek(0)
    tags = read_partial(file, _at_pixels, specific_tags=_WANTED, force=bare)
    if bare and not tags.get("SOPClassUID"):
        raise InvalidDicomError
    implicit, little = bool(tags.original_encoding[0]), tags.original_encoding[1] is not False
    syntax = tags.file_meta.get("TransferSyntaxUID")
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    guessed = ImplicitVRLittleEndian if implicit else explicit
    elements: Elements = {tag + 0: tags.get_item(tag) for tag in list(tags.keys())}
    header = Header(path, elements, UID(str(syntax or guessed)), implicit, little, file.tell())
    header.has_meta = bool(syntax)
    return header


def _after_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    return int.__ge__(tag, 0x00030000)


def _at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
    return int.__ge__(tag, _FIRST_PIXEL_TAG)  # BaseTag's own comparison is slow and runs once per tag


@contextmanager
def broken_as_read_error(name: Path | str, problem: str) -> Iterator[None]:
    """Turns whatever a broken file makes the libraries raise into a ReadError that names the file."""
    try:
        yield
    except ReadError:
        raise
    except InvalidDicomError as error:
        raise ReadError(
            f"{name}: not a DICOM file (no 'DICM' marker). Remove it from the folder or export it again."
        ) from error
    except OSError as error:
        raise ReadError(f"{name}: cannot be opened ({error.strerror or error}).") from error
    except Exception as error:  # pydicom and the decoders raise many types on broken files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ReadError(f"{name}: {problem} ({reason}). Export the file again.") from error


def _text(value: bytes | str) -> str:
    return (value.decode("latin-1") if isinstance(value, bytes) else str(value)).strip(" \0")


def skip_element_start(file: BinaryIO, header: Header) -> tuple[int, int]:
    """Read the start of the pixel data element: (its tag, its length in bytes); 0, 0 at the end of a file."""
    start = file.read(8)
    if len(start) < 8:
        return 0, 0
    order = "little" if header.little else "big"
    tag = int.from_bytes(start[:2], order) << 16 | int.from_bytes(start[2:4], order)
    long_form = not header.implicit and start[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN", b"OL", b"OV")
    length = int.from_bytes(file.read(4) if long_form else start[4:8], order)
    return tag, length
