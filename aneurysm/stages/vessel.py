"""Stage 2, vessel: a recall-first U-Net marks every voxel that may be lumen.

A missed vessel is lost to all later stages, a voxel too many costs little, so the loss weighs false
negatives and the rule that makes the mask is chosen for recall.

With `classes` "arteries" the net also says which of the 13 arteries a voxel belongs to, one sigmoid channel
each beside the channel of the lumen: so every segmentation loss applies as it is, unknown channels are left
out as everywhere, and whether a voxel is lumen does not have to be shared out among names.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from aneurysm.data.errors import UserError
from aneurysm.data.labels import LOCATIONS, MIRRORED_LOCATION
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.stages.segmentation import SegmentationData, SegmentationModule
from aneurysm.stages.step import StepOutput
from aneurysm.stages.stored import opened
from aneurysm.stages.volumes import mean_volume, network_image, probability_volume
from aneurysm.stages.windows import AXES, Region, View
from aneurysm.vessels.arteries import NO_ARTERY, location_of_label, named_arteries

INPUTS, CHANNELS = 1, ("vessel",)
CLASSES = {"binary": len(CHANNELS), "arteries": len(CHANNELS) + len(LOCATIONS)}  # channels of the net


def names_arteries(classes: str) -> bool:
    """Whether the net has a channel for each artery.

    Raises:
        UserError: `vessel.classes` is neither of CLASSES.
    """
    if classes not in CLASSES:
        raise UserError(f"vessel.classes={classes}: it is one of {', '.join(CLASSES)}.")
    return classes == "arteries"


class VesselModule(SegmentationModule):
    """First channel: vessel lumen including sacs. The others, if any: one artery each, in LOCATIONS order.

    Args:
        artery_weight: factor on the loss of the arteries, which is added to that of the lumen.
        settings: see SegmentationModule.
    """

    def __init__(self, *settings, artery_weight: float = 1.0) -> None:
        super().__init__(*settings)
        self.artery_weight = artery_weight

    def compare(self, levels: list[Tensor], target: Tensor, known: Tensor, *beside: Tensor) -> StepOutput:
        """The loss of the lumen, which all arteries together must not outweigh, plus that of the arteries."""
        channels = target.shape[1]
        if channels == len(CHANNELS):
            return super().compare(levels, target, known, *beside)

        def part(which: slice) -> StepOutput:
            # What is drawn beside has the channels of the target once for every part of the loss.
            drawn = [b.unflatten(1, (-1, channels))[:, :, which].flatten(1, 2) for b in beside]
            answers = [level[:, which] for level in levels]
            return super(VesselModule, self).compare(answers, target[:, which], known[:, which], *drawn)

        lumen, names = part(slice(0, len(CHANNELS))), part(slice(len(CHANNELS), None))
        terms = {f"artery_{name}": term for name, term in names.terms.items()}
        return StepOutput(lumen.loss + self.artery_weight * names.loss, {**lumen.terms, **terms})


class VesselData(SegmentationData):
    """Patches of scans whose vessels are annotated; others teach this stage nothing."""

    def __init__(self, train: Sequence[Path], held_out: Sequence[Path], **settings) -> None:
        annotated = [p for p in train if "vessel" in opened(p).masks]
        shown = [p for p in held_out if "vessel" in opened(p).masks]
        super().__init__(annotated, shown, CHANNELS, **settings)
        if self.arteries and annotated and not any(map(_has_names, annotated)):
            raise UserError(
                "vessel.classes=arteries: the vessel masks of the training scans give no artery a name "
                "(labels 1 to 13, as in RSNA's _cowseg.nii). Train with vessel.classes=binary."
            )


def _has_names(path: Path) -> bool:
    case = opened(path)
    return bool((location_of_label(case.box("vessel", (0, 0, 0), case.grid.shape)) != NO_ARTERY).any())


def vessel_probability(
    net: nn.Module, case: PreparedCase, view: View, region: Region | None = None
) -> np.ndarray:
    """Probability of lumen per voxel, (d, h, w) float16; 0 far from the region where one is given."""
    return probability_volume(net, network_image(case)[None], view, region)[0]


def vessels_and_names(
    nets: Sequence[nn.Module],
    case: PreparedCase,
    view: View,
    arteries: bool,
    region: Region | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What several nets together see: the mean probability of lumen, and which artery each voxel belongs to.

    Args:
        arteries: whether the nets name arteries.
        region: where to look; the whole scan without one.

    Returns:
        (d, h, w) float16, and (d, h, w) uint8 vessel labels (`vessels.arteries.named_arteries`), None without
        names.
    """
    if not arteries:
        return mean_volume([vessel_probability(net, case, view, region) for net in nets]), None
    seen = mean_volume([_with_names(net, network_image(case)[None], view, region) for net in nets])
    return seen[0], named_arteries(seen[0], seen[len(CHANNELS) :])


def _with_names(net: nn.Module, image: np.ndarray, view: View, region: Region | None) -> np.ndarray:
    """Probabilities of lumen and of every artery, (14, d, h, w), as the mean over the flips of a view.

    Left and right change places in a mirrored scan; upside down or back to front, only lumen is asked for.
    Outside a region it is 0: what lies beside it is not seen alike from both sides.
    """
    straight = View(view.window, view.overlap)
    total = probability_volume(net, image, straight, region)
    looks = np.ones(len(total), np.float32)
    swapped = [0, *(len(CHANNELS) + i for i in MIRRORED_LOCATION)]
    for axis in view.flips:
        at = 1 + AXES.index(axis)
        mirrored = None if region is None else region.flipped(at - 1, image.shape[at])
        seen = np.flip(probability_volume(net, np.flip(image, at), straight, mirrored), at)
        channels = slice(None) if axis == "w" else slice(0, len(CHANNELS))
        total[channels] += (seen[swapped] if axis == "w" else seen)[channels]
        looks[channels] += 1
    total /= looks[:, None, None, None]
    if region is None:
        return total
    kept = np.zeros_like(total)
    kept[:, *region.box.slices] = total[:, *region.box.slices]
    return kept


def artery_accuracy(labels: np.ndarray, case: PreparedCase) -> float:
    """Share of the labelled voxels of named arteries that have the right name; NaN where there is none.

    Voxels that the net did not take for a vessel do not count: what they cost is told by the recall.
    """
    if case.vessel is None:
        return float("nan")
    truth, found = location_of_label(case.vessel), location_of_label(labels)
    both = (truth != NO_ARTERY) & (found != NO_ARTERY)
    return float((truth[both] == found[both]).mean()) if both.any() else float("nan")
