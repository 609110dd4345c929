"""Stage 2, vessel: a recall-first U-Net marks every voxel that may be lumen.

A missed vessel is lost to all later stages, a voxel too many costs little, so the loss weighs false
negatives and the threshold is chosen for recall.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from aneurysm.data.prepared import PreparedCase
from aneurysm.stages.segmentation import SegmentationData, SegmentationModule
from aneurysm.stages.volumes import (
    network_image,
    probability_volume,
    remembered,
    threshold_for_recall,
    vessel_target,
)

INPUTS, CHANNELS = 1, ("vessel",)


class VesselModule(SegmentationModule):
    """One channel: vessel lumen including sacs."""


class VesselData(SegmentationData):
    """Patches of scans whose vessels are annotated; others teach this stage nothing."""

    def __init__(self, train: Sequence[Path], held_out: Sequence[Path], **settings) -> None:
        annotated = [p for p in train if remembered(p).vessel is not None]
        shown = [p for p in held_out if remembered(p).vessel is not None]
        super().__init__(annotated, shown, CHANNELS, **settings)


def vessel_probability(net: nn.Module, case: PreparedCase, patch: int, overlap: float) -> np.ndarray:
    """Probability of lumen per voxel, (d, h, w) float32."""
    return probability_volume(net, network_image(case)[None], patch, overlap)[0]


def recall_threshold(
    net: nn.Module, cases: list[PreparedCase], recall: float, patch: int, overlap: float
) -> float:
    """Threshold that reaches `recall` on these scans; use training scans only."""
    annotated = [
        (vessel_probability(net, c, patch, overlap), vessel_target(c)) for c in cases if c.vessel is not None
    ]
    return threshold_for_recall([p for p, _ in annotated], [t for _, t in annotated if t is not None], recall)
