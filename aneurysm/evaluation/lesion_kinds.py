"""What the true masks tell about a lesion: its voxels, and whether it sits on a side wall or a bifurcation.

No data set names the kind, so it is defined by geometry. The sac is cut off the true vessel mask and what is
left becomes a graph. The neck is where sac and parent vessel touch. The lesion is one of a bifurcation when a
junction of the graph is within JUNCTION_RADII of its own radius, and half a neck's width, of the neck's place
on the centreline, else of the side wall; unknown where there is no vessel mask or no vessel beside the sac.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid
from aneurysm.vessels.graph import JUNCTION, VesselGraph, build_graph

SIDE_WALL, BIFURCATION, UNKNOWN = "side-wall", "bifurcation", ""
JUNCTION_RADII = 1.5
_MARGIN_MM = 14.0  # of vessel around the sac that is looked at
_TOUCH = np.ones((3, 3, 3), bool)


@dataclass(frozen=True, eq=False)
class Sac:
    """Voxels of one aneurysm."""

    voxels: np.ndarray  # (n, 3) int, rising, on `grid`
    grid: Grid

    def holds(self, points_mm: np.ndarray) -> np.ndarray:
        """Which points (n, 3) in RAS mm lie in a voxel of the sac, (n,) bool."""
        index = np.rint(self.grid.to_index(np.asarray(points_mm, float).reshape(-1, 3))).astype(int)
        inside = np.all((index >= 0) & (index < self.grid.shape), axis=1)
        found = np.zeros(len(index), bool)
        flat = np.ravel_multi_index(tuple(self.voxels.T), self.grid.shape)
        found[inside] = np.isin(np.ravel_multi_index(tuple(index[inside].T), self.grid.shape), flat)
        return found


@dataclass(frozen=True, eq=False)
class LesionFacts:
    """What the masks of a scan tell about one of its lesions."""

    sac: Sac | None  # None where only a point is known
    kind: str  # SIDE_WALL, BIFURCATION or UNKNOWN


def lesion_facts(case: PreparedCase) -> tuple[LesionFacts, ...]:
    """One entry per lesion of a case, in its order."""
    return tuple(
        fact
        if fact.sac is None or case.vessel is None or case.aneurysm is None
        else replace(fact, kind=lesion_kind(case.vessel, case.aneurysm, fact.sac.voxels, case.grid))
        for fact in lesion_sacs(case)
    )


def lesion_sacs(case: PreparedCase) -> tuple[LesionFacts, ...]:
    """As `lesion_facts`, without the kinds, which take a graph each.

    A lesion's voxels are those of the sac, among the numbered ones of the mask, nearest to its centre.
    """
    if case.aneurysm is None or not case.aneurysm.any():
        return tuple(LesionFacts(None, UNKNOWN) for _ in case.lesions)
    voxels = np.argwhere(case.aneurysm)
    number = case.aneurysm[tuple(voxels.T)]
    mm = case.grid.to_mm(voxels)
    facts = []
    for lesion in case.lesions:
        nearest = number[np.argmin(np.linalg.norm(mm - np.asarray(lesion.centre_mm), axis=1))]
        own = voxels[number == nearest]
        facts.append(LesionFacts(Sac(own, case.grid), UNKNOWN))
    return tuple(facts)


def lesion_kind(vessel: np.ndarray, aneurysm: np.ndarray, sac: np.ndarray, grid: Grid) -> str:
    """SIDE_WALL, BIFURCATION, or UNKNOWN where no vessel touches the sac.

    Args:
        vessel: (d, h, w) true vessel mask, with or without sacs.
        aneurysm: (d, h, w) all sacs of the scan.
        sac: (n, 3) voxels of this one.
        grid: where the voxels lie.
    """
    margin = np.ceil(_MARGIN_MM / grid.spacing).astype(int)
    low = np.maximum(sac.min(0) - margin, 0)
    high = np.minimum(sac.max(0) + margin + 1, grid.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    own = np.zeros(tuple(high - low), bool)
    own[tuple((sac - low).T)] = True
    parent = (vessel[box] > 0) & (aneurysm[box] == 0)
    contact = parent & ndimage.binary_dilation(own, _TOUCH, iterations=2)
    if not contact.any():
        return UNKNOWN
    pieces, _ = ndimage.label(parent, _TOUCH)  # type: ignore[misc]
    beside = np.bincount(pieces[contact])
    parent = pieces == int(beside.argmax())  # the vessel that carries it, not one that passes by
    contact &= parent
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_mm(low)
    local = Grid((own.shape[0], own.shape[1], own.shape[2]), affine)
    graph = build_graph(parent, local, node_spacing_mm=1.0)
    neck = local.to_mm(np.argwhere(contact))
    place = _nearest_node(graph, neck.mean(0))
    junctions = np.flatnonzero(graph.kind == JUNCTION)
    if place < 0 or not len(junctions):
        return SIDE_WALL if place >= 0 else UNKNOWN
    half_width = float(np.median(np.linalg.norm(neck - neck.mean(0), axis=1)))
    gap = np.linalg.norm(graph.position[junctions] - graph.position[place], axis=1)
    near = gap <= JUNCTION_RADII * graph.radius[junctions] + half_width
    return BIFURCATION if bool(near.any()) else SIDE_WALL


def _nearest_node(graph: VesselGraph, point_mm: np.ndarray) -> int:
    if not len(graph):
        return -1
    return int(np.argmin(np.linalg.norm(graph.position - point_mm, axis=1) - graph.radius))
