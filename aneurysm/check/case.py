"""One case through all checks: its headers once, its pixels once, its masks once."""

import dataclasses
import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from aneurysm.check import geometry, intensities, masks, points, sides, tables
from aneurysm.check.findings import Collector, Facts, Severity
from aneurysm.check.headers import check_files, check_headers, names, read_folder, said, study_uid
from aneurysm.check.items import Item
from aneurysm.data.dicom.headers import Header
from aneurysm.data.dicom.modality import age_of, modality_of, sex_of
from aneurysm.data.dicom.series import read_series_with_slices
from aneurysm.data.dicom.slices import Slice, SliceIndex
from aneurysm.data.errors import ReadError
from aneurysm.data.formats.metaimage import SUFFIXES, read_metaimage
from aneurysm.data.formats.nifti import read_nifti
from aneurysm.data.scan import Scan
from aneurysm.data.sources.people import parse_sex
from aneurysm.data.sources.rsna import PLACEHOLDER_IDS

Outcome = list[tuple[Collector, Facts]]


def check_case(item: Item) -> Outcome:
    """Everything about one case that needs no other case; a folder of DICOM files may hold several.

    Nothing is raised for what is wrong with the data.
    """
    if item.kind in ("rsna", "dicom"):
        return list(_dicom_folder(item))
    return [_volume_file(item)]


def _dicom_folder(item: Item) -> Iterator[tuple[Collector, Facts]]:
    started = time.perf_counter()
    folder = read_folder(item.files)
    files = Collector(item.series_uid)
    check_files(folder, files)
    series = folder.series
    if item.kind == "rsna" and series:
        if item.series_uid in series:
            others = [path for uid, paths in series.items() if uid != item.series_uid for path in paths]
            if others:
                text = f"{len(others)} file(s) of {len(series) - 1} other series: {names(others)}."
                files.add("foreign-files", text)
        else:
            uid, held = max(series.items(), key=lambda pair: len(pair[1]))
            files.add("wrong-folder", f"It holds {len(held)} files of series {uid} and none of its own.")
        series = {item.series_uid: series.get(item.series_uid) or max(series.values(), key=len)}
    if not series:
        if not files.has_fatal:
            files.add("empty-series", f"None of its {len(item.files)} files is an image.")
        yield files, Facts(item.series_uid, seconds=time.perf_counter() - started)
        return
    for uid, headers in series.items():
        found = Collector(uid)
        first = next(iter(headers.values()))
        found.patient_id = _patient(item, uid, first)
        for finding in files.findings if uid == next(iter(series)) else ():
            found.findings.append(dataclasses.replace(finding, series_uid=uid, patient_id=found.patient_id))
        yield found, _series(item, uid, headers, found, started)
        started = time.perf_counter()


def _series(
    item: Item,
    uid: str,
    headers: dict[Path, Header],
    found: Collector,
    started: float,
) -> Facts:
    """Check one DICOM series with its row, points and masks."""
    first = next(iter(headers.values()))
    study = study_uid(first.path)
    check_headers(headers, study, found)
    stack = geometry.check_slices(headers, found)
    dicom_modality = said(first, "Modality").upper()
    try:
        header_age, sexes = age_of(first), [sex_of(first) or ""]
    except ReadError:  # letters that cannot be decoded
        header_age, sexes = None, [""]
    labels = Collector(uid, found.patient_id)
    if item.row is not None:
        tables.check_row(item.row, dicom_modality, header_age, labels)
        tables.check_points_against_row(item.row, item.points, labels)
        sexes.append(parse_sex(item.row.get("PatientSex", "")))
    elif item.points:
        tables.check_repeated_points(item.points, labels)
    modality = item.modality or _modality(first, uid, stack)
    # Units follow the machine that made the images, even where the table names another modality.
    units = {"CT": "CTA", "MR": "MRA" if modality == "CTA" else modality}.get(dicom_modality, modality)
    facts = Facts(
        uid,
        found.patient_id,
        study,
        modality or "",
        tuple(s for s in sexes if s in ("M", "F")),
    )
    try:
        scan, index = read_series_with_slices(list(headers), units or "MRA")
    except Exception as error:  # a reader may stumble over a tag that nobody thought of
        named = "" if isinstance(error, ReadError) else f"{type(error).__name__}: "
        _unreadable(f"{named}{' '.join(str(error).split())}", found)
        if stack:  # points can be judged against the headers even when the pixels cannot be read
            points.place_points(item.points, headers, SliceIndex(stack), found)
        found.findings += labels.findings
        return dataclasses.replace(facts, seconds=time.perf_counter() - started)
    found.survived(scan.notes)
    found.findings += labels.findings
    levels = _check_scan(scan, units, 0, found)
    if float(scan.volume.min()) == levels.top:  # points and masks on nothing say nothing
        return _with_scan(facts, scan, started)
    vessel, aneurysm = _check_masks(item, scan, levels, units, found)
    centres = {} if vessel is None else sides.label_centres(vessel, scan.grid)
    midline = sides.vessel_midline(centres) if sides.check_mask_sides(centres, found) else None
    for location, mm in points.place_points(item.points, headers, index, found):
        points.check_point_in_air(location, mm, scan.volume, scan.grid, levels, units or "", found)
        offset = sides.head_offset_of(mm, scan.volume, scan.grid, levels, units) if midline is None else None
        sides.check_point_side(location, mm, midline, offset, found)
        if aneurysm is not None:
            points.check_point_on_aneurysm(location, mm, aneurysm, scan.grid, found)
        if vessel is not None:
            points.check_point_on_vessel(location, mm, vessel, scan.grid, found)
    return _with_scan(facts, scan, started)


def _volume_file(item: Item) -> tuple[Collector, Facts]:
    """Check one NIfTI, NRRD or MHA image with its masks."""
    started, path = time.perf_counter(), item.files[0]
    found = Collector(item.series_uid, item.patient_id)
    facts = Facts(item.series_uid, item.patient_id, "", item.modality or "", (item.sex,) if item.sex else ())
    if item.row is not None:
        tables.check_person(item.row, None, found)
    try:
        if not path.is_file():
            found.add("missing-file", f"{path} is a link without content.")
            return found, facts
        read = read_metaimage if path.name.lower().endswith(SUFFIXES) else read_nifti
        # The reader wants a name; units are judged by `item.modality` alone.
        scan = read(path, item.modality or "MRA", item.patient_id or None)
    except ReadError as error:
        _unreadable(str(error), found)
        return found, dataclasses.replace(facts, seconds=time.perf_counter() - started)
    modality = item.modality
    if intensities.is_label_map(intensities.measure_levels(scan.volume)):
        _check_notes(scan.notes, found)
        geometry.check_grid(scan.source, found)
        found.add("looks-like-labels", f"{len(np.unique(scan.volume))} whole values, most voxels 0.")
        return found, _with_scan(facts, scan, started)
    levels = _check_scan(scan, modality, 2, found)
    if float(scan.volume.min()) == levels.top:
        return found, _with_scan(facts, scan, started)
    vessel, aneurysm = _check_masks(item, scan, levels, modality, found)
    if vessel is not None:
        sides.check_mask_sides(sides.label_centres(vessel, scan.grid), found)
    if aneurysm is not None and (item.row or {}).get("group"):
        text = (
            f"participants.tsv says {(item.row or {})['group']!r}, but {names(item.lesions)} marks a lesion."
        )
        found.add("mask-in-negative", text)
    return found, _with_scan(facts, scan, started)


def _patient(item: Item, uid: str, header: Header) -> str:
    """Whose series it is, as the source that reads such a folder says."""
    try:
        patient = str(header.get("PatientID") or "").strip()
    except ReadError:
        return uid
    return uid if not patient or (item.kind == "rsna" and patient.lower() in PLACEHOLDER_IDS) else patient


def _modality(header: Header, uid: str, stack: list[Slice]) -> str | None:
    """As the reader guesses it; None where it would refuse."""
    along = np.array([s.position @ stack[0].normal for s in stack])
    step = abs(float(along[-1] - along[0])) / (len(stack) - 1) if len(stack) > 1 else None
    try:
        return modality_of(header, uid, step)[0]
    except ReadError:
        return None


# What the reader refuses, in the words of its messages.
_REFUSED: Final = (
    ("nan-voxels", r"\bNaN or infinite"),
    ("implausible-spacing", r"cannot be a head scan"),
    ("bad-geometry", r"not invertible|finite 4x4 affine|affine of the file is broken"),
    ("not-one-volume", r"one 3D volume|colour image|is not a volume"),
    ("truncated-file", r"truncated|cut off"),
)


def _unreadable(message: str, found: Collector) -> None:
    """Say why the reader refused, unless a check has said it already in its own words."""
    if found.has_fatal:
        return
    code = next((code for code, words in _REFUSED if re.search(words, message)), "unreadable")
    found.add(code, message, Severity.FATAL)


# What the reader repairs or decides although it is a fault of the data; handled, so a look at it is enough.
_REPAIRED: Final = (
    ("not-hounsfield", r"rescale intercept"),
    ("two-orientations", r"turn the axes differently"),
    ("no-orientation", r"no orientation in the file"),
)


def _check_notes(notes: tuple[str, ...], found: Collector) -> None:
    """What the reader did: faults under their own names, the rest as one note."""
    rest = []
    for note in notes:
        code = next((code for code, words in _REPAIRED if re.search(words, note)), None)
        if code is None:
            rest.append(note)
        else:
            found.add(code, f"The reader says: {note}.", Severity.WARNING)
    if rest:
        found.add("reader-notes", "; ".join(rest))


def _check_scan(scan: Scan, modality: str | None, stored_axis: int, found: Collector) -> intensities.Levels:
    """Geometry, values and orientation; `stored_axis` of `scan.source` counts the slices."""
    _check_notes(scan.notes, found)
    levels = intensities.measure_levels(scan.volume)
    geometry.check_grid(scan.source, found)
    # World x, y, z are the axes w, h, d of the canonical volume.
    slice_axis = 2 - int(np.abs(scan.source.affine[:3, stored_axis]).argmax())
    intensities.check_intensities(scan.volume, levels, modality, slice_axis, found)
    if not found.has_fatal:
        sides.check_symmetry(scan.volume, scan.grid, levels, found)
    return levels


def _check_masks(
    item: Item, scan: Scan, levels: intensities.Levels, modality: str | None, found: Collector
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The vessel mask and the union of the lesion masks, (d, h, w) uint8, checked."""
    vessel = aneurysm = None
    for path in item.vessels:
        mask = masks.load_mask(path, scan.grid, scan.source, found)
        if mask is None:
            continue
        vessel = mask if vessel is None else np.maximum(vessel, mask)
        if item.kind != "volumes":  # research label maps have their own numbers
            masks.check_vessel_values(mask, found)
        if not masks.check_in_air("vessel", mask, scan.volume, levels, modality, found):
            masks.check_brightness(mask, scan.volume, scan.grid, modality, found)
    present = (item.row or {}).get("Aneurysm Present", "").strip()
    for path in item.lesions:
        quiet = Collector(found.series_uid, found.patient_id)
        mask = masks.load_mask(path, scan.grid, scan.source, quiet)
        # Without an aneurysm an empty lesion mask is right.
        found.findings += [f for f in quiet.findings if f.code != "mask-empty" or present in ("1", "1.0")]
        if mask is None:
            continue
        aneurysm = mask if aneurysm is None else np.maximum(aneurysm, mask)
        masks.check_in_air("aneurysm", mask, scan.volume, levels, modality, found)
        if present in ("0", "0.0"):
            text = f"{path.name} marks {int(mask.astype(bool).sum())} voxels, but the label says no aneurysm."
            found.add("mask-in-negative", text)
    return vessel, aneurysm


def _with_scan(facts: Facts, scan: Scan, started: float) -> Facts:
    # A pixel in four tells two exports of one series from two series just as well.
    digest = hashlib.blake2b(np.ascontiguousarray(scan.volume[:, ::2, ::2]).data, digest_size=16).hexdigest()
    spacing = tuple(round(float(s), 4) for s in scan.grid.spacing)
    return dataclasses.replace(
        facts,
        shape=scan.grid.shape,
        spacing=spacing,
        pixels=f"{scan.grid.shape} {digest}",
        seconds=time.perf_counter() - started,
    )
