"""From node scores to a short list of places worth an expert's look, and what the graph knows about each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree
from skimage import measure

from aneurysm.data.scan import Grid, Lesion
from aneurysm.vessels.cleanup import check_on_grid
from aneurysm.vessels.features import NODE_FEATURES
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.local_shape import ball_steps

_NEIGHBOURHOOD = ("radius_ratio", "tip_fatness", "bulge_volume", "bulge_depth", "volume_ratio_4mm")
CANDIDATE_FEATURES: Final = (
    *NODE_FEATURES,  # at the candidate's node
    *(f"{name}_within_5mm" for name in _NEIGHBOURHOOD),  # largest over the nodes within 5 mm
    "node_score",
    "node_distance",  # from the candidate's centre to its node, in 5 mm
    "on_graph",  # 0 when there is no vessel graph; the columns above are then 0
)
ORPHAN_WEIGHT = 0.1
_UNKNOWN_RADIUS_MM = 2.0  # of a lesion annotated by a point: a sac of 4 mm, the median of the literature


@dataclass(frozen=True, eq=False)
class Candidate:
    """One place that may hold an aneurysm."""

    centre_mm: np.ndarray  # (3,) RAS mm
    score: float  # 0..1
    node: int  # nearest node of the vessel graph, -1 when the graph is empty
    radius_mm: float  # of the vessel at that node, 0 when the graph is empty

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
) -> list[Candidate]:
    """The best-scored places, by falling score, no two closer than a minimum distance.

    A centre moves from the best node to the middle of the bulge beside it, or to the peak of the evidence
    there, because a sidewall sac lies off the centreline. A few evidence peaks without a vessel nearby become
    candidates themselves: the vessel mask may have missed the sac.

    Args:
        graph: of the vessel mask.
        node_score: (N,) in 0..1.
        evidence: (d, h, w) aneurysm probability in 0..1, or None.
        grid: where `evidence` lies; needed with it.
        max_candidates: length of the list at most.
        min_distance_mm: between two candidates.
        refine_mm: how far a centre may move from its node to a peak of the evidence; half as far where the
            mask itself bulges, because a peak beside a bulge belongs to something else.
        evidence_threshold: peaks below are ignored.
        max_orphans: how many peaks off the graph may become candidates, the highest ones. Their score is
            `ORPHAN_WEIGHT` times their height, for the graph knows nothing of them. Without any graph all
            peaks count, with their height.

    Raises:
        ValueError: a score is missing or NaN, or the evidence has no grid or another shape.
    """
    node_score = np.asarray(node_score, float)
    if node_score.shape != (len(graph),) or not np.isfinite(node_score).all():
        raise ValueError(
            f"propose needs a finite score per node, shape {(len(graph),)}, but got {node_score.shape} with "
            f"{int((~np.isfinite(node_score)).sum())} NaN or infinite values."
        )
    peaks, heights = np.zeros((0, 3)), np.zeros(0)
    if evidence is not None:
        if grid is None:
            raise ValueError("propose got evidence without its grid.")
        check_on_grid(evidence, grid)
        peaks, heights = evidence_peaks(evidence, grid, evidence_threshold, min_distance_mm)
    centre = _refined(graph, peaks, refine_mm)
    if len(graph) and len(peaks):
        gap, nearest = KDTree(graph.position).query(peaks)
        orphan = gap > graph.radius[nearest] + refine_mm / 2
        # Highest first. Node scores and heights are no common scale: unweighted, specks of evidence in bone
        # and veins would take the places of the best nodes.
        peaks, heights = peaks[orphan][:max_orphans], ORPHAN_WEIGHT * heights[orphan][:max_orphans]
    places = np.concatenate([centre, peaks])
    homes = np.concatenate([graph.position, peaks])
    scores = np.concatenate([node_score, heights])
    tree = KDTree(graph.position) if len(graph) else None
    open_ = np.ones(len(places), bool)
    chosen: list[Candidate] = []
    while open_.any() and len(chosen) < max_candidates:
        best = int(np.argmax(np.where(open_, scores, -np.inf)))
        node = int(tree.query(places[best])[1]) if tree is not None else -1
        width = float(graph.radius[node]) if node >= 0 else 0.0
        chosen.append(Candidate(places[best].copy(), float(np.clip(scores[best], 0, 1)), node, width))
        open_ &= np.linalg.norm(places - places[best], axis=1) >= min_distance_mm
        open_ &= np.linalg.norm(homes - homes[best], axis=1) >= min_distance_mm
    return chosen


def _refined(graph: VesselGraph, peaks: np.ndarray, refine_mm: float) -> np.ndarray:
    """Where the sac beside each node would be, (N, 3) RAS mm."""
    away = graph.bulge_centre - graph.position
    trust = graph.bulge_mm3 / (graph.bulge_mm3 + 2.0)  # a few voxels of surface noise hardly count
    centre = graph.position + trust[:, None] * away
    if len(peaks) and len(graph):
        gap, nearest = (np.asarray(found) for found in KDTree(peaks).query(centre))
        close = gap <= refine_mm * (1 - trust / 2)
        centre[close] = peaks[nearest[close]]
    return centre


def evidence_peaks(
    evidence: np.ndarray, grid: Grid, threshold: float, min_distance_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Maxima of a probability volume (d, h, w): centres (k, 3) in mm and heights (k,), highest first.

    A centre is the centroid of the evidence within half the minimum distance of the maximum.
    """
    volume = np.asarray(evidence, np.float32)
    if not (volume >= threshold).any():
        return np.zeros((0, 3)), np.zeros(0)
    smooth = ndimage.gaussian_filter(volume, 0.7 / grid.spacing)
    size = np.maximum(1, 2 * np.round(min_distance_mm / 2 / grid.spacing).astype(int) + 1)
    top = (smooth == ndimage.maximum_filter(smooth, size)) & (volume >= threshold)
    plateaus = np.asarray(measure.label(top, connectivity=3))
    count = int(plateaus.max())
    maxima = [np.argwhere(plateaus == i) for i in range(1, count + 1)]
    found = np.array([np.rint(voxels.mean(0)) for voxels in maxima], int).reshape(-1, 3)
    height = np.array([volume[tuple(voxels.T)].max() for voxels in maxima], float)
    steps, step_mm = ball_steps(grid, max(min_distance_mm / 2, float(grid.spacing.max())))
    centres = np.empty((count, 3))
    for i, voxel in enumerate(found):
        around = voxel + steps
        valid = np.all((around >= 0) & (around < grid.shape), axis=1)
        weight = volume[tuple(around[valid].T)] ** 2 + 1e-9
        centres[i] = grid.to_mm(voxel) + (weight[:, None] * step_mm[valid]).sum(0) / weight.sum()
    order = np.argsort(-height, kind="stable")
    return centres[order], height[order]


def label_nodes(
    graph: VesselGraph,
    lesions: Sequence[Lesion] = (),
    aneurysm: np.ndarray | None = None,
    grid: Grid | None = None,
) -> np.ndarray:
    """Training target of every node, (N,) float32: 1 at an aneurysm, 0 elsewhere, NaN where it is unclear.

    With s the distance from a node to the surface of the nearest sac (0 inside) and r its vessel radius: the
    node is positive for s <= 1 mm + r / 2 (at most 2 mm), unclear up to s = r + 3 mm, healthy beyond. The
    nearest node of each sac is positive unless it is healthy: no sac may be left without a positive node.

    Args:
        graph: of the vessel mask.
        lesions: centres, with radius where known (2 mm is assumed otherwise).
        aneurysm: (d, h, w), k inside lesion k, 0 elsewhere; used instead of `lesions` when given.
        grid: where `aneurysm` lies.

    Raises:
        ValueError: the aneurysm mask has no grid or another shape.
    """
    target = np.zeros(len(graph), np.float32)
    gaps: list[np.ndarray] = []
    if len(graph) == 0:
        return target
    if aneurysm is not None:
        if grid is None:
            raise ValueError("label_nodes got an aneurysm mask without its grid.")
        check_on_grid(aneurysm, grid)
        voxels = np.argwhere(aneurysm)
        ids = aneurysm[tuple(voxels.T)]
        for k in np.unique(ids):
            gaps.append(KDTree(grid.to_mm(voxels[ids == k])).query(graph.position)[0])
    else:
        for lesion in lesions:
            radius = lesion.radius_mm if lesion.radius_mm is not None else _UNKNOWN_RADIUS_MM
            from_centre = np.linalg.norm(graph.position - lesion.centre_mm, axis=1)
            gaps.append(np.maximum(from_centre - radius, 0))
    unclear_mm = graph.radius + 3.0
    for gap in gaps:
        target[(gap <= unclear_mm) & (target != 1)] = np.nan
        target[gap <= np.minimum(1.0 + graph.radius / 2, 2.0)] = 1
        nearest = int(np.argmin(gap))
        if gap[nearest] <= unclear_mm[nearest]:
            target[nearest] = 1
    return target


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
