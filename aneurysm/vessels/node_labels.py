"""Which nodes of a vessel graph lie on an aneurysm."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid, Lesion
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.voxels import check_on_grid

_UNKNOWN_RADIUS_MM = 2.0  # of a lesion annotated by a point: a sac of 4 mm, the median of the literature


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
