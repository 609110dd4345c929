"""Domes of sacs that the centreline does not reach.

Thinning keeps a sac as a spur only where it has a neck. The centre of any other dome is still the deepest
place around: a local maximum of depth beside the centreline, whose sphere sticks out of the vessel.
"""

import numpy as np
from scipy.spatial import KDTree

from aneurysm.vessels.voxels import Voxels

_ASIDE = 0.5  # radii of its own sphere that a dome's centre lies off the centreline at least
_BESIDE = 0.8  # vessel radii that it lies off it at least: what is nearer is the inner side of a bend
_OUT = 0.3  # radii of its own sphere that it sticks out of the vessel at least
_SMALLEST = 1.9  # voxels; a smaller sphere is roughness


def domes(
    voxels: Voxels,
    mm: np.ndarray,
    depth: np.ndarray,
    gap: np.ndarray,
    vessel_radius: np.ndarray,
    voxel_mm: float,
) -> np.ndarray:
    """Places in the list (k,) of the voxels at the middle of each such dome, the largest dome first.

    Args:
        voxels: of the mask.
        mm: (n, 3) RAS mm.
        depth: (n,) mm.
        gap: (n,) mm from each voxel to the nearest point of the centreline.
        vessel_radius: (n,) mm, of the vessel at that point.
        voxel_mm: largest voxel edge.
    """
    chosen = np.flatnonzero(
        (depth >= _SMALLEST * voxel_mm)
        & (gap >= np.maximum(np.maximum(_ASIDE * depth, _BESIDE * vessel_radius), voxel_mm))
        & (gap + depth >= vessel_radius + np.maximum(_OUT * depth, voxel_mm))
    )
    around = np.append(depth, 0.0)[voxels.neighbours[chosen]]
    chosen = chosen[depth[chosen] >= around.max(1, initial=0) - 1e-9]
    chosen = chosen[np.argsort(-depth[chosen], kind="stable")]
    taken = np.zeros(len(chosen), bool)
    tops = []
    for i, place in enumerate(chosen):
        if not taken[i]:
            tops.append(place)
            taken |= np.linalg.norm(mm[chosen] - mm[place], axis=1) < depth[place]
    return np.array(tops, int)


def anchors(
    centre: np.ndarray,
    piece: np.ndarray,
    position: np.ndarray,
    radius: np.ndarray,
    node_piece: np.ndarray,
    nearest: np.ndarray,
) -> np.ndarray:
    """The node (k,) from whose vessel each dome sticks out: of its own piece, that with the nearest surface.

    `nearest` (k,) is taken where no node nearby is known to be of the same piece.
    """
    _, near = KDTree(position).query(centre, k=min(16, len(position)))
    near = np.reshape(near, (len(centre), -1))
    gap = np.linalg.norm(position[near] - centre[:, None], axis=-1) - radius[near]
    same = node_piece[near] == piece[:, None]
    chosen = near[np.arange(len(centre)), np.argmin(np.where(same, gap, np.inf), axis=1)]
    return np.where(same.any(1), chosen, nearest)
