"""Stage 2, vessel: a recall-first U-Net marks every voxel that may be lumen.

A missed vessel is lost to all later stages, a voxel too many costs little, so the loss weighs false
negatives and the rule that makes the mask is chosen for recall.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from aneurysm.data.prepared import PreparedCase, prepared_header
from aneurysm.stages.segmentation import SegmentationData, SegmentationModule
from aneurysm.stages.volumes import View, network_image, probability_volume, vessel_target
from aneurysm.vessels.lumen_rule import LumenRule

INPUTS, CHANNELS = 1, ("vessel",)


class VesselModule(SegmentationModule):
    """One channel: vessel lumen including sacs."""


class VesselData(SegmentationData):
    """Patches of scans whose vessels are annotated; others teach this stage nothing."""

    def __init__(self, train: Sequence[Path], held_out: Sequence[Path], **settings) -> None:
        annotated = [p for p in train if "vessel" in prepared_header(p).masks]
        shown = [p for p in held_out if "vessel" in prepared_header(p).masks]
        super().__init__(annotated, shown, CHANNELS, **settings)


def vessel_probability(net: nn.Module, case: PreparedCase, view: View) -> np.ndarray:
    """Probability of lumen per voxel, (d, h, w) float32."""
    return probability_volume(net, network_image(case)[None], view)[0]


def lumen_rule(
    net: nn.Module, cases: list[PreparedCase], recall: float, precision: float, view: View
) -> LumenRule:
    """The rule that reaches `recall`, but at least `precision`, on these scans: use training scans only."""
    annotated = [(c, target) for c in cases if (target := vessel_target(c)) is not None]
    return LumenRule.for_recall(
        [vessel_probability(net, c, view) for c, _ in annotated],
        [target for _, target in annotated],
        [c.grid for c, _ in annotated],
        recall,
        precision,
    )
