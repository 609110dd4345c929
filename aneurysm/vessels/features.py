"""What sets an aneurysm apart from a healthy vessel, measured at every node of the graph.

An aneurysm shows in one of three ways on a centreline: a bifurcation sac and a fusiform widening raise the
radius; a sidewall sac becomes a short fat terminal spur; a small sidewall sac has no line of its own but
leaves vessel voxels outside the tube that the neighbouring calibre explains ("bulge").
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid
from aneurysm.vessels.centreline import Centreline
from aneurysm.vessels.local_shape import (
    BALL_MM,
    SMALL_BALL_MM,
    around,
    ball_steps,
    ball_sums,
    outside_tubes,
    within,
)
from aneurysm.vessels.voxels import check_on_grid

if TYPE_CHECKING:
    from aneurysm.vessels.graph import VesselGraph

NODE_FEATURES: Final = (
    "log_radius",  # ln(r / 1.5 mm)
    "radius_ratio",  # ln(r / usual radius); usual = median over 4-14 mm along the graph
    "inscribed_ratio",  # ln(largest inscribed sphere within 1.5 r / usual radius)
    "tree_ratio",  # ln(r / 90th percentile of the tree)
    "widening",  # steepest dr/ds towards this node
    "tapering",  # steepest dr/ds away from this node
    "tip_fatness",  # ln(1 + max radius / length) of the terminal branch here, 0 elsewhere
    "is_end",
    "is_junction",
    "is_dome",  # the middle of a sac that the centreline does not reach
    "crowding",  # degree / 3
    "curvature",  # mean over the stretch of this node, times 3 mm
    "curvature_max",
    "murray",  # (sum of thinner r^3 - thickest r^3) / thickest r^3 at a junction, 0 elsewhere
    "angle_min",  # smallest angle between two branches at a junction, in pi; 0 elsewhere
    "angle_max",
    "junction_distance",  # along the graph, in 10 mm, at most 2
    "end_distance",
    "volume_ratio_4mm",  # ln(vessel volume in the ball / volume of tubes of usual radius in it)
    "volume_ratio_6mm",
    "bulge_volume",  # ln(1 + bulge within 6 mm / 5 mm^3)
    "bulge_share_4mm",  # bulge / vessel volume within 4 mm
    "bulge_depth",  # largest sphere centred in the bulge within 6 mm, in 1.5 mm
    "linearity",  # of the vessel voxels within 4 mm: (l1 - l2) / l1 of their covariance
    "planarity",  # (l2 - l3) / l1
    "offset",  # of their centroid from the node, across the vessel, in radii
    "roundness",  # ln(tube of the inscribed radius / volume nearest to this stretch); 0 for a round vessel
    "reach",  # ln(farthest voxel nearest to this stretch / usual radius)
    "pruned_reach",  # how far a pruned thin spur stuck out here, in radii
)
EDGE_FEATURES: Final = (
    "log_length",  # ln(length / 2 mm)
    "log_radius",  # ln(mean radius / 1.5 mm)
    "log_radius_min",
    "log_radius_max",
    "radius_step",  # |ln(r_i / r_j)|
    "curvature",  # mean, times 3 mm
    "curvature_max",
    "straightness",  # chord / length
    "alignment",  # |cosine| between the tangents at both ends
    "log_segment_length",  # ln(length of the whole segment / 10 mm)
    "terminal",  # 1 when the segment has a free end
)
_NEAR_MM, _FAR_MM = 4.0, 14.0  # the neighbourhood that tells the usual calibre
_AT_ONCE = 512  # nodes; bounds the memory on whole heads
_FAT_SPUR = float(np.log1p(0.35))  # healthy terminal branches have max radius / length up to about 0.2


@dataclass(frozen=True, eq=False)
class PathPoints:
    """All M smoothed centreline points, about one per voxel, and the middles of domes."""

    position: np.ndarray  # (M, 3) RAS mm
    radius: np.ndarray  # (M,) mm
    curvature: np.ndarray  # (M,) 1/mm
    share: np.ndarray  # (M,) mm of centreline that the point stands for
    node: np.ndarray  # (M,) int, nearest node on the same branch
    segment: np.ndarray  # (M,) int
    edge: np.ndarray  # (M,) int, -1 on a piece without length


@dataclass(frozen=True, eq=False)
class Body:
    """The vessel around the centreline."""

    mm: np.ndarray  # (n, 3) RAS mm, its voxels
    depth: np.ndarray  # (n,) mm
    gap: np.ndarray  # (n,) mm to the nearest path point
    nearest: np.ndarray  # (n,) that point
    grid: Grid


@dataclass(frozen=True, eq=False)
class Description:
    """Features of all nodes, and the bulge near each."""

    features: np.ndarray  # (N, len(NODE_FEATURES)) float32
    bulge_mm3: np.ndarray  # (N,)
    bulge_centre: np.ndarray  # (N, 3) RAS mm


def describe_nodes(
    path: PathPoints, topology: Mapping[str, np.ndarray], line: Centreline, body: Body
) -> Description:
    """Measure NODE_FEATURES at every node.

    Args:
        path: the dense centreline.
        topology: position, radius, kind, degree, tangent, segment, edges, edge_length, edge_segment of the
            graph, shaped as in `VesselGraph`.
        line: the branches that the nodes lie on.
        body: the vessel's voxels.
    """
    radius, kind, edges = topology["radius"], topology["kind"], topology["edges"]
    count, junctions = len(radius), len(line.junction)
    fatness = _tip_fatness(topology)
    spur = (fatness > _FAT_SPUR) & (topology["segment"] >= 0)
    usual, to_junction, to_end = _along_graph(topology, spur)
    at_junctions = np.zeros((3, count))
    at_junctions[:, :junctions] = _murray(line), *_angles(line)
    curvature_max = np.zeros(count)
    np.maximum.at(curvature_max, path.node, path.curvature)
    column: dict[str, np.ndarray] = {
        "log_radius": np.log(radius / 1.5),
        "radius_ratio": np.log(radius / usual),
        "tree_ratio": np.log(radius / np.percentile(radius, 90)),
        "is_end": kind == 1,
        "is_junction": kind == 2,
        "is_dome": kind == 3,
        "crowding": topology["degree"] / 3,
        "junction_distance": np.minimum(to_junction / 10, 2),
        "end_distance": np.minimum(to_end / 10, 2),
        "tip_fatness": fatness,
        "murray": at_junctions[0],
        "angle_min": at_junctions[1],
        "angle_max": at_junctions[2],
        "curvature": 3 * _mean_by(path.node, path.curvature, count),
        "curvature_max": 3 * curvature_max,
    }
    slope = np.zeros((2, count))
    rate = (radius[edges[:, 0]] - radius[edges[:, 1]]) / np.maximum(topology["edge_length"], 0.3)
    for mine, sign in ((edges[:, 0], 1), (edges[:, 1], -1)):
        np.maximum.at(slope[0], mine, sign * rate)
        np.maximum.at(slope[1], mine, -sign * rate)
    column["widening"], column["tapering"] = slope
    column["pruned_reach"] = np.zeros(count)
    if len(line.pruned):
        _, nearest = KDTree(topology["position"]).query(line.pruned)
        np.maximum.at(column["pruned_reach"], nearest, line.pruned_reach)

    fat = np.zeros(int(path.segment.max(initial=0)) + 1, bool)
    fat[topology["segment"][spur]] = True
    # The tube that the neighbourhood lets us expect; none in a fat spur, which may well be a sac.
    tube = np.minimum(path.radius, usual[path.node]) * ~fat[path.segment]
    owner = path.node[body.nearest]
    reach = np.zeros(count)
    np.maximum.at(reach, owner, body.gap)
    voxel_mm3 = body.grid.voxel_mm3
    stretch = np.bincount(path.node, np.pi * path.radius**2 * path.share, count)
    section = np.bincount(owner, minlength=count) * voxel_mm3
    column["roundness"] = np.log(np.maximum(stretch, 1e-2) / np.maximum(section, 1e-2))
    column["reach"] = np.log(np.maximum(reach, 0.3) / usual)

    slack = 1.2 * tube + 0.5 * float(body.grid.spacing.mean())  # rough walls are no bulge
    bulge = body.gap > slack[body.nearest]  # most voxels lie in the tube of the point nearest to them
    bulge[bulge] = outside_tubes(body.mm[bulge], path.position, slack)
    ball = ball_sums(topology, body.mm, body.depth, bulge, voxel_mm3)
    tree = KDTree(path.position)
    volume = np.pi * tube**2 * path.share
    for radius_mm, filled in ((SMALL_BALL_MM, ball.small_mm3), (BALL_MM, ball.large_mm3)):
        expected = within(topology["position"], tree, radius_mm) @ volume
        ratio = np.log(np.maximum(filled, 0.1) / np.maximum(expected, 0.1))
        column[f"volume_ratio_{radius_mm:.0f}mm"] = ratio
    column["inscribed_ratio"] = np.log(_inscribed(path, topology, body) / usual)
    column["bulge_volume"] = np.log1p(ball.bulge_mm3 / 5)
    column["bulge_share_4mm"] = ball.small_bulge_mm3 / np.maximum(ball.small_mm3, 1e-3)
    column["bulge_depth"] = ball.bulge_depth / 1.5
    column["linearity"], column["planarity"] = ball.linearity, ball.planarity
    column["offset"] = ball.offset / radius
    features = np.stack([column[name] for name in NODE_FEATURES], axis=-1)
    return Description(
        np.clip(np.nan_to_num(features), -4, 4).astype(np.float32), ball.bulge_mm3, ball.bulge_centre
    )


def _inscribed(path: PathPoints, topology: Mapping[str, np.ndarray], body: Body) -> np.ndarray:
    """Radius of the largest sphere in the vessel centred within 1.5 radii of each node, (N,) mm."""
    position, radius = topology["position"], topology["radius"]
    deeper = np.flatnonzero(body.depth > path.radius[body.nearest])  # than the centreline beside it
    centre = np.concatenate([path.position, body.mm[deeper]])
    size = np.concatenate([path.radius, body.depth[deeper]])
    reach = np.maximum(1.5 * radius, 1.0)
    found = KDTree(position).sparse_distance_matrix(KDTree(centre), float(reach.max()), output_type="ndarray")
    found = found[found["v"] <= reach[found["i"]]]
    result = radius.copy()
    np.maximum.at(result, found["i"], size[found["j"]])
    return result


def _mean_by(group: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(group, values, count) / np.maximum(np.bincount(group, minlength=count), 1)


def _along_graph(
    topology: Mapping[str, np.ndarray], spur: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Usual radius around each node, and graph distance to the nearest junction and end: each (N,), mm.

    Nodes on fat spurs say nothing about the usual radius where there are others.
    """
    radius, kind = topology["radius"], topology["kind"]
    count = len(radius)
    ends = topology["edges"].T
    # Zero would mean "no edge" in a sparse graph.
    lengths = np.maximum(topology["edge_length"], 1e-3)
    links = sparse.coo_matrix((lengths, (ends[0], ends[1])), shape=(count, count)).tocsr()
    usual = radius.copy()
    for start in range(0, count, _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, count))
        apart = dijkstra(links, directed=False, indices=rows, limit=20.0)
        mine, other = np.nonzero(apart <= _FAR_MM)
        around = (apart[mine, other] >= _NEAR_MM) & ~spur[other]
        some = np.zeros(len(rows), bool)
        some[mine[around]] = True
        around |= ~some[mine]
        usual[rows] = _medians(mine[around], radius[other[around]], len(rows))
    away = []
    for wanted in (2, 1):
        places = np.flatnonzero(kind == wanted)
        found = np.full(count, np.inf)
        if len(places):
            found = dijkstra(links, directed=False, indices=places, min_only=True, limit=20.0)
        away.append(found)
    return usual, away[0], away[1]


def _medians(group: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Median of the values of each group (count,); every group has some, and they come in order."""
    order = np.lexsort((values, group))
    many = np.bincount(group, minlength=count)
    first = np.cumsum(many) - many
    ranked = values[order]
    return (ranked[first + (many - 1) // 2] + ranked[first + many // 2]) / 2


def _tip_fatness(topology: Mapping[str, np.ndarray]) -> np.ndarray:
    """ln(1 + max radius / length) of the terminal branch of a node; a junction takes its fattest."""
    segment, kind, radius = topology["segment"], topology["kind"], topology["radius"]
    count = int(max(topology["edge_segment"].max(initial=-1), segment.max(initial=-1))) + 1
    length = np.bincount(topology["edge_segment"], topology["edge_length"], count)
    widest = np.zeros(count)
    own = segment >= 0
    np.maximum.at(widest, segment[own], radius[own])
    rooted = np.zeros(count, bool)  # a terminal branch hangs on a junction; a lone piece does not
    junction = kind[topology["edges"]] == 2
    rooted[topology["edge_segment"][junction.any(1)]] = True
    rooted[segment[kind == 3]] = True
    terminal = np.zeros(count, bool)
    terminal[segment[(kind == 1) | (kind == 3)]] = True
    fatness = np.where(rooted & terminal, np.log1p(widest / np.maximum(length, 0.5)), 0.0)
    result = np.where(own, fatness[segment], 0.0)
    for side in (0, 1):
        at = junction[:, side]
        np.maximum.at(result, topology["edges"][at, side], fatness[topology["edge_segment"][at]])
    return result


def _murray(line: Centreline) -> np.ndarray:
    """Departure from Murray's law r0^3 = sum of r_k^3 at every junction, (J,)."""
    widths: list[list[float]] = [[] for _ in line.junction]
    for branch in line.branches:
        arc, length = branch.arc, branch.length
        for junction, away in ((branch.start, arc), (branch.end, length - arc)):
            if junction >= 0:  # measured just outside the junction's own sphere
                inner = line.junction_radius[junction]
                beyond = (away >= inner) & (away <= inner + 4)
                widths[junction].append(
                    float(np.median(branch.radius[beyond])) if beyond.any() else float(branch.radius[-1])
                )
    result = np.zeros(len(widths))
    for i, found in enumerate(widths):
        cubes = np.sort(np.array(found)) ** 3
        if len(cubes) > 1:
            result[i] = (cubes[:-1].sum() - cubes[-1]) / max(cubes[-1], 1e-6)
    return result


def _angles(line: Centreline) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest angle between two branches at every junction, (J,) each, in pi."""
    heading: list[list[np.ndarray]] = [[] for _ in line.junction]
    for branch in line.branches:
        for junction, points in ((branch.start, branch.points), (branch.end, branch.points[::-1])):
            if junction >= 0:  # from the junction to where the branch has left its sphere
                gap = np.linalg.norm(points - points[0], axis=1)
                beyond = np.flatnonzero(gap >= line.junction_radius[junction] + 1.0)
                away = points[beyond[0] if len(beyond) else -1] - points[0]
                heading[junction].append(away / max(float(np.linalg.norm(away)), 1e-9))
    least, most = np.zeros(len(heading)), np.zeros(len(heading))
    for i, found in enumerate(heading):
        if len(found) > 1:
            cosine = (np.array(found) @ np.array(found).T)[np.triu_indices(len(found), 1)]
            angle = np.arccos(np.clip(cosine, -1, 1)) / np.pi
            least[i], most[i] = angle.min(), angle.max()
    return least, most


def sample_at_nodes(
    graph: "VesselGraph", volume: np.ndarray, grid: Grid, radius_mm: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and maximum of a volume (d, h, w) within a ball around every node: two (N,) float32.

    Nodes whose ball misses the volume read 0.

    Raises:
        ValueError: the volume does not lie on the grid.
    """
    check_on_grid(volume, grid)
    steps, _ = ball_steps(grid, max(radius_mm, float(grid.spacing.max()) / 2))
    values = np.ascontiguousarray(volume, np.float32).ravel()
    mean, top = np.zeros(len(graph), np.float32), np.zeros(len(graph), np.float32)
    for start in range(0, len(graph), 128):
        rows = slice(start, start + 128)
        at, flat = around(graph.position[rows], steps, grid)
        found = values[flat]
        mean[rows] = (found * at).sum(1) / np.maximum(at.sum(1), 1)
        top[rows] = np.where(at.any(1), np.where(at, found, -np.inf).max(1), 0)
    return mean, top


def with_features(
    graph: "VesselGraph", volumes: Mapping[str, np.ndarray], grid: Grid, radius_mm: float = 3.0
) -> "VesselGraph":
    """Append `<name>_mean` and `<name>_max` of each volume (d, h, w) around the nodes as node features.

    Raises:
        ValueError: a volume does not lie on the grid, holds NaN, or its columns exist already.
    """
    columns, names = [graph.node_features], list(graph.node_names)
    for name, volume in volumes.items():
        if f"{name}_mean" in names:
            raise ValueError(f"The graph already has features of {name!r}. Give the volume another name.")
        if not np.isfinite(volume).all():
            raise ValueError(f"The volume {name!r} holds NaN or infinite values; replace them first.")
        mean, top = sample_at_nodes(graph, volume, grid, radius_mm)
        columns.append(np.stack([mean, top], axis=-1))
        names += [f"{name}_mean", f"{name}_max"]
    features = np.concatenate(columns, axis=1).astype(np.float32)
    return dataclasses.replace(graph, node_features=features, node_names=tuple(names))
