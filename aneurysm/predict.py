"""Predict: read new scans with a trained bundle and write what a person and a program need of each."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

import aneurysm
from aneurysm.data.dicom.series import find_series, read_series
from aneurysm.data.errors import ReadError, UserError
from aneurysm.data.files import replacing
from aneurysm.data.formats.metaimage import SUFFIXES, read_metaimage
from aneurysm.data.formats.nifti import read_nifti, series_name, write_nifti
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, MODALITIES
from aneurysm.data.preparation.progress import duration
from aneurysm.data.preparation.workers import run_each
from aneurysm.data.scan import Scan
from aneurysm.data.tables import EXPERT, LOCATION_KEYS
from aneurysm.pipeline import Detection, Detector
from aneurysm.report.scan_page import ScanLine, ScanReport, write_overview_page, write_scan_page
from aneurysm.stages.expert import FLOW_COLUMNS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """One scan to read, not read yet; it can be sent to another process."""

    name: str
    read: Callable[[], Scan]


@dataclass(frozen=True)
class Request:
    """How every scan is predicted, whichever process does it."""

    bundle: Path
    output: Path
    device: str
    threads: int | None
    threshold: float
    age: float | None
    sex: str | None


def predict(cfg: DictConfig) -> None:
    """Predict every scan under `cfg.input`; one that cannot be read is named and the others go on.

    Raises:
        UserError: there is nothing to read, the bundle does not fit, or at least one scan failed.
    """
    if cfg.modality is not None and cfg.modality not in MODALITIES:
        raise UserError(f"modality={cfg.modality}: it is one of {', '.join(MODALITIES)}.")
    if cfg.sex not in (None, "M", "F"):
        raise UserError(f"sex={cfg.sex}: it is M or F.")
    if not 0 < float(cfg.threshold) < 1:
        raise UserError(f"threshold={cfg.threshold}: it is a probability between 0 and 1.")
    if int(cfg.parallel.jobs) < 1:
        raise UserError(f"parallel.jobs={cfg.parallel.jobs}: it is at least 1.")
    inputs = find_inputs(Path(cfg.input).absolute(), cfg.modality)
    output = Path(cfg.output).absolute()
    request = Request(
        bundle=Path(cfg.bundle).absolute(),
        output=output,
        device=cfg.accelerator.replace("gpu", "cuda"),
        threads=None if cfg.threads is None else int(cfg.threads),
        threshold=float(cfg.threshold),
        age=None if cfg.age is None else float(cfg.age),
        sex=cfg.sex,
    )
    _detector(request)  # a bundle that does not fit is told once, before any work
    lines = _predict_each(inputs, request, int(cfg.parallel.jobs), str(cfg.parallel.backend))
    log.info("Results: %s", output / "predictions.csv")
    log.info("To look at: %s", output / "index.html")
    failed = [line for line in lines if line.error]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(inputs)} scans could not be predicted; the others are in {output}."
        )


def _predict_each(inputs: list[Input], request: Request, jobs: int, backend: str) -> list[ScanLine]:
    """Predict all scans, in any order; the tables keep the order of the inputs and grow with every scan."""
    work: dict[str, Input] = {}
    lines: dict[str, ScanLine] = {}
    names: set[str] = set()
    for number, one in enumerate(inputs):
        if one.name in names:  # its results would take the place of the other's
            problem = "another scan of this name was read before it; rename one, or predict them apart."
            log.error("%s was not predicted: %s", one.name, problem)
            lines[f"{number:06d}"] = ScanLine(one.name, error=problem)
        else:
            work[f"{number:06d}"] = one
        names.add(one.name)
    results = request.output / ".lines"
    began = time.monotonic()
    write_tables(request.output, [])
    task = partial(_predict_one, request)
    running = request.output / ".running"
    for name, problem in run_each(task, work, jobs, backend, running, verb="predicted"):
        if problem is None:
            line, took = _read_line(results / f"{name}.json")
        else:
            line, took = ScanLine(work[name].name, error=problem), 0.0
            log.error("%s was not predicted: %s", work[name].name, problem)
        lines[name] = line
        write_tables(request.output, [lines[name] for name in sorted(lines)])
        left = (time.monotonic() - began) / len(lines) * (len(inputs) - len(lines))
        if problem is None:
            log.info(
                "%d/%d  %s  %s  aneurysm present %.2f, %d candidates  (%.0f s%s)",
                len(lines),
                len(inputs),
                line.series_uid,
                line.modality,
                line.present,
                line.candidates,
                took,
                f", about {duration(left)} left" if left else "",
            )
    for note in results.glob("*.json"):
        note.unlink()
    if results.is_dir():
        results.rmdir()
    return [lines[name] for name in sorted(lines)]


def _predict_one(request: Request, name: str, one: Input) -> str | None:
    """Predict one scan and leave its line for the tables; returns what went wrong."""
    started = time.monotonic()
    detector = _detector(request)
    try:
        scan = one.read()
        scan = replace(
            scan,
            age=request.age if request.age is not None else scan.age,
            sex=request.sex if request.sex is not None else scan.sex,
        )
        read = time.monotonic()
        detection = detector(scan)
        timings = {"reading": read - started, "detection": time.monotonic() - read}
        folder = request.output / scan.series_uid
        line = write_scan(folder, detection, detector, request.threshold, timings)
    except ValueError as error:
        return str(error)
    except Exception as error:  # one odd scan must not end a run of thousands
        log.debug("%s", one.name, exc_info=True)
        return f"{type(error).__name__}: {error}"
    content = {**vars(line), "probabilities": [float(p) for p in detection.labels]}
    with replacing(request.output / ".lines" / f"{name}.json") as part:
        part.write_text(json.dumps({"line": content, "seconds": time.monotonic() - started}))
    return None


def _read_line(path: Path) -> tuple[ScanLine, float]:
    content = json.loads(path.read_text())
    line = content["line"]
    return ScanLine(**{**line, "probabilities": np.array(line["probabilities"])}), content["seconds"]


@lru_cache(maxsize=1)
def _detector(request: Request) -> Detector:
    """The detector of this process, loaded once."""
    if request.threads:
        torch.set_num_threads(request.threads)
    return Detector.load(request.bundle, device=request.device)


def find_inputs(path: Path, modality: str | None) -> list[Input]:
    """All scans at a path: a NIfTI, MetaImage or NRRD file, a DICOM series, or any folder tree of these.

    Args:
        modality: CTA, MRA, T1 or T2; needed for volumes whose name does not say it.

    Raises:
        ReadError: nothing there, or nothing that is a scan.
    """
    if not path.exists():
        raise ReadError(f"{path} does not exist: give a DICOM folder, a NIfTI file or a folder of series.")
    if path.is_file() and _is_volume(path):
        return [_volume(path, modality)]
    folder = path if path.is_dir() else path.parent
    found = [_volume(p, modality) for p in sorted(folder.rglob("*")) if p.is_file() and _is_volume(p)]
    try:
        series = find_series(folder)
    except ReadError:
        if not found:
            raise
        series = {}
    if path.is_file():  # one DICOM file stands for its series
        series = {uid: files for uid, files in series.items() if path in files}
        found = []
    for uid, files in series.items():
        found.append(Input(uid, partial(read_series, files, modality)))
    if not found:
        raise ReadError(f"{path} holds no DICOM series and no NIfTI, MHA or NRRD file.")
    return found


def write_scan(
    folder: Path, detection: Detection, detector: Detector, threshold: float, timings: dict[str, float]
) -> ScanLine:
    """Write one scan's masks, JSON and page; returns its line for the overview."""
    scan, case = detection.scan, detection.case
    lumen = detection.mended.mask
    write_nifti(folder / "vessels.nii.gz", lumen.astype(np.uint8), case.grid, scan.source)
    if detection.arteries is not None:
        write_nifti(folder / "arteries.nii.gz", detection.arteries, case.grid, scan.source)
    write_nifti(folder / "candidates.nii.gz", _candidate_mask(detection, threshold), case.grid, scan.source)
    with replacing(folder / "report.json") as part:
        part.write_text(json.dumps(_plain_report(detection, detector), indent=2))
    candidates = detection.candidates
    if candidates.empty:
        candidates = EXPERT.conform(pd.DataFrame(columns=list(EXPERT.columns)))
    report = ScanReport(
        series_uid=scan.series_uid,
        patient_id=scan.patient_id,
        modality=scan.modality,
        image=case.image,
        grid=case.grid,
        source=scan.source,
        probabilities=detection.labels,
        candidates=candidates,
        vessel=lumen,
        graph=detection.graph,  # pyright: ignore[reportArgumentType]  # frozen attributes satisfy it
        node_score=detection.node_scores,
        age=scan.age,
        sex=scan.sex,
        notes=scan.notes if detection.roi.box is None else (*scan.notes, f"Searched {detection.roi.note}."),
        model=_model(detector),
        timings=timings,
    )
    write_scan_page(folder / "index.html", report)
    return ScanLine(
        series_uid=scan.series_uid,
        patient_id=scan.patient_id,
        modality=scan.modality,
        probabilities=detection.labels,
        candidates=len(detection.candidates),
        best_candidate=float(detection.candidates.p.max()) if len(detection.candidates) else float("nan"),
        page=f"{folder.name}/index.html",
    )


def write_tables(output: Path, lines: list[ScanLine]) -> None:
    """Write `predictions.csv` (the 14 columns in submission order) and the overview, atomically."""
    done = [line for line in lines if line.probabilities is not None]
    table = pd.DataFrame([line.probabilities for line in done], columns=list(LABEL_COLUMNS))
    table.insert(0, "SeriesInstanceUID", [line.series_uid for line in done])
    with replacing(output / "predictions.csv") as part:
        table.to_csv(part, index=False, float_format="%.6f")
    write_overview_page(output / "index.html", lines)


def _candidate_mask(detection: Detection, threshold: float) -> np.ndarray:
    """Sac voxels, labelled 1, 2, ... by the rank of the candidate they belong to."""
    mask = np.zeros(detection.case.grid.shape, np.uint8)
    sac = np.argwhere(detection.sac >= 0.5)
    rows = detection.candidates.to_dict("records")
    centres = np.array([[r["x_mm"], r["y_mm"], r["z_mm"]] for r in rows if r["p"] >= threshold], np.float64)
    if not len(centres) or not len(sac):
        return mask
    distance = np.linalg.norm(detection.case.grid.to_mm(sac)[:, None] - centres[None], axis=-1)
    nearest = distance.argmin(1)
    # Sac probability of another, rejected candidate nearby must not be drawn as this one's.
    near = distance[np.arange(len(sac)), nearest] <= 10.0
    mask[tuple(sac[near].T)] = nearest[near] + 1
    return mask


def _plain_report(detection: Detection, detector: Detector) -> dict:
    scan = detection.scan
    candidates = []
    for rank, row in enumerate(detection.candidates.to_dict("records"), start=1):
        place = np.array([row["x_mm"], row["y_mm"], row["z_mm"]], np.float64)
        logits = np.array([row[f"{key}_logit"] for key in LOCATION_KEYS])
        share = np.exp(logits - logits.max())
        candidates.append(
            {
                "rank": rank,
                "position_mm": place.round(3).tolist(),
                "position_voxel": scan.source.to_index(place).round(3).tolist(),
                "location": LOCATIONS[int(logits.argmax())],
                "location_probability": float(share.max() / share.sum()),
                "probability": float(row["p"]),
                "order_parameter": _finite(row["order_parameter"]),
                "physics_residual": _finite(row["physics_residual"]),
                "flow": {name: _finite(row[name]) for name in ("has_flow", "flow_driven", *FLOW_COLUMNS)},
                "smart_net_score": float(row["score"]),
                "volume_mm3": float(row["volume_mm3"]),
            }
        )
    return {
        "series_uid": scan.series_uid,
        "patient_id": scan.patient_id,
        "modality": scan.modality,
        "age": scan.age,
        "sex": scan.sex,
        "notes": list(scan.notes),
        "input": {
            "shape": list(scan.source.shape),
            "affine": scan.source.affine.tolist(),
            "axes": "array order of the input: slice, row, column for DICOM; i, j, k for NIfTI",
        },
        "world": "RAS+, mm",
        "region_of_interest": _region(detection),
        "probabilities": dict(zip(LABEL_COLUMNS, map(float, detection.labels), strict=True)),
        "candidates": candidates,
        "vessel_mask_repairs": detection.mended.row(),
        "units": {
            "physics_residual": "log10 of the dimensionless Navier-Stokes residual",
            "flow_wall_shear_pa": "Pa, of a steady flow with the mean speed that Murray's law expects",
            "order_parameter": "0..1",
        },
        "model": _model(detector),
        "not_a_medical_device": True,
    }


def _region(detection: Detection) -> dict:
    """Where the segmentation networks looked: `centre_mm` is null where it was the whole scan."""
    box, grid = detection.roi.box, detection.case.grid
    if box is None:
        return {"note": detection.roi.note, "centre_mm": None, "size_mm": None}
    middle = (np.array(box.start) + box.stop - 1) / 2
    return {
        "note": detection.roi.note,
        "centre_mm": grid.to_mm(middle).round(3).tolist(),
        "size_mm": (np.array(box.size) * grid.spacing)[::-1].round(3).tolist(),  # along x, y, z
    }


def _model(detector: Detector) -> str:
    note = detector.note
    trained = note["trained_on"]
    return (
        f"{note['experiment']}, {note['folds']} folds, trained on {trained['series']} series of "
        f"{trained['patients']} patients with aneurysm {note['version']}; "
        f"predicted with {aneurysm.__version__}"
    )


def _volume(path: Path, modality: str | None) -> Input:
    nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    name = series_name(path) if nifti else path.stem
    return Input(name, partial(_read_volume, path, modality or _modality_in(name), nifti))


def _read_volume(path: Path, modality: str | None, nifti: bool) -> Scan:
    if modality is None:
        raise ReadError(
            f"{path}: the file does not say how it was acquired; add modality=CTA, MRA, T1 or T2."
        )
    return read_nifti(path, modality) if nifti else read_metaimage(path, modality)


def _modality_in(name: str) -> str | None:
    """The modality that a file name spells out, when it is exactly one."""
    words = name.upper().replace("-", "_").replace(".", "_").split("_")
    spelled = {
        "TOF": "MRA",
        "ANGIO": "MRA",
        "CT": "CTA",
        "T1W": "T1",
        "T2W": "T2",
        **{m: m for m in MODALITIES},
    }
    found = {spelled[word] for word in words if word in spelled}
    return found.pop() if len(found) == 1 else None


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz", *SUFFIXES))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
