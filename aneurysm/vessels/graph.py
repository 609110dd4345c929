"""A vessel tree as a graph: nodes every few millimetres along the centreline, edges between neighbours.

Notation: N nodes, E undirected edges, S segments (stretches between junctions and ends), F node features,
G edge features. Positions are RAS mm.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from aneurysm.data.files import replacing
from aneurysm.data.scan import Grid
from aneurysm.vessels.centreline import Branch, Centreline, trace
from aneurysm.vessels.cleanup import bounding_box, check_on_grid
from aneurysm.vessels.features import EDGE_FEATURES, NODE_FEATURES, PathPoints, describe_nodes
from aneurysm.vessels.skeleton import inside_distance, skeletonise

PATH, END, JUNCTION = 0, 1, 2  # values of VesselGraph.kind


@dataclass(frozen=True, eq=False)
class VesselGraph:
    """The centreline graph of one vessel mask, with what is known about every node and edge."""

    position: np.ndarray  # (N, 3) float64, RAS mm
    radius: np.ndarray  # (N,) float64, mm, of the largest sphere inside the vessel
    kind: np.ndarray  # (N,) uint8: PATH, END or JUNCTION
    degree: np.ndarray  # (N,) int64
    tangent: np.ndarray  # (N, 3) float64, unit; at a junction that of its thickest branch; sign arbitrary
    segment: np.ndarray  # (N,) int64, segment of a path or end node, -1 at a junction
    edges: np.ndarray  # (E, 2) int64, each undirected edge once
    edge_length: np.ndarray  # (E,) float64, mm along the centreline
    edge_segment: np.ndarray  # (E,) int64
    node_features: np.ndarray  # (N, F) float32, of order one, finite
    edge_features: np.ndarray  # (E, G) float32, of order one, finite, the same in both directions
    bulge_mm3: np.ndarray  # (N,) float64, vessel volume within 6 mm outside a tube of usual width
    bulge_centre: np.ndarray  # (N, 3) float64, RAS mm, middle of that volume, else the node
    node_names: tuple[str, ...] = NODE_FEATURES  # of the F columns
    edge_names: tuple[str, ...] = EDGE_FEATURES  # of the G columns

    def __post_init__(self) -> None:
        n, e = len(self.position), len(self.edges)
        expected = {
            "position": (n, 3),
            "radius": (n,),
            "kind": (n,),
            "degree": (n,),
            "tangent": (n, 3),
            "segment": (n,),
            "edges": (e, 2),
            "edge_length": (e,),
            "edge_segment": (e,),
            "node_features": (n, len(self.node_names)),
            "edge_features": (e, len(self.edge_names)),
            "bulge_mm3": (n,),
            "bulge_centre": (n, 3),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"VesselGraph.{name} must be {shape} but is {getattr(self, name).shape}.")
        for name in ("node_features", "edge_features"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"VesselGraph.{name} holds NaN or infinite values.")

    def __len__(self) -> int:
        return len(self.position)

    @property
    def segments(self) -> int:
        """S, the number of segments."""
        return int(max(self.edge_segment.max(initial=-1), self.segment.max(initial=-1))) + 1

    def to_edge_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Both directions of every edge: (source, target) (2, 2E) int64, and features (2E, G) float32."""
        both = np.concatenate([self.edges, self.edges[:, ::-1]]).T
        return np.ascontiguousarray(both), np.concatenate([self.edge_features, self.edge_features])

    def save(self, path: Path) -> None:
        """Write to one safetensors file, whole or not at all."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        names = {"node_names": json.dumps(self.node_names), "edge_names": json.dumps(self.edge_names)}
        with replacing(Path(path)) as part:
            save_file(arrays, part, metadata=names)

    @classmethod
    def load(cls, path: Path) -> "VesselGraph":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else than a vessel graph.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No vessel graph at {path}. Run the stage that builds the graphs first.")
        with safe_open(path, framework="numpy") as file:
            names = file.metadata() or {}
            missing = sorted(set(_ARRAYS) - set(file.keys()))
            if missing or "node_names" not in names:
                raise ValueError(f"{path} is not a vessel graph: it lacks {missing or ['node_names']}.")
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        return cls(
            **arrays,
            node_names=tuple(json.loads(names["node_names"])),
            edge_names=tuple(json.loads(names["edge_names"])),
        )


_ARRAYS = tuple(name for name in VesselGraph.__dataclass_fields__ if name not in ("node_names", "edge_names"))


def build_graph(mask: np.ndarray, grid: Grid, node_spacing_mm: float = 2.0) -> VesselGraph:
    """Thin a vessel mask and lay nodes along its centreline.

    Args:
        mask: (d, h, w) bool, preferably from `clean_mask`.
        grid: where the voxels lie.
        node_spacing_mm: distance between neighbouring nodes; sidewall sacs need nodes along the vessel.

    Returns:
        The graph with geometric node features; without nodes when the mask is empty.

    Raises:
        ValueError: the mask does not lie on the grid, or the spacing is not positive.
    """
    check_on_grid(mask, grid)
    if not node_spacing_mm > 0:
        raise ValueError(f"node_spacing_mm must be positive but is {node_spacing_mm}.")
    inside = np.ascontiguousarray(np.asarray(mask) != 0)
    if not inside.any():
        return _empty()
    distance = inside_distance(inside, grid.spacing)
    box = bounding_box(inside)
    inside, distance = inside[box], np.ascontiguousarray(distance[box])
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_mm(np.array([s.start for s in box]))
    grid = Grid(inside.shape, affine)
    line = trace(skeletonise(inside, distance, float(grid.spacing.min())), distance, grid)
    nodes = _Nodes(line, node_spacing_mm)
    described = describe_nodes(nodes.path(), nodes.topology(), line, inside, distance, grid)
    return VesselGraph(
        **nodes.topology(),
        edge_features=nodes.edge_features(),
        node_features=described.features,
        bulge_mm3=described.bulge_mm3,
        bulge_centre=described.bulge_centre,
    )


def _empty() -> VesselGraph:
    return VesselGraph(
        position=np.zeros((0, 3)),
        radius=np.zeros(0),
        kind=np.zeros(0, np.uint8),
        degree=np.zeros(0, np.int64),
        tangent=np.zeros((0, 3)),
        segment=np.zeros(0, np.int64),
        edges=np.zeros((0, 2), np.int64),
        edge_length=np.zeros(0),
        edge_segment=np.zeros(0, np.int64),
        node_features=np.zeros((0, len(NODE_FEATURES)), np.float32),
        edge_features=np.zeros((0, len(EDGE_FEATURES)), np.float32),
        bulge_mm3=np.zeros(0),
        bulge_centre=np.zeros((0, 3)),
    )


class _Nodes:
    """Collects nodes and edges branch by branch; junctions come first."""

    def __init__(self, line: Centreline, spacing_mm: float) -> None:
        junctions = len(line.junction)
        self.positions = [line.junction]
        self.radii = [line.junction_radius]
        self.tangents = [np.tile([0.0, 0.0, 1.0], (junctions, 1))]
        self.kinds = [np.full(junctions, JUNCTION, np.uint8)]
        self.owners = [np.full(junctions, -1)]
        self.edges: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.edge_owners: list[np.ndarray] = []
        self.edge_rows: list[np.ndarray] = []
        self.path_parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.thickest = np.zeros(junctions)
        self.count = junctions
        self.spacing_mm = spacing_mm
        for number, branch in enumerate(line.branches):
            self._add(number, branch)

    def _add(self, number: int, branch: Branch) -> None:
        arc, length = branch.arc, branch.length
        between = branch.start >= 0 and branch.end >= 0
        fewest = 3 if branch.closed or (between and branch.start == branch.end) else 2 if between else 1
        steps = max(fewest, round(length / self.spacing_mm)) if length > 0 else 0
        at = np.linspace(0, length, steps + 1)
        tangent = _tangents(branch.points)
        position = np.stack([np.interp(at, arc, branch.points[:, k]) for k in range(3)], axis=-1)
        direction = np.stack([np.interp(at, arc, tangent[:, k]) for k in range(3)], axis=-1)
        direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-9)
        radius = np.interp(at, arc, branch.radius)

        own = np.ones(steps + 1, bool)  # which of these become new nodes
        own[0] = branch.start < 0
        own[-1] = branch.end < 0 and not (branch.closed and steps > 0)
        ids = np.full(steps + 1, -1)
        ids[own] = self.count + np.arange(own.sum())
        self.count += int(own.sum())
        for place, junction in ((0, branch.start), (-1, branch.end)):
            if junction >= 0:
                ids[place] = junction
                width = float(np.median(branch.radius))
                if width > self.thickest[junction]:
                    self.thickest[junction] = width
                    self.tangents[0][junction] = direction[place]
        if branch.closed and steps > 0:
            ids[-1] = ids[0]
        kind = np.zeros(steps + 1, np.uint8)
        if not branch.closed:
            kind[[0, -1]] = END
        self.positions.append(position[own])
        self.radii.append(radius[own])
        self.tangents.append(direction[own])
        self.kinds.append(kind[own])
        self.owners.append(np.full(int(own.sum()), number))
        if steps > 0:
            self.edges.append(np.stack([ids[:-1], ids[1:]], axis=-1))
            self.lengths.append(np.full(steps, length / steps))
            self.edge_owners.append(np.full(steps, number))
            middle = (at[:-1] + at[1:]) / 2
            bend = np.interp(middle, arc, branch.curvature)
            self.edge_rows.append(_edge_features(length / steps, radius, bend, position, direction, branch))
        share = np.gradient(arc) if len(arc) > 1 else np.ones(1)
        nearest = ids[np.round(arc / max(length, 1e-9) * steps).astype(int)]
        self.path_parts.append((branch.points, branch.radius, share, nearest))

    def topology(self) -> dict[str, Any]:
        edges = np.concatenate(self.edges) if self.edges else np.zeros((0, 2), np.int64)
        tangent = np.concatenate(self.tangents)
        flat = np.linalg.norm(tangent, axis=1) < 0.5  # a single voxel has no direction
        tangent[flat] = [0.0, 0.0, 1.0]
        return {
            "position": np.concatenate(self.positions),
            "radius": np.concatenate(self.radii),
            "kind": np.concatenate(self.kinds),
            "degree": np.bincount(edges.ravel(), minlength=self.count).astype(np.int64),
            "tangent": tangent,
            "segment": np.concatenate(self.owners).astype(np.int64),
            "edges": edges.astype(np.int64),
            "edge_length": np.concatenate([np.zeros(0), *self.lengths]),
            "edge_segment": np.concatenate([np.zeros(0), *self.edge_owners]).astype(np.int64),
        }

    def edge_features(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, len(EDGE_FEATURES))), *self.edge_rows]).astype(np.float32)

    def path(self) -> PathPoints:
        points, radius, share, node = (np.concatenate(part) for part in zip(*self.path_parts, strict=True))
        return PathPoints(points, radius, share, node)


def _tangents(points: np.ndarray) -> np.ndarray:
    """Unit directions along (m, 3) points."""
    if len(points) < 2:
        return np.zeros_like(points)
    slope = np.gradient(points, axis=0)
    return slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-9)


def _edge_features(
    step: float,
    radius: np.ndarray,
    bend: np.ndarray,
    position: np.ndarray,
    direction: np.ndarray,
    branch: Branch,
) -> np.ndarray:
    """Rows of EDGE_FEATURES for the edges between consecutive nodes of one branch."""
    width = np.maximum((radius[:-1] + radius[1:]) / 2, 1e-3)
    chord = np.linalg.norm(np.diff(position, axis=0), axis=1)
    rows = np.stack(
        [
            np.full(len(bend), np.log(max(step, 1e-3) / 2.0)),
            np.log(width / 1.5),
            np.abs(np.log(np.maximum(radius[1:], 1e-3) / np.maximum(radius[:-1], 1e-3))),
            bend * 3.0,
            chord / max(step, 1e-3),
            np.abs((direction[:-1] * direction[1:]).sum(1)),
            np.full(len(bend), np.log(max(branch.length, 1e-3) / 10.0)),
            np.full(len(bend), float(branch.start < 0 or branch.end < 0)),
        ],
        axis=-1,
    )
    return np.clip(rows, -4, 4)
