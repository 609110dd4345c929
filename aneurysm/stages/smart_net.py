"""Stage 3, smart_net: segment, thin, build the vessel graph, score its nodes, propose candidates.

A segmentation network marks lumen and sacs; its thresholded lumen becomes a graph; graph attention decides
which nodes do not belong to a healthy tree. The graph network learns on out-of-fold segmentations, so what
it sees in training has the same errors as what it will see in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from aneurysm.data.labels import LOCATIONS
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid
from aneurysm.stages.graph_data import (
    GraphData,
    GraphItem,
    GraphModule,
    node_scores,
    patient_parts,
)
from aneurysm.stages.heatmap import HEATMAP, heatmap_patch
from aneurysm.stages.segmentation import TARGETS, SegmentationData, SegmentationModule
from aneurysm.stages.volumes import network_image, probability_volume
from aneurysm.stages.windows import Region, View
from aneurysm.vessels.arteries import artery_at
from aneurysm.vessels.candidates import Candidate, ranked
from aneurysm.vessels.features import with_features
from aneurysm.vessels.fusion import Fusion
from aneurysm.vessels.graph import VesselGraph, build_graph
from aneurysm.vessels.lumen_rule import LumenRule
from aneurysm.vessels.peaks import Peaks, evidence_peaks
from aneurysm.vessels.places import find_places
from aneurysm.vessels.repair import Repaired, VesselRules, repair
from aneurysm.vessels.voxels import Voxels

__all__ = [
    "CHANNELS",
    "INPUTS",
    "GraphData",
    "GraphItem",
    "GraphModule",
    "GraphSettings",
    "SegmenterData",
    "SegmenterModule",
    "candidate_rows",
    "candidates",
    "channels",
    "fitted_fusion",
    "graph_mask",
    "mask_graph",
    "node_scores",
    "patient_parts",
    "scan_peaks",
    "segment",
    
]  # fmt: skip

INPUTS, CHANNELS = ("image", "vessel stage"), ("vessel", "aneurysm")
_LOWEST_PEAK = 0.1  # lower maxima are noise
_UNFITTED_PEAK_HEIGHT = 0.3  # what counts of the peaks while nothing is fitted
_REGION_MM = 6.0  # how far a candidate may lie from the artery it is named after
_FITTED_PLACES = 40  # best of each training scan that the common scale is fitted to


def channels(heatmap: str) -> tuple[str, ...]:
    """What the segmenter answers: lumen, sacs, and a heat map of aneurysms if it has that head."""
    return CHANNELS if heatmap == "none" else (*CHANNELS, HEATMAP)


class SegmenterModule(SegmentationModule):
    """Two channels: lumen including sacs, and sacs; a third one with a heat-map head."""


class SegmenterData(SegmentationData):
    """Patches with the image and the vessel stage's out-of-fold probability as input.

    Args:
        train, held_out: prepared cases.
        heatmap_sigma_mm: of the Gaussians of the heat map; None for no such channel.
        settings: of `SegmentationData`.
    """

    def __init__(
        self,
        train: Sequence[Path],
        held_out: Sequence[Path],
        heatmap_sigma_mm: float | None = None,
        **settings: Any,
    ) -> None:
        names = channels("none" if heatmap_sigma_mm is None else "gaussian")
        if heatmap_sigma_mm is not None:
            target = partial(heatmap_patch, sigma_mm=heatmap_sigma_mm)
            self.targets = {**TARGETS, HEATMAP: target}
        super().__init__(train, held_out, names, **settings)


def segment(
    net: nn.Module,
    case: PreparedCase,
    vessel: np.ndarray,
    view: View,
    names: tuple[str, ...] = CHANNELS,
    region: Region | None = None,
) -> dict[str, np.ndarray]:
    """Probabilities of lumen and of sac, and the heat map if the net has one, (d, h, w) float16 each.

    Args:
        vessel: (d, h, w) probability from the vessel stage.
        names: of the net's channels.
        region: where to look; far from it everything is 0.
    """
    inputs = [network_image(case), vessel]
    return dict(zip(names, probability_volume(net, inputs, view, region), strict=True))


@dataclass(frozen=True)
class GraphSettings:
    """How a probability volume becomes a graph, and a scored graph candidates."""

    node_spacing_mm: float
    max_candidates: int
    min_distance_mm: float
    source: str = "union"  # graph, heatmap or union
    min_score: float = 0.0
    rules: VesselRules = field(default_factory=VesselRules)  # how the mask is mended before


def graph_mask(
    probability: dict[str, np.ndarray], rule: LumenRule, grid: Grid, settings: GraphSettings
) -> Repaired:
    """The lumen mask that becomes the graph, with what had to be mended."""
    lumen = probability["vessel"]
    return repair(rule(lumen, grid), grid, settings.rules, lumen, faint=lumen >= rule.threshold)


def mask_graph(
    mask: np.ndarray | Voxels, probability: dict[str, np.ndarray], grid: Grid, settings: GraphSettings
) -> VesselGraph:
    """Thin and link a mended mask, or its voxels."""
    graph = build_graph(mask, grid, node_spacing_mm=settings.node_spacing_mm)
    return with_features(graph, probability, grid)


def scan_peaks(probability: dict[str, np.ndarray], grid: Grid, settings: GraphSettings) -> Peaks:
    """Maxima of the heat map; without that head the sac's probability takes its place."""
    evidence = probability.get(HEATMAP, probability["aneurysm"])
    return Peaks(*evidence_peaks(evidence, grid, _LOWEST_PEAK, settings.min_distance_mm))


def fitted_fusion(
    items: Sequence[GraphItem], scores: Sequence[np.ndarray], settings: GraphSettings, hit_mm: float = 5.0
) -> Fusion | None:
    """One scale for nodes and peaks, fitted to training scans whose aneurysms are known; None without any.

    Args:
        items: training scans.
        scores: node scores of each, from nets that had not seen it.
        settings: of the graph and its candidates.
        hit_mm: a place this close to a centre, or inside its radius, is an aneurysm.
    """
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for item, score in zip(items, scores, strict=True):
        if not item.known:
            continue
        places = find_places(item.graph, score, item.peaks, settings.source)
        order = places.apart(places.scores(None), settings.min_distance_mm, _FITTED_PLACES)
        best = places.at(np.fromiter(order, int))
        columns.append((best.node_score, best.height, best.hits(item.lesions, hit_mm)))
    if not columns:
        return None
    return Fusion.fit(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def candidates(
    graph: VesselGraph,
    scores: np.ndarray,
    peaks: Peaks,
    grid: Grid,
    settings: GraphSettings,
    fusion: Fusion | None = None,
    arteries: np.ndarray | None = None,
) -> list[Candidate]:
    """The places that the expert should look at, best first.

    Args:
        graph: of the vessel mask.
        scores: (N,) of its nodes, 0..1.
        peaks: of the heat map.
        grid: of the prepared scan.
        settings: of the graph and its candidates.
        fusion: the common scale of nodes and peaks, if it was fitted.
        arteries: (d, h, w) artery labels that name the region of each candidate, where known.
    """
    if fusion is None:
        peaks = peaks.above(_UNFITTED_PEAK_HEIGHT)
    places = find_places(graph, scores, peaks, settings.source)
    found = ranked(
        graph, places, fusion, settings.max_candidates, settings.min_distance_mm, settings.min_score
    )
    if arteries is None or not found:
        return found
    named, gap = artery_at(arteries, grid, np.stack([c.centre_mm for c in found]))
    return [
        replace(c, region=LOCATIONS[k]) if mm <= _REGION_MM else c
        for c, k, mm in zip(found, named.tolist(), gap.tolist(), strict=True)
    ]


def candidate_rows(series_uid: str, found: list[Candidate], fold: int) -> pd.DataFrame:
    """Candidates of one scan as rows of the candidates table."""
    return pd.DataFrame(
        [
            {
                "series_uid": series_uid,
                "candidate": k,
                "x_mm": c.centre_mm[0],
                "y_mm": c.centre_mm[1],
                "z_mm": c.centre_mm[2],
                "score": c.score,
                "node": c.node,
                "radius_mm": c.radius_mm,
                "source": c.source,
                "region": c.region,
                "fold": fold,
            }
            for k, c in enumerate(found)
        ]
    )
