"""Stage 2, vessel: a recall-first U-Net marks every voxel that may be lumen.

A missed vessel is lost to all later stages, a voxel too many costs little, so the loss weighs false
negatives and the rule that makes the mask is chosen for recall.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.stages.segmentation import SegmentationData, SegmentationModule
from aneurysm.stages.stored import opened
from aneurysm.stages.volumes import Region, View, network_image, probability_volume

INPUTS, CHANNELS = 1, ("vessel",)


class VesselModule(SegmentationModule):
    """One channel: vessel lumen including sacs."""


class VesselData(SegmentationData):
    """Patches of scans whose vessels are annotated; others teach this stage nothing."""

    def __init__(self, train: Sequence[Path], held_out: Sequence[Path], **settings) -> None:
        annotated = [p for p in train if "vessel" in opened(p).masks]
        shown = [p for p in held_out if "vessel" in opened(p).masks]
        super().__init__(annotated, shown, CHANNELS, **settings)


def vessel_probability(
    net: nn.Module, case: PreparedCase, view: View, region: Region | None = None
) -> np.ndarray:
    """Probability of lumen per voxel, (d, h, w) float32; 0 far from the region where one is given."""
    return probability_volume(net, network_image(case)[None], view, region)[0]
