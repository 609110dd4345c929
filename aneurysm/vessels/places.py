"""Where an aneurysm could be, before anything is ranked: beside every node, and at peaks without a vessel."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.scan import Lesion
from aneurysm.vessels.fusion import FLOOR, UNFITTED_PEAK, Fusion
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.peaks import NO_PEAKS, Peaks

_UNCLEAR_MM = 3.0  # beyond the reach of a hit a place is neither a hit nor a miss


@dataclass(frozen=True, eq=False)
class Places:
    """Possible candidates of one scan."""

    centre_mm: np.ndarray  # (n, 3) RAS, where the sac would be
    home_mm: np.ndarray  # (n, 3) of the node, else of the peak
    node_score: np.ndarray  # (n,) 0..1, NaN at a peak without a vessel
    height: np.ndarray  # (n,) of the peak that marks the place, FLOOR where there is none

    def scores(self, fusion: Fusion | None) -> np.ndarray:
        """Probability of each place, (n,); unfitted, its node score, or a share of its height."""
        if fusion is not None:
            return fusion(self.node_score, self.height)
        bare = ~np.isfinite(self.node_score)
        weight = 1.0 if bare.all() else UNFITTED_PEAK
        return np.where(bare, weight * self.height, self.node_score)

    def source(self, place: int) -> str:
        """graph, heatmap, or both."""
        if not np.isfinite(self.node_score[place]):
            return "heatmap"
        return "both" if self.height[place] > FLOOR else "graph"

    def without_low_peaks(self, kept: int) -> "Places":
        """Without the peaks off the graph, save the highest `kept`."""
        bare = np.flatnonzero(~np.isfinite(self.node_score))
        drop = bare[np.argsort(-self.height[bare], kind="stable")][kept:]
        return self.at(np.setdiff1d(np.arange(len(self.height)), drop))

    def at(self, chosen: np.ndarray) -> "Places":
        """Some of the places."""
        return Places(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def apart(self, scores: np.ndarray, min_distance_mm: float, most: int) -> Iterator[int]:
        """Places by falling score, none closer to an earlier one than the distance, at most `most`."""
        open_ = np.ones(len(scores), bool)
        for _ in range(most):
            if not open_.any():
                return
            best = int(np.argmax(np.where(open_, scores, -np.inf)))
            yield best
            for where in (self.centre_mm, self.home_mm):
                open_ &= np.linalg.norm(where - where[best], axis=1) >= min_distance_mm
            open_[best] = False

    def hits(self, lesions: tuple[Lesion, ...], reach_mm: float) -> np.ndarray:
        """(n,) 1 within max(reach_mm, radius) of a lesion, NaN a little farther, else 0."""
        found = np.zeros(len(self.height))
        for lesion in lesions:
            gap = np.linalg.norm(self.centre_mm - np.asarray(lesion.centre_mm), axis=1)
            reach = max(reach_mm, lesion.radius_mm or 0.0)
            found[(gap <= reach + _UNCLEAR_MM) & (found != 1)] = np.nan
            found[gap <= reach] = 1
        return found


def find_places(
    graph: VesselGraph, node_score: np.ndarray, peaks: Peaks, source: str = "union", refine_mm: float = 6.0
) -> Places:
    """Every place that a source knows of.

    Args:
        graph: of the vessel mask.
        node_score: (N,) in 0..1.
        peaks: of the heat map, or of the sac's probability.
        source: graph (peaks are ignored), heatmap (nodes are ignored) or union.
        refine_mm: how far a centre may move from its node to a peak; half as far where the mask bulges.

    Raises:
        ValueError: no such source, or a score is missing or NaN.
    """
    node_score = np.asarray(node_score, float)
    if node_score.shape != (len(graph),) or not np.isfinite(node_score).all():
        raise ValueError(
            f"propose needs a finite score per node, shape {(len(graph),)}, but got {node_score.shape} with "
            f"{int((~np.isfinite(node_score)).sum())} NaN or infinite values."
        )
    if source == "heatmap":
        nothing = np.full(len(peaks), np.nan)
        return Places(peaks.centre_mm, peaks.centre_mm, nothing, peaks.height)
    if source not in ("graph", "union"):
        raise ValueError(f"Candidates come from graph, heatmap or union, not {source!r}.")
    if source == "graph":
        peaks = NO_PEAKS
    centre, height = _refined(graph, peaks, refine_mm)
    bare = np.ones(len(peaks), bool)
    if len(graph) and len(peaks):
        gap, nearest = KDTree(graph.position).query(peaks.centre_mm)
        bare = gap > graph.radius[nearest] + refine_mm / 2
    lone = peaks.centre_mm[bare]
    return Places(
        np.concatenate([centre, lone]),
        np.concatenate([graph.position, lone]),
        np.concatenate([node_score, np.full(len(lone), np.nan)]),
        np.concatenate([height, peaks.height[bare]]),
    )


def _refined(graph: VesselGraph, peaks: Peaks, refine_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the sac beside each node would be, (N, 3) RAS mm, and the height of the peak there, (N,)."""
    away = graph.bulge_centre - graph.position
    trust = graph.bulge_mm3 / (graph.bulge_mm3 + 2.0)  # a few voxels of surface noise hardly count
    centre = graph.position + trust[:, None] * away
    height = np.full(len(graph), FLOOR)
    if len(peaks) and len(graph):
        gap, nearest = (np.asarray(found) for found in KDTree(peaks.centre_mm).query(centre))
        close = gap <= refine_mm * (1 - trust / 2)
        centre[close] = peaks.centre_mm[nearest[close]]
        height[close] = peaks.height[nearest[close]]
    return centre, height
