"""DICOM series to scans: grouped by SeriesInstanceUID, sorted in space, rescaled once, checked for gaps."""

import logging
from collections import defaultdict
from pathlib import Path

import numpy as np

from aneurysm.data.dicom.headers import Header, broken_as_read_error, read_header
from aneurysm.data.dicom.modality import age_of, modality_of, sex_of
from aneurysm.data.dicom.planes import Planes
from aneurysm.data.dicom.slices import Slice, SliceIndex, frames_are_placed, slices_of
from aneurysm.data.dicom.stack import Stack, names, stack_of
from aneurysm.data.errors import ReadError
from aneurysm.data.resample import canonical_axes
from aneurysm.data.scan import Grid, Scan

log = logging.getLogger(__name__)


def find_series(folder: Path | str) -> dict[str, list[Path]]:
    """All DICOM images under a folder, grouped by series; the layout of sub-folders does not matter.

    Files that are not DICOM images are passed over; a `.dcm` file among them is logged.

    Returns:
        {SeriesInstanceUID: sorted paths}.

    Raises:
        ReadError: the folder is missing, or there is no DICOM image in it.
    """
    series: dict[str, list[Path]] = defaultdict(list)
    first_problem = None
    for path in _files_in(Path(folder)):
        try:
            header = read_header(path)
            if not header.integer("Rows"):
                continue
        except ReadError as error:
            if path.suffix.lower() == ".dcm":
                log.warning("%s", error)
                first_problem = first_problem or error
            continue
        if uid := header.text("SeriesInstanceUID"):
            series[uid].append(path)
    if not series:
        raise first_problem or ReadError(f"{folder}: no DICOM image in this folder. Is it the right folder?")
    return dict(series)


def read_series(files: list[Path] | Path | str, modality: str | None = None, threads: int = 1) -> Scan:
    """Read one series as a canonical scan; see `read_series_with_slices`."""
    return read_series_with_slices(files, modality, threads)[0]


def read_series_with_slices(
    files: list[Path] | Path | str, modality: str | None = None, threads: int = 1
) -> tuple[Scan, SliceIndex]:
    """Read one series, and the map from its stored images to the patient.

    Slices are placed by ImagePositionPatient; the slice distance comes from the positions. The scan's
    `source` is the stored stack with axes (slice, row, column). A tilted gantry and slightly uneven slice
    distances are resampled; what was dropped, repaired or guessed is in `Scan.notes`. Memory stays near
    one volume of float32, save for a series that is resampled.

    Args:
        files: the files of one series, or a folder that holds exactly one series.
        modality: CTA, MRA, T1 or T2; guessed from the header when None.
        threads: that read and decode files side by side.

    Raises:
        ReadError: missing or unreadable files, several series, missing slices, different images at one
            place, or no volume. The message names the file or series and the fix.
    """
    notes: list[str] = []
    headers = _headers(files, notes)
    series = _series_uid(headers, files)
    with broken_as_read_error(f"Series {series}", "it makes no volume"):
        return _read(headers, series, modality, threads, notes)


def _read(
    headers: dict[Path, Header], series: str, modality: str | None, threads: int, notes: list[str]
) -> tuple[Scan, SliceIndex]:
    first = next(iter(headers.values()))
    slices = _slices(headers)
    if not all(header.has_meta for header in headers.values()):
        notes.append(f"files without transfer syntax; taken as {first.syntax.name}")
    if not all(frames_are_placed(header) for header in headers.values()):
        notes.append("frames have no positions of their own; taken as evenly spaced along the slice normal")
    ct = modality == "CTA" or (modality is None and first.text("Modality").upper() == "CT")
    planes = Planes(headers, ct)
    if modality is None and not ct:
        modality_of(first, series, slice_mm=0.0)  # neither CT nor MR ends here, before any pixel is read
    stack = stack_of(slices, series, planes.same, notes)
    if modality is None:
        modality, note = modality_of(first, series, float(stack.grid.spacing[0]))
        notes += [note] if note else []
    volume, grid = _volume(planes, stack, threads, notes)
    scan = Scan(
        series_uid=series,
        patient_id=str(first.get("PatientID") or series),
        modality=modality,
        volume=volume,
        grid=grid,
        source=stack.grid,
        age=age_of(first),
        sex=sex_of(first),
        notes=tuple(notes),
    )
    return scan, SliceIndex(slices)


def _volume(planes: Planes, stack: Stack, threads: int, notes: list[str]) -> tuple[np.ndarray, Grid]:
    """Canonical (d, h, w) float32 and its grid."""
    if not stack.uneven and not stack.tilt_degrees:
        # Every image goes straight to its final place: no second volume.
        order, flips, grid = canonical_axes(stack.grid)
        volume = np.empty(grid.shape, dtype=np.float32)
        stored = np.flip(volume, flips).transpose(np.argsort(order))
        planes.fill(stored, stack.slices, threads, notes)
        return volume, grid
    volume = np.empty(stack.grid.shape, dtype=np.float32)
    planes.fill(volume, stack.slices, threads, notes)
    if stack.uneven:
        volume = stack.evened(volume, notes)
    if stack.tilt_degrees:
        return stack.straightened(volume, notes)
    order, flips, grid = canonical_axes(stack.grid)
    return np.ascontiguousarray(np.flip(volume.transpose(order), flips)), grid


def _slices(headers: dict[Path, Header]) -> list[Slice]:
    slices: list[Slice] = []
    faults: list[tuple[str, ReadError]] = []
    for path, header in headers.items():
        try:
            slices += slices_of(header)
        except ReadError as error:
            faults.append((path.name, error))
    if len(faults) == 1:
        raise faults[0][1]
    if faults:
        others = names([name for name, _ in faults[1:]])
        raise ReadError(f"{faults[0][1]} The same or like: {others}.") from faults[0][1]
    return slices


def _files_in(folder: Path) -> list[Path]:
    if not folder.exists():
        raise ReadError(f"{folder}: no such folder. Check the path.")
    if folder.is_file():
        return [folder]
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "DICOMDIR")


def _headers(files: list[Path] | Path | str, notes: list[str]) -> dict[Path, Header]:
    if not isinstance(files, str | Path):
        headers = {Path(path): read_header(Path(path)) for path in files}
        if not headers:
            raise ReadError("A series needs files, but the list is empty.")
        return headers
    headers = {}
    for path in _files_in(Path(files)):
        try:
            headers[path] = read_header(path)
        except ReadError:
            # README, JSON and the like may lie beside the images, but a broken image must not go unseen.
            if path.suffix.lower() == ".dcm" or path == Path(files):
                raise
    headers = _images_only(headers, notes)
    if not headers:
        raise ReadError(f"{files}: no DICOM file in this folder. Is it the right folder?")
    return headers


def _images_only(headers: dict[Path, Header], notes: list[str]) -> dict[Path, Header]:
    """Without the reports, presentations and the like that lie beside the images."""
    images = {path: header for path, header in headers.items() if header.integer("Rows")}
    classes = {header.text("SOPClassUID") for header in images.values()}
    others = [
        p for p, header in headers.items() if p not in images and header.text("SOPClassUID") not in classes
    ]
    if not images or not others:
        return headers
    notes.append(f"passed over {len(others)} DICOM files without an image: {names([p.name for p in others])}")
    return {path: header for path, header in headers.items() if path not in others}


def _series_uid(headers: dict[Path, Header], files: list[Path] | Path | str) -> str:
    uids = sorted({header.text("SeriesInstanceUID") for header in headers.values()})
    if len(uids) > 1:
        where = files if isinstance(files, str | Path) else "The list of files"
        raise ReadError(
            f"{where}: holds {len(uids)} series ({names(uids)}), expected one. "
            "Group the files with find_series and read one series at a time."
        )
    if not uids[0]:
        raise ReadError(f"{next(iter(headers))}: SeriesInstanceUID is missing. Export the series again.")
    return uids[0]
