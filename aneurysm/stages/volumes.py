"""From a prepared case to what the networks see, and from their windows back to a whole volume."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid
from aneurysm.stages.sliding import slide
from aneurysm.stages.windows import Region, View, place

__all__ = [
    "Region",
    "View",
    "aneurysm_target",
    "ball",
    "ball_voxels",
    "mean_volume",
    "network_image",
    "probability_volume",
    "vessel_target",
]

POINT_LESION_RADIUS_MM = 2.5  # sphere drawn where only a localizer point is known


def network_image(case: PreparedCase) -> np.ndarray:
    """The image as the networks see it, (d, h, w) float32: vessels bright in every modality.

    On T2 flowing blood is a dark void, so T2 is negated; the networks then share one meaning of bright.
    """
    return -case.image if case.modality == "T2" else case.image


def vessel_target(case: PreparedCase) -> np.ndarray | None:
    """Lumen including sacs, (d, h, w) bool, or None where vessels are not annotated."""
    if case.vessel is None:
        return None
    return (case.vessel > 0) | (case.aneurysm > 0) if case.aneurysm is not None else case.vessel > 0


def aneurysm_target(case: PreparedCase) -> np.ndarray | None:
    """Sac mask, (d, h, w) bool, or None where it is unknown.

    A positive scan with points only gets small spheres; one without any position is unknown.
    """
    if case.aneurysm is not None:
        return case.aneurysm > 0
    if case.lesions:
        mask = np.zeros(case.grid.shape, bool)
        for lesion in case.lesions:
            radius = lesion.radius_mm or POINT_LESION_RADIUS_MM
            mask |= ball(case.grid, lesion.centre_mm, radius)
        return mask
    return np.zeros(case.grid.shape, bool) if case.present is False else None


def ball(grid: Grid, centre_mm: np.ndarray, radius_mm: float) -> np.ndarray:
    """Voxels within `radius_mm` of a world position, (d, h, w) bool."""
    mask = np.zeros(grid.shape, bool)
    mask[tuple(ball_voxels(grid, centre_mm, radius_mm).T)] = True
    return mask


def ball_voxels(grid: Grid, centre_mm: np.ndarray, radius_mm: float) -> np.ndarray:
    """Indices (n, 3) of the voxels within `radius_mm` of a world position."""
    centre = grid.to_index(centre_mm)
    reach = np.ceil(radius_mm / grid.spacing).astype(int) + 1
    low = np.maximum(np.floor(centre).astype(int) - reach, 0)
    high = np.minimum(np.floor(centre).astype(int) + reach + 1, grid.shape)
    if (high <= low).any():
        return np.zeros((0, 3), int)
    index = np.stack(
        np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), -1
    ).reshape(-1, 3)
    return index[np.linalg.norm(grid.to_mm(index) - centre_mm, axis=-1) <= radius_mm]


def probability_volume(
    net: nn.Module,
    inputs: np.ndarray | Sequence[np.ndarray],
    view: View,
    region: Region | None = None,
) -> np.ndarray:
    """Slide `net` over (c, d, h, w) float32 and return sigmoid probabilities (k, d, h, w) float16.

    A whole head has 80 million voxels: in float16 a channel is 160 MB, and no rule asks for more than the
    three digits that it holds.

    Args:
        inputs: the channels, together or one by one.
        region: what is wanted; None: all. Beyond the reach of its windows the probability is 0.
    """
    if region is None:
        return slide(net, inputs, view, dtype=np.float16)
    placement = place(region.box, inputs[0].shape, view, region.exact)
    return slide(net, inputs, view, placement.box, placement.starts, dtype=np.float16)


def mean_volume(volumes: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of the probability volumes of several nets, added as float32, in the type of the first."""
    if len(volumes) == 1:
        return volumes[0]
    return np.mean(volumes, axis=0, dtype=np.float32).astype(volumes[0].dtype)
