"""From node scores to a short list of places worth an expert's look, and what the graph knows about each."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid
from aneurysm.vessels.features import NODE_FEATURES
from aneurysm.vessels.fusion import Fusion
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.peaks import NO_PEAKS, Peaks, evidence_peaks
from aneurysm.vessels.places import Places, find_places
from aneurysm.vessels.voxels import check_on_grid

_NEIGHBOURHOOD = ("radius_ratio", "tip_fatness", "bulge_volume", "bulge_depth", "volume_ratio_4mm")
CANDIDATE_FEATURES: Final = (
    *NODE_FEATURES,  # at the candidate's node
    *(f"{name}_within_5mm" for name in _NEIGHBOURHOOD),  # largest over the nodes within 5 mm
    "node_score",
    "node_distance",  # from the candidate's centre to its node, in 5 mm
    "on_graph",  # 0 when there is no vessel graph; the columns above are then 0
)
SOURCES = ("graph", "heatmap", "union")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One place that may hold an aneurysm."""

    centre_mm: np.ndarray  # (3,) RAS mm
    score: float  # 0..1
    node: int  # nearest node of the vessel graph, -1 when the graph is empty
    radius_mm: float  # of the vessel at that node, 0 when the graph is empty
    source: str = ""  # what proposed it: graph, heatmap, or both
    region: str = ""  # name of the artery it lies on; empty when unknown

    def __post_init__(self) -> None:
        if np.shape(self.centre_mm) != (3,) or not np.isfinite(self.centre_mm).all():
            raise ValueError(f"A candidate needs a finite centre (x, y, z) in mm but got {self.centre_mm}.")


def propose(
    graph: VesselGraph,
    node_score: np.ndarray,
    evidence: np.ndarray | None = None,
    grid: Grid | None = None,
    max_candidates: int = 8,
    min_distance_mm: float = 5.0,
    refine_mm: float = 6.0,
    evidence_threshold: float = 0.3,
    max_orphans: int = 2,
    source: str = "union",
    fusion: Fusion | None = None,
    min_score: float = 0.0,
) -> list[Candidate]:
    """The best-scored places, by falling score, no two closer than a minimum distance.

    A centre moves from the best node to the middle of the bulge beside it, or to the peak of the evidence
    there, because a sidewall sac lies off the centreline. Evidence peaks without a vessel nearby become
    candidates themselves: the vessel mask may have missed the sac.

    Args:
        graph: of the vessel mask.
        node_score: (N,) in 0..1.
        evidence: (d, h, w) aneurysm probability or heat map in 0..1, or None.
        grid: where `evidence` lies; needed with it.
        max_candidates: length of the list at most.
        min_distance_mm: between two candidates.
        refine_mm: how far a centre may move from its node to a peak of the evidence; half as far where the
            mask itself bulges, because a peak beside a bulge belongs to something else.
        evidence_threshold: peaks below are ignored.
        max_orphans: how many peaks off the graph may become candidates, the highest ones, while there is no
            `fusion` to say what they are worth. Without any graph all peaks count, with their height.
        source: graph, heatmap (the peaks of the evidence) or union.
        fusion: puts nodes and peaks on one scale; without it a peak off the graph counts
            `fusion.UNFITTED_PEAK` times its height.
        min_score: candidates below it are left out.

    Raises:
        ValueError: a score is missing or NaN, the evidence has no grid or another shape, or no such source.
    """
    peaks = NO_PEAKS
    if evidence is not None:
        if grid is None:
            raise ValueError("propose got evidence without its grid.")
        check_on_grid(evidence, grid)
        peaks = Peaks(*evidence_peaks(evidence, grid, evidence_threshold, min_distance_mm))
    places = find_places(graph, node_score, peaks, source, refine_mm)
    return ranked(graph, places, fusion, max_candidates, min_distance_mm, min_score, max_orphans)


def ranked(
    graph: VesselGraph,
    places: Places,
    fusion: Fusion | None,
    max_candidates: int,
    min_distance_mm: float,
    min_score: float = 0.0,
    max_orphans: int = 2,
) -> list[Candidate]:
    """As `propose`, from places that are already known."""
    from_both = bool(np.isfinite(places.node_score).any())  # peaks alone are not outranked by any node
    if fusion is None and from_both:
        places = places.without_low_peaks(max_orphans)
    return choose(graph, places, fusion, max_candidates, min_distance_mm, min_score)


def choose(
    graph: VesselGraph,
    places: Places,
    fusion: Fusion | None,
    max_candidates: int,
    min_distance_mm: float,
    min_score: float = 0.0,
) -> list[Candidate]:
    """The best of the places, by falling score, no two closer than a minimum distance."""
    scores = places.scores(fusion)
    tree = KDTree(graph.position) if len(graph) else None
    chosen: list[Candidate] = []
    for best in places.apart(scores, min_distance_mm, max_candidates):
        if scores[best] < min_score:
            break
        centre = places.centre_mm[best]
        node = int(tree.query(centre)[1]) if tree is not None else -1
        width = float(graph.radius[node]) if node >= 0 else 0.0
        score = float(np.clip(scores[best], 0, 1))
        chosen.append(Candidate(centre.copy(), score, node, width, places.source(best)))
    return chosen


def candidate_graph_features(graph: VesselGraph, candidate: Candidate) -> np.ndarray:
    """What the graph knows about a candidate: (len(CANDIDATE_FEATURES),) float32, finite."""
    result = np.zeros(len(CANDIDATE_FEATURES), np.float32)
    result[-3] = candidate.score
    if len(graph) == 0 or candidate.node < 0:
        return result
    column = [graph.node_names.index(name) for name in NODE_FEATURES]
    near = np.linalg.norm(graph.position - candidate.centre_mm, axis=1) <= 5.0
    near[candidate.node] = True
    strongest = graph.node_features[near].max(0)
    count = len(NODE_FEATURES)
    result[:count] = graph.node_features[candidate.node, column]
    result[count:-3] = strongest[[graph.node_names.index(name) for name in _NEIGHBOURHOOD]]
    gap = float(np.linalg.norm(graph.position[candidate.node] - candidate.centre_mm))
    result[-2:] = min(gap / 5.0, 4.0), 1.0
    return result
