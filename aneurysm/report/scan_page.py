"""The page of one predicted scan, for the person who will look at the scan, and the list of many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, PRESENT
from aneurysm.data.scan import Grid
from aneurysm.data.tables import EXPERT, LOCATION_KEYS
from aneurysm.evaluation.summary import merged_seeds
from aneurysm.report.html import Picture, write_page
from aneurysm.report.projections import NEAR_MM, GraphLike, candidate_crops, mip_panel, vessel_graph_figure
from aneurysm.report.views import Mark

MARKED_MOST = 8  # candidates marked in projections; more would hide the vessels
CROPS_CAPTION = (
    "The best candidates in three planes, 30 mm wide. Circle: a sphere with the volume of the predicted sac. "
    "Blue: outline of the arteries as segmented."
)
GRAPH_CAPTION = (
    "Centre lines of the arteries, bright where the graph network finds the vessel unusual. "
    "Numbers as in the table of candidates."
)


@dataclass(frozen=True, eq=False)
class ScanReport:
    """Everything the page of one scan shows."""

    series_uid: str
    patient_id: str
    modality: str  # CTA, MRA, T1, T2
    image: np.ndarray  # (d, h, w) canonical, any intensity unit
    grid: Grid  # of the image and the vessel mask
    source: Grid  # of the stored input, for voxel positions
    probabilities: np.ndarray  # (14,) in submission order
    candidates: pd.DataFrame  # EXPERT table of this scan; folds and seeds are averaged
    vessel: np.ndarray | None = None  # (d, h, w), non-zero is vessel
    graph: GraphLike | None = None
    node_score: np.ndarray | None = None  # (N,) 0..1, of the graph's nodes
    age: float | None = None  # years
    sex: str | None = None
    notes: tuple[str, ...] = ()  # of the reader
    model: str = ""  # which bundle, in words
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds per part

    def __post_init__(self) -> None:
        probabilities = np.asarray(self.probabilities, dtype=np.float64).reshape(-1)
        object.__setattr__(self, "probabilities", probabilities)
        if probabilities.shape != (len(LABEL_COLUMNS),):
            raise ValueError(
                f"{self.series_uid}: the page needs {len(LABEL_COLUMNS)} probabilities in submission order, "
                f"got {probabilities.size}."
            )
        for name, array in (("image", self.image), ("vessel mask", self.vessel)):
            if array is not None and array.shape != self.grid.shape:
                raise ValueError(
                    f"{self.series_uid}: the {name} is {array.shape} on a grid {self.grid.shape}."
                )
        if (self.graph is None) != (self.node_score is None):
            raise ValueError(f"{self.series_uid}: a vessel graph and its node scores come together.")

    @property
    def ranked(self) -> pd.DataFrame:
        """One row per candidate, best first."""
        merged = merged_seeds(EXPERT.conform(self.candidates))
        return merged.sort_values("p", ascending=False, kind="stable").reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class ScanLine:
    """One line of the overview."""

    series_uid: str
    patient_id: str = ""
    modality: str = ""
    probabilities: np.ndarray | None = None  # (14,); None when the scan could not be read
    candidates: int = 0
    best_candidate: float = float("nan")  # highest p
    page: str | None = None  # relative link
    error: str = ""  # why the scan could not be read

    @property
    def present(self) -> float:
        """Probability of an aneurysm, NaN when the scan could not be read."""
        return float("nan") if self.probabilities is None else float(self.probabilities[-1])

    @property
    def top_location(self) -> tuple[str, float]:
        """The most likely location and its probability."""
        return ("–", float("nan")) if self.probabilities is None else _top(np.asarray(self.probabilities))


def write_scan_page(path: Path, report: ScanReport) -> Path:
    """Write the page of one scan: verdict, candidates, pictures, how to read them.

    Raises:
        ValueError: the candidates break the contract of the EXPERT table.
    """
    ranked = report.ranked
    table = ranked[["x_mm", "y_mm", "z_mm", "p"]].to_numpy(dtype=np.float64)
    marks: list[Mark] = [(row[:3], float(row[3])) for row in table]
    volume = ranked["volume_mm3"].to_numpy(dtype=np.float64)
    radius = np.cbrt(3 * np.where(volume > 0, volume, np.nan) / (4 * np.pi))
    crops = graph = None
    if marks:
        figure = candidate_crops(report.image, report.grid, marks, radius, report.vessel)
        crops = Picture("Candidates close up", figure, CROPS_CAPTION)
    if report.graph is not None and report.node_score is not None:
        figure = vessel_graph_figure(report.graph, report.node_score, marks[:MARKED_MOST])
        graph = Picture("Vessel graph", figure, GRAPH_CAPTION)
    panel = mip_panel(report.image, report.grid, report.vessel, marks[:MARKED_MOST], modality=report.modality)
    order = np.argsort(-report.probabilities[:-1], kind="stable")
    verdict = [(PRESENT, report.probabilities[-1])]
    verdict += [(LOCATIONS[i], report.probabilities[i]) for i in order]
    longest = max([*report.timings.values(), 1e-9])
    content = {
        "uid": report.series_uid,
        "present": float(report.probabilities[-1]),
        "top_location": _top(report.probabilities),
        "facts": _facts(report),
        "notes": report.notes,
        "verdict": verdict,
        "candidates": [_candidate(row, report) for row in ranked.to_dict("records")],
        "voxel_axes": "slice, row, column in DICOM; i, j, k in NIfTI",
        "projections": Picture("Projections", panel, _projection_caption(report, len(marks))),
        "crops": crops,
        "graph": graph,
        "model": report.model,
        "timings": [(name, seconds, seconds / longest) for name, seconds in report.timings.items()],
    }
    return write_page(path, "scan", content)


def write_overview_page(path: Path, scans: Sequence[ScanLine], title: str = "Predicted scans") -> Path:
    """Write the list of scans with links to their pages, the most suspicious first; failures are named."""
    done = sorted((scan for scan in scans if not scan.error), key=lambda scan: -np.nan_to_num(scan.present))
    failed = [scan for scan in scans if scan.error]
    return write_page(path, "overview", {"title": title, "done": done, "failed": failed})


def _top(probabilities: np.ndarray) -> tuple[str, float]:
    best = int(np.argmax(probabilities[:-1]))
    return LOCATIONS[best], float(probabilities[best])


def _facts(report: ScanReport) -> list[tuple[str, str]]:
    source, grid = report.source, report.grid
    return [
        ("Patient", report.patient_id or "unknown"),
        ("Modality", report.modality),
        ("Age", "unknown" if report.age is None or np.isnan(report.age) else f"{report.age:.0f} years"),
        ("Sex", report.sex or "unknown"),
        ("Stored voxels", _times(source.shape)),
        ("Stored spacing", _times(source.spacing, " mm")),
        ("Voxels the model saw", _times(grid.shape)),
        ("Spacing the model saw", _times(grid.spacing, " mm")),
        ("Field of view", _times(grid.spacing * grid.shape, " mm", 0)),
    ]


def _times(values: Sequence[float] | np.ndarray, unit: str = "", digits: int = 2) -> str:
    whole = all(isinstance(value, int) for value in values)
    return " × ".join(str(value) if whole else f"{value:.{digits}f}" for value in values) + unit


def _candidate(row: dict, report: ScanReport) -> dict:
    mm = np.array([row["x_mm"], row["y_mm"], row["z_mm"]])
    logits = np.array([row[f"{key}_logit"] for key in LOCATION_KEYS], dtype=np.float64)
    best = int(np.argmax(logits)) if np.isfinite(logits).any() else -1
    return row | {
        "location": LOCATIONS[best] if best >= 0 else "–",
        "position": ", ".join(f"{value:.1f}".replace("-", "−") for value in mm),
        "voxel": ", ".join(str(round(value)) for value in report.source.to_index(mm)),
    }


def _projection_caption(report: ScanReport, candidates: int) -> str:
    kind = "Minimum" if report.modality == "T2" else "Maximum"
    text = f"{kind}-intensity projections with the candidates and their probability p."
    if report.vessel is not None:
        text += " Blue: arteries as segmented."
    if report.vessel is not None and report.modality in NEAR_MM:
        text += " Only the surroundings of arteries are projected; other tissue would hide them."
    if candidates > MARKED_MOST:
        text += f" The best {MARKED_MOST} of {candidates} candidates are marked."
    return text
