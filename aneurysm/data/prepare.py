"""From a scan to what the nets see: cropped to the head, isotropic, normalised, and kept in a cache."""

import hashlib
import json
import logging
import warnings
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from scipy.ndimage import distance_transform_edt

from aneurysm.data.errors import ReadError
from aneurysm.data.files import replacing
from aneurysm.data.normalise import ct_scale, find_head, head_box, mr_scale
from aneurysm.data.prepared import (
    FORMAT,
    SUFFIX,
    PreparedCase,
    load_prepared,
    load_prepared_crop,
    prepared_header,
    save_prepared,
)
from aneurysm.data.resample import crop_grid, isotropic, resample
from aneurysm.data.scan import Case, Grid, Scan

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
    # Scanners mark what lies outside the reconstruction circle by values far below air.
    volume = np.maximum(scan.volume, _AIR_HU) if cta else scan.volume
    if volume.min() == volume.max():
        raise ReadError(f"{scan.series_uid}: every voxel is {volume.min():g}. Export the series again.")
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
        image=scale(image),
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


def resample_labels(labels: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    """Bring labels onto another grid: borders by linear interpolation at one half, names by the nearest.

    Nearest voxels alone would move borders by up to half a voxel at random, which on a vessel two voxels wide
    is a large part of it.

    Args:
        labels: (d, h, w) uint8 on `grid`.
    """
    if grid.same_as(target):
        return labels.copy()
    names = resample(labels, grid, target, order=0, fill=0)
    inside = resample((labels > 0).astype(np.float32), grid, target, order=1, fill=0.0) >= 0.5
    unnamed = inside & (names == 0)
    if unnamed.any() and names.any():
        nearest: Any = distance_transform_edt(names == 0, return_distances=False, return_indices=True)
        names = np.where(unnamed, names[tuple(nearest)], names)
    return np.where(inside, names, 0).astype(np.uint8)


def prepare_all(
    source: CaseSource, preparation: Preparation, folder: Path | str, jobs: int = 1
) -> dict[str, Path]:
    """Prepare every series of a source once; what is in the cache already is not touched.

    A file's name carries a hash of the source, the labels and files of the series, and the preparation, so a
    change of any of them prepares again and never mixes. A killed run goes on where it stopped. A case
    that fails is logged, listed with its reason in `<folder>/failed.json`, left out, and tried again
    by the next call.

    Args:
        jobs: processes; 1 works in this one.

    Returns:
        {series_uid: path} of the cases that could be prepared, in the order of the index.

    Raises:
        ReadError: no case at all could be prepared.
        RuntimeError: a worker process died (usually for lack of memory).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = source.index()
    paths = {
        str(row["series_uid"]): folder / f"{row['series_uid']}-{_key(source, preparation, row)}{SUFFIX}"
        for row in index.to_dict("records")
    }
    todo = [uid for uid, path in paths.items() if not path.is_file()]
    log.info("%d of %d cases are prepared already in %s", len(paths) - len(todo), len(paths), folder)
    failed: dict[str, str] = {}
    _write_failed(folder, failed)
    work = (delayed(_prepare_one)(source, uid, preparation, paths[uid]) for uid in todo)
    results: Any = Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered")(work)
    try:
        for done, (uid, problem) in enumerate(results, start=1):
            if problem is not None:
                log.warning("%s was skipped: %s", uid, problem)
                failed[uid] = problem
                _write_failed(folder, failed)
            if done % max(len(todo) // 10, 1) == 0 or done == len(todo):
                log.info("prepared %d of %d cases, %d skipped", done, len(todo), len(failed))
    except TerminatedWorkerError as error:
        left = [uid for uid in todo if not paths[uid].is_file() and uid not in failed]
        raise RuntimeError(
            f"A worker process was killed, usually for lack of memory, while preparing one of the next "
            f"{jobs} of {len(left)} cases left ({', '.join(left[:jobs])}). Run the same command again with "
            "fewer jobs; finished cases are kept."
        ) from error
    if failed:
        log.warning("%d of %d cases were skipped, see %s", len(failed), len(paths), folder / "failed.json")
    ready = {uid: path for uid, path in paths.items() if uid not in failed}
    if not ready:
        first = next(iter(failed.items()), ("none", "the index is empty"))
        raise ReadError(f"No case of {source.root} could be prepared; the first, {first[0]}: {first[1]}")
    return ready


def _key(source: CaseSource, preparation: Preparation, row: dict[Hashable, Any]) -> str:
    parts = {
        "format": FORMAT,
        "source": f"{type(source).__name__} {Path(source.root).resolve()}",
        "preparation": asdict(preparation),
        "row": str(row),
        "files": source.fingerprint(str(row["series_uid"])) if isinstance(source, Fingerprinted) else "",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _prepare_one(
    source: CaseSource, series_uid: str, preparation: Preparation, path: Path
) -> tuple[str, str | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about every odd tag of every file
            save_prepared(prepare_case(source.case(series_uid), preparation), path)
    except ReadError as error:
        return series_uid, str(error)
    except Exception as error:  # one broken case must not end a run of thousands
        return series_uid, f"{type(error).__name__}: {error}"
    return series_uid, None


def _write_failed(folder: Path, failed: dict[str, str]) -> None:
    path = folder / "failed.json"
    if not failed:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as part:
        part.write_text(json.dumps(failed, indent=1))
