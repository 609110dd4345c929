"""The stretch of parent vessel that passes a candidate: the flow prior needs its axis and its calibre."""

from weakref import WeakKeyDictionary

import numpy as np

from aneurysm.vessels.candidates import Candidate
from aneurysm.vessels.graph import DOME, END, JUNCTION, VesselGraph

_SPUR_FATNESS = 0.35  # max radius / length above which a terminal branch is a sac rather than a vessel
_SHARPEST_TURN = -0.2  # cosine; flow does not turn back on itself at a junction


def local_path(
    graph: VesselGraph, candidate: Candidate, extent_mm: float = 12.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow the parent vessel both ways from its point nearest to a candidate.

    At a junction the walk takes the thickest and straightest continuation; sacs (short fat terminal branches)
    are not parent vessels. The path runs from its thicker half to its thinner half, as blood mostly does.

    Args:
        graph: of the vessel mask.
        candidate: whose surroundings are wanted.
        extent_mm: length of path on each side, less where the vessel ends.

    Returns:
        Points (m, 3) relative to the candidate's centre in RAS mm, unit tangents (m, 3), radii (m,) in mm.
        m is 0 for an empty graph and 1 for a vessel without length.
    """
    if len(graph) == 0:
        return np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0)
    _, calibre = _segments(graph)
    start, links = parent_node(graph, candidate), vessel_links(graph)

    seen = {start}
    sides = []
    for sign in (1.0, -1.0):
        direction = sign * graph.tangent[start]
        at, walked, nodes = start, 0.0, [start]
        while walked < extent_mm:
            best, best_score = -1, -np.inf
            for other, segment in links.get(at, []):
                step = graph.position[_beyond(links, at, other, segment)] - graph.position[at]
                cosine = float(step @ direction / max(np.linalg.norm(step), 1e-9))
                score = cosine + 0.5 * float(np.log(calibre[segment]))
                if other not in seen and cosine > _SHARPEST_TURN and score > best_score:
                    best, best_score = other, score
            if best < 0:
                break
            walked += float(np.linalg.norm(graph.position[best] - graph.position[at]))
            # Over two steps: near a junction one step leans to whichever side the junction's centre lies.
            step = graph.position[best] - graph.position[nodes[-2] if len(nodes) > 1 else at]
            direction = step / max(np.linalg.norm(step), 1e-9)
            seen.add(best)
            nodes.append(best)
            at = best
        sides.append(_cut(graph.position[nodes], graph.radius[nodes], extent_mm))
    (ahead, ahead_width), (behind, behind_width) = sides
    points = np.concatenate([behind[:0:-1], ahead]) - candidate.centre_mm
    radius = np.concatenate([behind_width[:0:-1], ahead_width])
    if len(points) < 2:
        return points, graph.tangent[[start]].copy(), radius
    if np.mean(ahead_width) > np.mean(behind_width):
        points, radius = points[::-1], radius[::-1]
    slope = np.gradient(points, axis=0)
    tangent = slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-9)
    return points.copy(), tangent, radius.copy()


def parent_node(graph: VesselGraph, candidate: Candidate) -> int:
    """The node of a vessel, not of a sac, nearest to a candidate; -1 in an empty graph."""
    if len(graph) == 0:
        return -1
    in_sac = _in_sac(graph)
    gap = np.linalg.norm(graph.position - candidate.centre_mm, axis=1)
    return int(np.argmin(gap if in_sac.all() else np.where(in_sac, np.inf, gap)))


def vessel_links(graph: VesselGraph) -> dict[int, list[tuple[int, int]]]:
    """Of every node its neighbours along vessels, with the segment that leads there; sacs are left out."""
    spur, _ = _segments(graph)
    keep_all = _in_sac(graph).all()
    links: dict[int, list[tuple[int, int]]] = {}
    for (a, b), segment in zip(graph.edges.tolist(), graph.edge_segment.tolist(), strict=True):
        if not spur[segment] or keep_all:
            links.setdefault(a, []).append((b, segment))
            links.setdefault(b, []).append((a, segment))
    return links


def _in_sac(graph: VesselGraph) -> np.ndarray:
    spur, _ = _segments(graph)
    return (graph.segment >= 0) & spur[graph.segment] if len(spur) else np.zeros(len(graph), bool)


def _beyond(links: dict[int, list[tuple[int, int]]], at: int, other: int, segment: int) -> int:
    """The node after `other` on the way from `at` along a segment, or `other` where the segment ends."""
    following = [node for node, own in links[other] if own == segment and node != at]
    return following[0] if len(following) == 1 else other


def _segments(graph: VesselGraph) -> tuple[np.ndarray, np.ndarray]:
    """Whether each segment is a short fat terminal branch (S,), and its median radius in mm (S,).

    Kept with the graph: every candidate of a scan asks for it.
    """
    if graph not in _of_graph:
        _of_graph[graph] = _measure_segments(graph)
    return _of_graph[graph]


_of_graph: WeakKeyDictionary[VesselGraph, tuple[np.ndarray, np.ndarray]] = WeakKeyDictionary()


def _measure_segments(graph: VesselGraph) -> tuple[np.ndarray, np.ndarray]:
    count = graph.segments
    length = np.bincount(graph.edge_segment, graph.edge_length, count)
    widest, calibre = np.zeros(count), np.ones(count)
    ends, rooted = np.zeros(count, bool), np.zeros(count, bool)
    dome = graph.segment[graph.kind == DOME]
    ends[graph.segment[graph.kind == END]] = True
    rooted[graph.edge_segment[(graph.kind[graph.edges] == JUNCTION).any(1)]] = True
    edge_radius = graph.radius[graph.edges].mean(1)
    for segment in range(count):
        own = graph.radius[graph.segment == segment]
        along = edge_radius[graph.edge_segment == segment]
        widest[segment] = own.max(initial=0.0)
        if len(own) + len(along):
            calibre[segment] = max(float(np.median(np.concatenate([own, along]))), 0.1)
    spur = ends & rooted & (widest > _SPUR_FATNESS * np.maximum(length, 0.5))
    spur[dome] = True
    return spur, calibre


def _cut(points: np.ndarray, radius: np.ndarray, extent_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Shorten a walk (m, 3) to exactly the wanted length where it is longer."""
    arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    if arc[-1] <= extent_mm:
        return points, radius
    at = np.append(arc[arc < extent_mm], extent_mm)
    cut = np.stack([np.interp(at, arc, points[:, k]) for k in range(3)], axis=-1)
    return cut, np.interp(at, arc, radius)
