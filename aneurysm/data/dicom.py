"""DICOM series to scans: grouped by SeriesInstanceUID, sorted in space, rescaled once, checked for gaps."""

import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread

from aneurysm.data.errors import ReadError
from aneurysm.data.modality import age_of, modality_of, sex_of
from aneurysm.data.resample import canonicalise, resample
from aneurysm.data.scan import Grid, Scan
from aneurysm.data.slices import Slice, SliceIndex, frames_are_placed, read_header, slices_of

log = logging.getLogger(__name__)

MIN_SLICES = 3  # fewer slices are a localiser, not a volume
_MISSING = 1.5  # a gap this many times the median gap has lost a slice
_LISTED = 4  # names in a message before "and n more"


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
        except ReadError as error:
            if path.suffix.lower() == ".dcm":
                log.warning("%s", error)
                first_problem = first_problem or error
            continue
        if header.get("Rows") and header.get("SeriesInstanceUID"):
            series[str(header.SeriesInstanceUID)].append(path)
    if not series:
        raise first_problem or ReadError(f"{folder}: no DICOM image in this folder. Is it the right folder?")
    return dict(series)


def read_series(files: list[Path] | Path | str, modality: str | None = None) -> Scan:
    """Read one series as a canonical scan; see `read_series_with_slices`."""
    return read_series_with_slices(files, modality)[0]


def read_series_with_slices(
    files: list[Path] | Path | str, modality: str | None = None
) -> tuple[Scan, SliceIndex]:
    """Read one series, and the map from its stored images to the patient.

    Slices are placed by ImagePositionPatient; the slice distance comes from the positions. The scan's
    `source` is the stored stack with axes (slice, row, column). A tilted gantry and slightly uneven slice
    distances are resampled; what was dropped, repaired or guessed is in `Scan.notes`.

    Args:
        files: the files of one series, or a folder that holds exactly one series.
        modality: CTA, MRA, T1 or T2; guessed from the header when None.

    Raises:
        ReadError: missing or unreadable files, several series, missing slices, different images at one
            place, or no volume. The message names the file or series and the fix.
    """
    headers = _headers(files)
    series = _series_uid(headers, files)
    first = next(iter(headers.values()))
    notes: list[str] = []
    if modality is None:
        modality, note = modality_of(first, series)
        notes += [note] if note else []
    slices = [s for path, header in headers.items() for s in slices_of(header, path)]
    if not all(frames_are_placed(header) for header in headers.values()):
        notes.append("frames have no positions of their own; taken as evenly spaced along the slice normal")
    index = SliceIndex(slices)
    stack, volume = _stack(slices, series, modality, notes)
    volume, source = _evened(stack, volume, series, notes)
    canonical, grid = _upright(volume, source, notes)
    if not np.isfinite(canonical).all():
        raise ReadError(f"Series {series}: some voxels are NaN or infinite. Export the series again.")
    scan = Scan(
        series_uid=series,
        patient_id=str(first.get("PatientID") or series),
        modality=modality,
        volume=canonical,
        grid=grid,
        source=source,
        age=age_of(first),
        sex=sex_of(first),
        notes=tuple(notes),
    )
    return scan, index


def _files_in(folder: Path) -> list[Path]:
    if not folder.exists():
        raise ReadError(f"{folder}: no such folder. Check the path.")
    if folder.is_file():
        return [folder]
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "DICOMDIR")


def _headers(files: list[Path] | Path | str) -> dict[Path, Dataset]:
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
    if not headers:
        raise ReadError(f"{files}: no DICOM file in this folder. Is it the right folder?")
    return headers


def _series_uid(headers: dict[Path, Dataset], files: list[Path] | Path | str) -> str:
    uids = sorted({str(header.get("SeriesInstanceUID", "")) for header in headers.values()})
    if len(uids) > 1:
        where = files if isinstance(files, str | Path) else "The list of files"
        raise ReadError(
            f"{where}: holds {len(uids)} series ({_names(uids)}), expected one. "
            "Group the files with find_series and read one series at a time."
        )
    if not uids[0]:
        raise ReadError(f"{next(iter(headers))}: SeriesInstanceUID is missing. Export the series again.")
    return uids[0]


def _names(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _stack(
    slices: list[Slice], series: str, modality: str, notes: list[str]
) -> tuple[list[Slice], np.ndarray]:
    """The slices of the volume in spatial order, and their rescaled pixels (n, rows, columns) float32."""
    slices = _majority(slices, series, notes)
    if len(slices) < MIN_SLICES:
        raise ReadError(
            f"Series {series}: {len(slices)} slices are not a volume, at least {MIN_SLICES} needed."
        )
    normal = slices[0].normal
    slices = sorted(slices, key=lambda s: (float(s.position @ normal), s.name))
    along = np.array([s.position @ normal for s in slices])
    if along[-1] - along[0] < 1e-2:
        raise ReadError(
            f"Series {series}: all {len(slices)} slices lie at the same position (a time series or a "
            "faulty export). Export the series with one image per position."
        )
    pixels = _pixels(slices, modality, notes)
    step = np.median(np.diff(along)[np.diff(along) > 1e-2])
    keep = [0]
    for i in range(1, len(slices)):
        if along[i] - along[keep[-1]] > 0.02 * step:
            keep.append(i)
        elif np.array_equal(pixels[i], pixels[keep[-1]]):
            notes.append(f"dropped {slices[i].name}: a copy of {slices[keep[-1]].name}")
        else:
            raise ReadError(
                f"Series {series}: {slices[keep[-1]].name} and {slices[i].name} are different images at the "
                "same position (two phases or echoes in one series). Export one series per phase."
            )
    if len(keep) < len(slices):
        slices, pixels = [slices[i] for i in keep], pixels[keep]
    if len(slices) < MIN_SLICES:
        raise ReadError(f"Series {series}: {len(slices)} positions are not a volume, {MIN_SLICES} needed.")
    return slices, pixels


def _majority(slices: list[Slice], series: str, notes: list[str]) -> list[Slice]:
    """The largest set of slices with one matrix size, pixel spacing and orientation."""
    groups: list[list[Slice]] = []
    for s in slices:
        group = next((g for g in groups if g[0].same_plane(s)), None)
        if group is None:
            groups.append([s])
        else:
            group.append(s)
    groups.sort(key=len, reverse=True)
    if len(groups) > 1:
        if len(groups[0]) == len(groups[1]):
            raise ReadError(
                f"Series {series}: slices with different size, spacing or orientation and no majority "
                f"({groups[0][0].name} and {groups[1][0].name}, {len(groups[0])} each). Split the series."
            )
        others = [s.name for g in groups[1:] for s in g]
        notes.append(
            f"dropped {len(others)} slices of another size, spacing or orientation: {_names(others)}"
        )
    return groups[0]


def _pixels(slices: list[Slice], modality: str, notes: list[str]) -> np.ndarray:
    """Rescaled pixels (n, rows, columns) float32 in the order of `slices`; each file is decoded once."""
    volume = np.empty((len(slices), *slices[0].shape), dtype=np.float32)
    places: dict[Path, list[int]] = defaultdict(list)
    for i, s in enumerate(slices):
        places[s.path].append(i)
    for path, members in places.items():
        decoded = _decoded(path)
        for i in members:
            frame = slices[i].frame
            plane = decoded if frame is None or decoded.ndim == 2 else decoded[frame]
            if plane.shape != slices[i].shape:
                raise ReadError(
                    f"{slices[i].path}: pixels are {plane.shape} but the header says {slices[i].shape}."
                )
            volume[i] = plane
    slope = np.array([s.slope for s in slices], dtype=np.float32)
    intercept = np.array([s.intercept for s in slices], dtype=np.float32)
    if modality == "CTA" and (intercept < -900).all():
        # Stored values are air = 0 where the intercept is -1024. Air far below 0 (padding of -2000 aside)
        # means that an export has applied the intercept already and left it in the header.
        sample = volume[:, ::4, ::4]
        sample = sample[sample > -1900]
        if sample.size and np.percentile(sample, 2) < -800:
            notes.append("stored values are Hounsfield units already; the rescale intercept was not applied")
            return volume
    for i in range(len(slices)):
        if slope[i] != 1 or intercept[i] != 0:
            volume[i] = volume[i] * slope[i] + intercept[i]
    return volume


def _decoded(path: Path) -> np.ndarray:
    try:
        dataset = dcmread(path)
        if not any(tag in dataset for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ReadError(f"{path}: no pixel data (a truncated or header-only file). Export it again.")
        return dataset.pixel_array
    except ReadError:
        raise
    except Exception as error:  # decoders raise many types on broken or unsupported data
        raise ReadError(
            f"{path}: the pixels cannot be decoded ({' '.join(str(error).split())[:200]}). The file is "
            "truncated or uses a compression without an installed decoder; export it again uncompressed."
        ) from error


def _evened(stack: list[Slice], volume: np.ndarray, series: str, notes: list[str]) -> tuple[np.ndarray, Grid]:
    """The stack on one affine grid (slice, row, column): checked for gaps, evened where jitter is small."""
    positions = np.array([s.position for s in stack])
    along = positions @ stack[0].normal
    gaps = np.diff(along)
    step = float(np.median(gaps))
    _check_gaps(gaps, step, stack, series)
    fraction = (along - along[0]) / (along[-1] - along[0])
    drift = positions - (positions[0] + fraction[:, None] * (positions[-1] - positions[0]))
    pixel = min(np.linalg.norm(stack[0].across), np.linalg.norm(stack[0].down))
    if np.linalg.norm(drift, axis=1).max() > 0.5 * pixel:
        i = int(np.linalg.norm(drift, axis=1).argmax())
        raise ReadError(
            f"Series {series}: {stack[i].name} is shifted in its plane by "
            f"{np.linalg.norm(drift[i]):.2f} mm against a straight stack. Reconstruct the series."
        )
    even = np.linspace(along[0], along[-1], len(along))
    unevenness = float(np.abs(along - even).max())
    if unevenness > max(0.01 * step, 0.01):
        notes.append(
            f"slice distances vary from {gaps.min():.3g} to {gaps.max():.3g} mm; interpolated to even spacing"
        )
        right = np.clip(np.searchsorted(along, even, side="right"), 1, len(along) - 1)
        weight = ((even - along[right - 1]) / gaps[right - 1]).astype(np.float32)[:, None, None]
        volume = volume[right - 1] * (1 - weight) + volume[right] * weight
    affine = np.eye(4)
    affine[:3, 0] = (positions[-1] - positions[0]) / (len(stack) - 1)
    affine[:3, 1], affine[:3, 2], affine[:3, 3] = stack[0].down, stack[0].across, positions[0]
    return volume, Grid(volume.shape, affine)


def _check_gaps(gaps: np.ndarray, step: float, stack: list[Slice], series: str) -> None:
    wrong = (gaps > _MISSING * step) | (gaps < step / 2)
    if not wrong.any():
        return
    i = int(np.flatnonzero(wrong)[0])
    found = (
        f"slices are {step:.3g} mm apart, "
        f"but {gaps[i]:.3g} mm between {stack[i].name} and {stack[i + 1].name}"
    )
    if wrong.mean() > 0.2:
        problem = "the series joins parts with different slice distances. Reconstruct it with even spacing."
    elif gaps[i] > step:
        problem = f"a slice is missing at {int(wrong.sum())} place(s). Export the complete series again."
    else:
        problem = "a foreign slice lies between its neighbours. Remove it from the series."
    raise ReadError(f"Series {series}: {found}; {problem}")


def _upright(volume: np.ndarray, source: Grid, notes: list[str]) -> tuple[np.ndarray, Grid]:
    """Canonical axes; a sheared stack (tilted gantry) is first resampled onto perpendicular ones."""
    step, down, across = source.affine[:3, :3].T
    normal = np.cross(across, down) / np.linalg.norm(np.cross(across, down))
    normal *= np.sign(normal @ step)
    lateral = step - (step @ normal) * normal
    # Sideways drift over the whole stack, in rows and columns.
    rows = float(lateral @ down / (down @ down)) * (source.shape[0] - 1)
    columns = float(lateral @ across / (across @ across)) * (source.shape[0] - 1)
    if max(abs(rows), abs(columns)) < 0.5:
        return canonicalise(volume, source)
    degrees = np.degrees(np.arctan2(np.linalg.norm(lateral), step @ normal))
    notes.append(f"gantry tilt of {degrees:.1f} degrees; resampled onto perpendicular axes")
    affine = source.affine.copy()
    affine[:3, 0] = (step @ normal) * normal
    affine[:3, 3] += min(rows, 0) * down + min(columns, 0) * across
    shape = (
        source.shape[0],
        source.shape[1] + int(np.ceil(abs(rows))),
        source.shape[2] + int(np.ceil(abs(columns))),
    )
    onto = Grid(shape, affine)
    return canonicalise(resample(volume, source, onto, order=1, fill=float(volume.min())), onto)
