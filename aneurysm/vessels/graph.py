"""A vessel tree as a graph: nodes every few millimetres along the centreline, edges between neighbours.

Notation: N nodes, E undirected edges, S segments (stretches between junctions and ends), F node features,
G edge features. Positions are RAS mm.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.spatial import KDTree

from aneurysm.data.files import replacing
from aneurysm.data.scan import Grid
from aneurysm.vessels.centreline import trace
from aneurysm.vessels.depth import depth
from aneurysm.vessels.domes import domes
from aneurysm.vessels.features import EDGE_FEATURES, NODE_FEATURES, Body, describe_nodes
from aneurysm.vessels.nodes import DOME, END, JUNCTION, PATH, NodeLayer
from aneurysm.vessels.pieces import pieces
from aneurysm.vessels.skeleton import thin
from aneurysm.vessels.voxels import Voxels, check_on_grid

__all__ = ["DOME", "END", "JUNCTION", "PATH", "VesselGraph", "build_graph"]


@dataclass(frozen=True, eq=False)
class VesselGraph:
    """The centreline graph of one vessel mask, with what is known about every node and edge."""

    position: np.ndarray  # (N, 3) float64, RAS mm
    radius: np.ndarray  # (N,) float64, mm, of the largest sphere inside the vessel
    kind: np.ndarray  # (N,) uint8: PATH, END, JUNCTION or DOME
    degree: np.ndarray  # (N,) int64
    tangent: np.ndarray  # (N, 3) float64, unit; at a junction that of its thickest branch; sign arbitrary
    segment: np.ndarray  # (N,) int64, segment of a node, -1 at a junction; a dome has its own
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


def build_graph(mask: np.ndarray | Voxels, grid: Grid, node_spacing_mm: float = 2.0) -> VesselGraph:
    """Thin a vessel mask and lay nodes along its centreline.

    Args:
        mask: (d, h, w) bool or its voxels, preferably from `vessels.repair.repair`: specks become stars,
            pinholes shells.
        grid: where the voxels lie.
        node_spacing_mm: distance between neighbouring nodes; sidewall sacs need nodes along the vessel.

    Returns:
        The graph with geometric node features; without nodes when the mask is empty.

    Raises:
        ValueError: the mask does not lie on the grid, or the spacing is not positive.
    """
    voxels = mask if isinstance(mask, Voxels) else Voxels.of(mask)
    check_on_grid(voxels, grid)
    if not node_spacing_mm > 0:
        raise ValueError(f"node_spacing_mm must be positive but is {node_spacing_mm}.")
    if not len(voxels):
        return _empty()
    deep = depth(voxels, grid.spacing)
    skeleton = thin(voxels, deep, float(grid.spacing.min()))
    line = trace(voxels, deep, skeleton, grid)
    nodes = NodeLayer(line, node_spacing_mm)
    path, mm = nodes.path(), grid.to_mm(voxels.index)
    gap, nearest = (np.asarray(found) for found in KDTree(path.position).query(mm))
    middle = domes(voxels, mm, deep, gap, path.radius[nearest], float(grid.spacing.max()))
    if len(middle):
        _, piece = pieces(voxels)
        home = np.rint(grid.to_index(nodes.topology()["position"]))
        nodes.add_domes(
            mm[middle],
            deep[middle],
            piece[middle],
            np.append(piece, -1)[voxels.find(home)],
            path.node[nearest[middle]],
        )
        beside, dome = (np.asarray(found) for found in KDTree(mm[middle]).query(mm))
        nearer = beside < gap
        gap[nearer], nearest[nearer] = beside[nearer], len(path.position) + dome[nearer]
        path = nodes.path()
    topology = nodes.topology()
    described = describe_nodes(path, topology, line, Body(mm, deep, gap, nearest, grid))
    return VesselGraph(
        **topology,
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
