"""The headers of one folder of DICOM files: what is readable, which series it is, what is cut off."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from aneurysm.check.findings import Collector
from aneurysm.data.dicom.headers import HEADER_TAGS

TAGS: Final = [*HEADER_TAGS, "StudyInstanceUID", "FrameOfReferenceUID"]
_GEOMETRY: Final = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_LISTED: Final = 3  # file names in a message


@dataclass(frozen=True)
class Folder:
    """The readable images of a folder by series, and the files that are none."""

    series: dict[str, dict[Path, Dataset]] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)  # image files that cannot be opened -> why
    strays: tuple[Path, ...] = ()  # no DICOM, or DICOM without an image
    header_bytes: dict[Path, int] = field(default_factory=dict)  # where the pixels begin


def read_folder(files: tuple[Path, ...]) -> Folder:
    """Read all headers; nothing is raised for a single file."""
    series: dict[str, dict[Path, Dataset]] = {}
    broken: dict[Path, str] = {}
    strays = []
    header_bytes = {}
    for path in files:
        if not path.is_file():
            broken[path] = "a link without content"
            continue
        try:
            with path.open("rb") as file:
                header = dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
                header_bytes[path] = file.tell()
            usable = bool(header.get("Rows")) and bool(header.get("SeriesInstanceUID"))
        except InvalidDicomError:
            if path.suffix.lower() == ".dcm":
                broken[path] = "no DICOM file (no 'DICM' marker)"
            else:
                strays.append(path)
            continue
        except Exception as error:  # pydicom raises many types on broken files
            broken[path] = " ".join(str(error).split())[:160] or type(error).__name__
            continue
        if usable:
            series.setdefault(str(header.SeriesInstanceUID), {})[path] = header
        else:
            strays.append(path)
    return Folder(series, broken, tuple(strays), header_bytes)


def check_files(folder: Folder, found: Collector) -> None:
    """Files that cannot be opened, and files that are no images."""
    links = [path for path, why in folder.broken.items() if why.startswith("a link")]
    if links:
        found.add("missing-file", f"{len(links)} file(s) have no content: {names(links)}.")
    for path, why in folder.broken.items():
        if path not in links:
            found.add("unreadable-file", f"{path.name}: {why}.")
    if folder.strays:
        found.add("stray-file", f"{len(folder.strays)} file(s): {names(folder.strays)}.")


def check_headers(headers: dict[Path, Dataset], header_bytes: dict[Path, int], found: Collector) -> None:
    """Tags and file sizes of the images of one series.

    Args:
        header_bytes: of each file, what comes before its pixels.
    """
    absent = Counter(
        tag
        for header in headers.values()
        for tag in _GEOMETRY
        if not header.get("PerFrameFunctionalGroupsSequence")
        and not header.get("SharedFunctionalGroupsSequence")
        and header.get(tag) in (None, "")
    )
    if absent:
        listed = ", ".join(f"{tag} in {n}" for tag, n in absent.items())
        found.add("missing-geometry", f"Missing: {listed} of {len(headers)} images.")
    first = next(iter(headers.values()))
    unknown = [
        tag for tag in ("PatientID", "Modality", "StudyInstanceUID") if not str(first.get(tag) or "").strip()
    ]
    if unknown:
        found.add("missing-tags", f"Missing: {', '.join(unknown)}.")
    sizes = {path: _cut_off(path, header, header_bytes[path]) for path, header in headers.items()}
    short = [(path, size) for path, size in sizes.items() if size]
    if short:
        path, (stored, needed) = short[0]
        text = f"{len(short)} file(s), first {path.name}: {stored} of {needed} bytes."
        found.add("truncated-file", text)
    slopes = {
        (str(h.get("RescaleSlope") or 1), str(h.get("RescaleIntercept") or 0)) for h in headers.values()
    }
    if len(slopes) > 1:
        found.add(
            "varying-rescale", f"{len(slopes)} different slopes and intercepts in {len(headers)} images."
        )


def names(paths: list[Path] | tuple[Path, ...]) -> str:
    """The first few file names."""
    more = len(paths) - _LISTED
    return ", ".join(path.name for path in paths[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _cut_off(path: Path, header: Dataset, header_bytes: int) -> tuple[int, int] | None:
    """Bytes on disk and bytes needed, when an uncompressed file is too short for its pixels."""
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    # Deflated files are compressed as a whole, although they are not called encapsulated.
    if syntax is None or syntax.is_compressed or syntax.is_deflated:
        return None
    try:
        frames = int(header.get("NumberOfFrames") or 1)
        samples = int(header.get("SamplesPerPixel") or 1)
        bits = int(header.get("BitsAllocated") or 0)
        pixels = int(header.Rows) * int(header.Columns) * frames * samples * bits // 8
    except (TypeError, ValueError):
        return None
    stored, needed = path.stat().st_size, header_bytes + pixels
    return (stored, needed) if stored < needed else None
