"""Voxel maps of a patient's arteries and aneurysms, exact to the signed distance of the shapes."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import label

from aneurysm.data.labels import VESSEL_LABEL
from aneurysm.data.phantom.anatomy import Patient
from aneurysm.data.phantom.sacs import Sac, smooth_union
from aneurysm.data.phantom.tree import Segment
from aneurysm.data.scan import Grid, Lesion

_FAR_MM = 9.0
_MARGIN_MM = 1.5  # around a shape, where its distance is computed
_FILLET_MM = 0.5  # between a sac and the artery


@dataclass(frozen=True, eq=False)
class LumenMaps:
    """What lies in each voxel."""

    lumen: np.ndarray  # (d, h, w) float32, volume fraction of blood, sacs included
    vessel: np.ndarray  # (d, h, w) uint8, labels.VESSEL_LABEL of the nearest segment; a sac has its parent's
    aneurysm: np.ndarray  # (d, h, w) uint8, k inside sac k and outside the parent lumen
    lesions: tuple[Lesion, ...]  # of the masks: centroid, radius of the sphere of that volume, location


def voxelise(patient: Patient, grid: Grid) -> LumenMaps:
    """Draw a patient on a grid; what leaves the grid is cut off.

    The volume fraction of a voxel is 0.5 on the wall and falls linearly over one voxel width, so masks are
    the voxels with a fraction of at least 0.5.

    Raises:
        ValueError: the grid's axes are not at right angles, or a sac covers no voxel of the grid.
    """
    axes = grid.affine[:3, :3] / grid.spacing
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-6):
        raise ValueError("Distances are measured along the axes of the grid, which must be at right angles.")
    arteries = np.full(grid.shape, _FAR_MM, np.float32)  # signed distance, mm
    vessel = np.zeros(grid.shape, np.uint8)
    for segment in patient.tree.segments:
        _draw_segment(segment, grid, arteries, vessel)

    distance = arteries.copy()
    nearest = np.full(grid.shape, _FAR_MM, np.float32)
    owner = np.zeros(grid.shape, np.uint8)
    for k, sac in enumerate(patient.sacs, start=1):
        _draw_sac(k, sac, grid, distance, nearest, owner)
    width = float(grid.spacing.mean())
    lumen = np.clip(0.5 - distance / width, 0, 1)
    inside = distance <= 0
    # The fillet also fills crevices between arteries close by; those belong to no sac.
    aneurysm = np.where(inside & (arteries > 0) & (nearest < _FILLET_MM / 2), owner, 0).astype(np.uint8)
    vessel[~inside] = 0
    for k, sac in enumerate(patient.sacs, start=1):
        vessel[aneurysm == k] = VESSEL_LABEL[sac.location]
        _keep_largest_piece(aneurysm, k)
    lesions = tuple(_measure(k, sac, aneurysm, grid) for k, sac in enumerate(patient.sacs, start=1))
    return LumenMaps(lumen, vessel, aneurysm, lesions)


def _draw_segment(segment: Segment, grid: Grid, distance: np.ndarray, vessel: np.ndarray) -> None:
    """Lower the distance to that of a chain of round cones and label the voxels for which it is nearest."""
    number = VESSEL_LABEL[segment.location]
    spacing = grid.spacing
    points = grid.to_index(segment.points) * spacing  # mm along the array axes
    radii = segment.radii
    reach = np.maximum(radii[:-1], radii[1:])[:, None] + _MARGIN_MM
    lows = np.ceil((np.minimum(points[:-1], points[1:]) - reach) / spacing).astype(int)
    highs = np.floor((np.maximum(points[:-1], points[1:]) + reach) / spacing).astype(int) + 1
    lows, highs = np.maximum(lows, 0), np.minimum(highs, grid.shape)
    ticks = [np.arange(n, dtype=np.float32) * np.float32(s) for n, s in zip(grid.shape, spacing, strict=True)]
    for i in np.flatnonzero((highs > lows).all(axis=1)):
        window = tuple(slice(a, b) for a, b in zip(lows[i], highs[i], strict=True))
        start, along = points[i].astype(np.float32), (points[i + 1] - points[i]).astype(np.float32)
        z, y, x = (tick[part] - a for tick, part, a in zip(ticks, window, start, strict=True))
        z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
        length2 = float(along @ along)
        t = z * along[0] + (y * along[1] + x * along[2])
        squared = z * z + (y * y + x * x)
        share = np.clip(t / length2, 0, 1)
        squared = squared - share * (2 * t - share * length2)  # |p - a - share b|^2
        gap = np.sqrt(np.maximum(squared, 0)) - (radii[i] + share * float(radii[i + 1] - radii[i]))
        closer = gap < distance[window]
        distance[window][closer] = gap[closer]
        vessel[window][closer] = number


def _draw_sac(
    k: int, sac: Sac, grid: Grid, distance: np.ndarray, nearest: np.ndarray, owner: np.ndarray
) -> None:
    """Join a sac to the distance field and note where it is the nearest sac."""
    centre = grid.to_index(sac.centre_mm)
    reach = (sac.reach_mm + _MARGIN_MM) / grid.spacing
    low = np.maximum(np.ceil(centre - reach), 0).astype(int)
    high = np.minimum(np.floor(centre + reach).astype(int) + 1, grid.shape)
    if (high <= low).any():
        return  # the measure reports it
    window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    index = np.stack(
        np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), -1
    )
    gap = sac.distance(grid.to_mm(index)).astype(np.float32)
    distance[window] = smooth_union(distance[window], gap, _FILLET_MM)
    closer = gap < nearest[window]
    nearest[window][closer] = gap[closer]
    owner[window][closer] = k


def _keep_largest_piece(aneurysm: np.ndarray, k: int) -> None:
    """Clear the crumbs that the edge of the neck leaves around the parent artery."""
    pieces = np.zeros(aneurysm.shape, np.int32)
    label(aneurysm == k, structure=np.ones((3, 3, 3), bool), output=pieces)
    sizes = np.bincount(pieces.ravel())[1:]
    if len(sizes) > 1:
        aneurysm[(pieces > 0) & (pieces != 1 + int(np.argmax(sizes)))] = 0


def _measure(k: int, sac: Sac, aneurysm: np.ndarray, grid: Grid) -> Lesion:
    voxels = np.argwhere(aneurysm == k)
    if not len(voxels):
        raise ValueError(
            f"The sac on the {sac.artery} at {np.round(sac.centre_mm, 1).tolist()} mm covers no voxel of a "
            f"grid of {grid.shape} at {grid.spacing.round(2).tolist()} mm. Enlarge the field of view."
        )
    volume = len(voxels) * grid.voxel_mm3
    return Lesion(
        centre_mm=grid.to_mm(voxels.mean(axis=0)),
        radius_mm=float(np.cbrt(volume * 3 / (4 * np.pi))),
        location=sac.location,
    )
