"""The headers of one folder of DICOM files: what is readable, which series it is, what is cut off."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from aneurysm.check.findings import Collector
from aneurysm.data.dicom.headers import Header, read_header
from aneurysm.data.errors import ReadError
from aneurysm.data.sources.rsna import PLACEHOLDER_IDS

_GEOMETRY: Final = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_GROUPS: Final = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_LISTED: Final = 3  # file names in a message


@dataclass(frozen=True)
class Folder:
    """The readable images of a folder by series, and the files that are none."""

    series: dict[str, dict[Path, Header]] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)  # image files that cannot be opened -> why
    strays: tuple[Path, ...] = ()  # no DICOM, or DICOM without an image


def read_folder(files: tuple[Path, ...]) -> Folder:
    """Read all headers as the reader does; nothing is raised for a single file."""
    series: dict[str, dict[Path, Header]] = {}
    broken: dict[Path, str] = {}
    strays = []
    for path in files:
        if not path.is_file():
            broken[path] = "a link without content"
            continue
        try:
            header = read_header(path)
            uid = header.text("SeriesInstanceUID") if header.integer("Rows") else ""
            # A sequence that cannot be read spoils the header for every check.
            for keyword in _GROUPS:
                header.get(keyword)
        except ReadError as error:
            if isinstance(error.__cause__, InvalidDicomError) and path.suffix.lower() != ".dcm":
                strays.append(path)
            else:
                broken[path] = str(error).removeprefix(f"{path}: ").rstrip(".")
            continue
        if uid:
            series.setdefault(uid, {})[path] = header
        else:
            strays.append(path)
    return Folder(series, broken, tuple(strays))


def study_uid(path: Path) -> str:
    """StudyInstanceUID of a file, which the reader does not keep; '' when there is none."""
    try:
        tags = dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"], force=True)
        return str(tags.get("StudyInstanceUID") or "").strip()
    except Exception:  # its other faults have been named
        return ""


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


def check_headers(headers: dict[Path, Header], study: str, found: Collector) -> None:
    """Tags and file sizes of the images of one series.

    Args:
        study: its StudyInstanceUID, '' when there is none.
    """
    absent = Counter(
        tag
        for header in headers.values()
        for tag in _GEOMETRY
        if not said(header, tag) and not any(header.get(keyword) for keyword in _GROUPS)
    )
    if absent:
        listed = ", ".join(f"{tag} in {n}" for tag, n in absent.items())
        found.add("missing-geometry", f"Missing: {listed} of {len(headers)} images.")
    first = next(iter(headers.values()))
    unknown = [tag for tag in ("PatientID", "Modality") if not said(first, tag)]
    if said(first, "PatientID").lower() in PLACEHOLDER_IDS - {""}:
        unknown.append(f"PatientID (it is {said(first, 'PatientID')!r})")
    unknown += [] if study else ["StudyInstanceUID"]
    if unknown:
        found.add("missing-tags", f"Missing: {', '.join(unknown)}.")
    sizes = {path: _cut_off(header) for path, header in headers.items()}
    short = [(path, size) for path, size in sizes.items() if size]
    if short:
        path, (stored, needed) = short[0]
        text = f"{len(short)} file(s), first {path.name}: {stored} of {needed} bytes."
        found.add("truncated-file", text)
    slopes = {(said(h, "RescaleSlope") or "1", said(h, "RescaleIntercept") or "0") for h in headers.values()}
    if len(slopes) > 1:
        found.add(
            "varying-rescale", f"{len(slopes)} different slopes and intercepts in {len(headers)} images."
        )


def names(paths: list[Path] | tuple[Path, ...]) -> str:
    """The first few file names."""
    more = len(paths) - _LISTED
    return ", ".join(path.name for path in paths[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def said(header: Header, keyword: str) -> str:
    """A tag in words, '' when it is absent or empty, '?' when it cannot be understood."""
    try:
        return header.text(keyword).strip()
    except ReadError:
        return "?"


def _cut_off(header: Header) -> tuple[int, int] | None:
    """Bytes on disk and bytes needed, when an uncompressed file is too short for its pixels."""
    # Deflated files are compressed as a whole, although they are not called encapsulated.
    if not header.syntax.is_transfer_syntax or header.syntax.is_compressed or header.syntax.is_deflated:
        return None
    try:
        frames = header.integer("NumberOfFrames", 1) or 1
        values = header.integer("Rows") * header.integer("Columns") * header.integer("SamplesPerPixel", 1)
        pixels = values * frames * header.integer("BitsAllocated") // 8
    except ReadError:
        return None
    stored, needed = header.path.stat().st_size, header.pixels_at + pixels
    return (stored, needed) if stored < needed else None
