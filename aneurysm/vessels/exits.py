"""The piece of a vessel tree inside a crop, and where its vessels leave it: there blood comes and goes."""

from dataclasses import dataclass

import numpy as np

from aneurysm.vessels.candidates import Candidate
from aneurysm.vessels.graph import END, VesselGraph
from aneurysm.vessels.parent import parent_node, vessel_links

STUMP = 2.0  # radii: a vessel that ends sooner after its fork is a bump of the mask, not a way out
CLEAR = 4.0  # radii around the candidate within which a dead end is its own, a dome or a bleb, and no way out
BEFORE_END = 0.5  # radii before the end of a centreline: the last stretch of a mask is rounded


@dataclass(frozen=True, eq=False)
class LocalTree:
    """Vessels inside a crop, sacs left out; positions and directions in the axes of the crop, in mm.

    n nodes, e edges between them, k exits.
    """

    position: np.ndarray  # (n, 3)
    edges: np.ndarray  # (e, 2) int64
    edge_length: np.ndarray  # (e,)
    edge_radius: np.ndarray  # (e,)
    exit_node: np.ndarray  # (k,) int64, the last node before the exit
    exit_position: np.ndarray  # (k, 3)
    exit_outward: np.ndarray  # (k, 3) unit
    exit_radius: np.ndarray  # (k,) median over the stretch that leads there


def local_tree(
    graph: VesselGraph, candidate: Candidate, position: np.ndarray, half_mm: np.ndarray
) -> LocalTree:
    """The vessels that hang together with a candidate's parent vessel inside a box.

    Exits are where a vessel crosses the faces of the box, and where a vessel ends inside it: a segmentation
    loses thin vessels, blood does not stop there. Only beside the candidate a dead end is taken for what it
    looks like.

    Args:
        graph: of the whole scan.
        candidate: in the middle of the box, about.
        position: (N, 3) of the graph's nodes in the box's axes, mm from its middle.
        half_mm: (3,) half the size of the box.
    """
    inside = np.all(np.abs(position) <= half_mm, axis=1)
    links = vessel_links(graph)
    start = parent_node(graph, candidate)
    found: dict[int, int] = {}  # node of the graph -> node of the piece
    if start >= 0 and inside[start]:
        waiting = [start]
        found[start] = 0
        while waiting:
            for other, _ in links.get(waiting.pop(), []):
                if inside[other] and other not in found:
                    found[other] = len(found)
                    waiting.append(other)
    exits = []
    for node in found:
        around = links.get(node, [])
        for other, segment in around:
            if not inside[other]:
                step = position[other] - position[node]
                crossing = position[node] + _leaving(position[node], step, half_mm) * step
                exits.append((node, crossing, step, segment))
        if len(around) == 1 and graph.kind[node] == END:
            before, segment = around[0]
            step = position[node] - position[before]
            radius = max(float(graph.radius[before]), 1e-3)
            length = float(graph.edge_length[graph.edge_segment == segment].sum())
            own = np.linalg.norm(graph.position[node] - candidate.centre_mm) < CLEAR * graph.radius[start]
            if length > STUMP * radius and inside[before] and not own:
                back = min(BEFORE_END * radius / max(float(np.linalg.norm(step)), 1e-9), 1.0)
                exits.append((node, position[node] - back * step, step, segment))
    exits = [one for one in exits if np.linalg.norm(one[2]) > 1e-9]
    inner = [a in found and b in found and _linked(links, a, b) for a, b in graph.edges.tolist()]
    own = np.flatnonzero(inner)
    nodes = np.array(list(found), dtype=np.int64)
    number = np.array([[found[a], found[b]] for a, b in graph.edges[own].tolist()], np.int64).reshape(-1, 2)
    step = np.array([one[2] for one in exits]).reshape(-1, 3)
    return LocalTree(
        position=position[nodes].reshape(-1, 3),
        edges=number,
        edge_length=graph.edge_length[own],
        edge_radius=graph.radius[graph.edges[own]].mean(1) if len(own) else np.zeros(0),
        exit_node=np.array([found[one[0]] for one in exits], dtype=np.int64),
        exit_position=np.array([one[1] for one in exits]).reshape(-1, 3),
        exit_outward=step / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-9),
        exit_radius=np.array([_calibre(graph, nodes, one[0], one[3]) for one in exits]),
    )


def _leaving(origin: np.ndarray, step: np.ndarray, half_mm: np.ndarray) -> float:
    """Share of a step after which it crosses the box's faces, 0..1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.where(step != 0, (np.sign(step) * half_mm - origin) / step, np.inf)
    return float(np.clip(reach.min(), 0, 1))


def _linked(links: dict[int, list[tuple[int, int]]], a: int, b: int) -> bool:
    return any(other == b for other, _ in links.get(a, []))


def _calibre(graph: VesselGraph, nodes: np.ndarray, at: int, segment: int) -> float:
    """Median radius of a segment's nodes in the piece; that of the last node where there is no other."""
    along = nodes[graph.segment[nodes] == segment]
    return float(np.median(graph.radius[along])) if len(along) else float(graph.radius[at])
