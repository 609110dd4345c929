"""From a scan to what the nets see: cropped to the head, isotropic, normalised, and kept in a cache."""

import hashlib
import json
import logging
import warnings
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from aneurysm.data.errors import ReadError
from aneurysm.data.files import alone_in, replacing
from aneurysm.data.preparation.normalise import ct_scale, find_head, head_box, mr_scale
from aneurysm.data.preparation.prepared import (
    FORMAT,
    SUFFIX,
    PreparedCase,
    load_prepared,
    load_prepared_crop,
    open_prepared,
    prepared_header,
    save_prepared,
)
from aneurysm.data.preparation.progress import Counter
from aneurysm.data.preparation.workers import run_each
from aneurysm.data.preparation.workload import Measured, Need, affordable_jobs, check_disk, need_of
from aneurysm.data.resample import crop_grid, isotropic, resample, resample_labels
from aneurysm.data.scan import Case, Scan

__all__ = [
    "CaseSource",
    "Preparation",
    "PreparedCase",
    "load_prepared",
    "load_prepared_crop",
    "prepare_all",
    "prepare_case",
    "prepare_scan",
    "prepared_header",
    "resample_labels",
]

log = logging.getLogger(__name__)

_AIR_HU = -1024.0


class CaseSource(Protocol):
    """What every reader of a data set offers."""

    root: Path

    def index(self) -> pd.DataFrame:
        """One row per series (`tables.INDEX`)."""
        ...

    def case(self, series_uid: str) -> Case:
        """One scan with its labels."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell cheaply whether the files of a series have changed."""

    def fingerprint(self, series_uid: str) -> str:
        """A hash of the state of a series on disk."""
        ...


@dataclass(frozen=True)
class Preparation:
    """How scans are prepared; every field is part of the cache key.

    CTA is clipped to `ct_window` and mapped so that `ct_soft_tissue` becomes 0 and `ct_vessel` 1. MR has no
    units: the median of the head becomes 0 and its 5-95 % spread that of a unit normal distribution.
    """

    spacing_mm: float | None = 0.75  # of the isotropic grid; None keeps the grid of the scan
    keep_within: float = 0.1  # axes whose spacing is this close to it (as a share) are not interpolated
    ct_window: tuple[float, float] = (-100.0, 800.0)  # HU
    ct_soft_tissue: float = 40.0  # HU
    ct_vessel: float = 340.0  # HU
    mr_clip: tuple[float, float] = (-4.0, 8.0)  # in robust standard deviations
    crop: bool = True  # to the bounding box of the head
    margin_mm: float = 6.0  # kept around the head
    height_mm: float | None = 220.0  # kept below the top of the head; None keeps neck and chest

    def __post_init__(self) -> None:
        # YAML hands over lists; a frozen, hashable value needs tuples.
        object.__setattr__(self, "ct_window", tuple(float(v) for v in self.ct_window))
        object.__setattr__(self, "mr_clip", tuple(float(v) for v in self.mr_clip))
        if self.spacing_mm is not None and not 0.1 <= self.spacing_mm <= 5:
            raise ValueError(f"spacing_mm must be within 0.1 to 5 mm or null, got {self.spacing_mm}.")
        if not 0 <= self.keep_within < 1:
            raise ValueError(f"keep_within must be at least 0 and below 1, got {self.keep_within}.")
        if self.ct_window[0] >= self.ct_window[1] or self.ct_soft_tissue >= self.ct_vessel:
            raise ValueError("ct_window must rise, and ct_vessel must be above ct_soft_tissue.")
        if self.mr_clip[0] >= self.mr_clip[1]:
            raise ValueError(f"mr_clip must rise, got {self.mr_clip}.")


def prepare_scan(scan: Scan, preparation: Preparation) -> PreparedCase:
    """Prepare a scan without labels."""
    return prepare_case(Case(scan), preparation)


def prepare_case(case: Case, preparation: Preparation) -> PreparedCase:
    """Crop to the head, bring to isotropic spacing where it is not near it already, normalise.

    Raises:
        ReadError: the image is empty, constant or holds no head.
    """
    scan = case.scan
    cta = scan.modality == "CTA"
    volume, lowest = scan.volume, scan.volume.min()
    if lowest == volume.max():
        raise ReadError(f"{scan.series_uid}: every voxel is {lowest:g}. Export the series again.")
    if cta and lowest < _AIR_HU:
        # Scanners mark what lies outside the reconstruction circle by values far below air.
        volume = np.maximum(volume, np.float32(_AIR_HU))
    box, tissue = find_head(volume, scan.grid, scan.modality, scan.series_uid)
    start, size = (0, 0, 0), scan.grid.shape
    if preparation.crop:
        start, size = head_box(box, scan.grid, preparation.margin_mm, preparation.height_mm)
    window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    cropped = crop_grid(scan.grid, start, size)
    grid = cropped
    if preparation.spacing_mm is not None:
        grid = isotropic(cropped, preparation.spacing_mm, preparation.keep_within)
    air = _AIR_HU if cta else float(np.percentile(volume[::2, ::4, ::4], 0.5))
    if cta:
        scale = ct_scale(preparation.ct_window, preparation.ct_soft_tissue, preparation.ct_vessel)
    else:
        scale = mr_scale(tissue, preparation.mr_clip, scan.series_uid)
    image = resample(volume[window], cropped, grid, order=1, fill=air, smooth=True)
    vessel, aneurysm = (
        None if mask is None else resample_labels(mask[window], cropped, grid)
        for mask in (case.vessel, case.aneurysm)
    )
    return PreparedCase(
        series_uid=scan.series_uid,
        patient_id=scan.patient_id,
        modality=scan.modality,
        image=scale(image, out=image),
        grid=grid,
        vessel=vessel,
        aneurysm=aneurysm,
        lesions=case.lesions,
        age=scan.age,
        sex=scan.sex,
        present=case.present,
        locations=case.locations,
        source=scan.source,
        background=float(scale(np.array(air))),
        notes=scan.notes,
    )


def prepare_all(
    source: CaseSource,
    preparation: Preparation,
    folder: Path | str,
    jobs: int = 1,
    backend: str = "loky",
    memory_bytes: int | None = None,
) -> dict[str, Path]:
    """Prepare every series of a source once; what is in the cache already is not touched.

    A file's name carries a hash of the source, the labels and files of the series, and the preparation, so a
    change of any of them prepares again and never mixes. A run killed at any moment goes on where it stopped;
    what it had half written is swept away. A case that fails, or that kills the process which prepares
    it, is logged, listed with its reason in `<folder>/failed.json`, left out, and tried again by the
    next call. Two calls on one folder wait for each other.

    Args:
        jobs: processes; 1 works in this one. Fewer are used when memory would not suffice.
        backend: "loky", "dask" or "ray" (`workers.run_each`).
        memory_bytes: for all processes together; None takes most of what is free.

    Returns:
        {series_uid: path} of the cases that could be prepared, in the order of the index.

    Raises:
        ReadError: no case at all could be prepared.
        UserError: the disk is too full, or the backend is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = source.index()
    paths = {
        str(row["series_uid"]): folder / f"{row['series_uid']}-{_key(source, preparation, row)}{SUFFIX}"
        for row in index.to_dict("records")
    }
    with alone_in(folder):
        failed = _prepare_missing(source, preparation, folder, paths, jobs, backend, memory_bytes)
    if failed:
        log.warning("%d of %d cases were skipped, see %s", len(failed), len(paths), folder / "failed.json")
    ready = {uid: path for uid, path in paths.items() if uid not in failed}
    if not ready:
        first = next(((uid, failed[uid]) for uid in paths), ("none", "the index is empty"))
        raise ReadError(f"No case of {source.root} could be prepared; the first, {first[0]}: {first[1]}")
    return ready


def _prepare_missing(
    source: CaseSource,
    preparation: Preparation,
    folder: Path,
    paths: dict[str, Path],
    jobs: int,
    backend: str,
    memory_bytes: int | None,
) -> dict[str, str]:
    """Prepare what is not there; returns what went wrong, by series."""
    todo = [uid for uid, path in paths.items() if not _is_whole(path)]
    log.info("%d of %d cases are prepared already in %s", len(paths) - len(todo), len(paths), folder)
    failed: dict[str, str] = {}
    _write_failed(folder, failed)
    needs = {uid: _need(source, preparation, uid) for uid in todo}
    check_disk(needs, folder)
    if backend == "loky":  # the memory of a cluster is not ours to divide
        jobs = affordable_jobs(needs, jobs, memory_bytes)
    task = partial(_prepare_one, source, preparation)
    missing = {uid: paths[uid] for uid in todo}
    with Counter(len(todo)) as counter:
        for uid, problem in run_each(task, missing, jobs, backend, folder / ".running"):
            if problem is not None:
                log.warning("%s was skipped: %s", uid, problem)
                failed[uid] = problem
                _write_failed(folder, failed)
            counter.step(skipped=problem is not None)
    return failed


def _is_whole(path: Path) -> bool:
    """Whether a case is there; a file cut short by a full disk or a power failure is not."""
    if not path.is_file():
        return False
    try:
        open_prepared(path)
    except ReadError as error:
        log.warning("%s It is prepared again.", error)
        return False
    return True


def _need(source: CaseSource, preparation: Preparation, series_uid: str) -> Need:
    extent = None
    if isinstance(source, Measured):
        # What is wrong with a series is found, and told, when it is prepared.
        with suppress(Exception):
            extent = source.extent(series_uid)
    return need_of(extent, preparation.spacing_mm, preparation.crop, preparation.margin_mm)


def _key(source: CaseSource, preparation: Preparation, row: dict[Hashable, Any]) -> str:
    parts = {
        "format": FORMAT,
        "source": f"{type(source).__name__} {Path(source.root).resolve()}",
        "preparation": asdict(preparation),
        "row": str(row),
        "files": source.fingerprint(str(row["series_uid"])) if isinstance(source, Fingerprinted) else "",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _prepare_one(source: CaseSource, preparation: Preparation, series_uid: str, path: Path) -> str | None:
    """Prepare one case unless it is there; returns what went wrong."""
    if _is_whole(path):
        return None  # by a process that died before it could say so
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about every odd tag of every file
            save_prepared(prepare_case(source.case(series_uid), preparation), path)
    except ReadError as error:
        return str(error)
    except Exception as error:  # one broken case must not end a run of thousands
        return f"{type(error).__name__}: {error}"
    return None


def _write_failed(folder: Path, failed: dict[str, str]) -> None:
    path = folder / "failed.json"
    if not failed:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as part:
        part.write_text(json.dumps(failed, indent=1))
