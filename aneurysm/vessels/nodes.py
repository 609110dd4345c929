"""Nodes every few millimetres along a centreline, and the edges between neighbours.

Notation as in `graph`: N nodes, E edges, S segments; M centreline points.
"""

from typing import Any

import numpy as np

from aneurysm.vessels.centreline import Branch, Centreline
from aneurysm.vessels.domes import anchors
from aneurysm.vessels.features import EDGE_FEATURES, PathPoints

PATH, END, JUNCTION, DOME = 0, 1, 2, 3  # values of VesselGraph.kind
_EDGE_COLUMNS = ("length", "radius", "next", "chord", "alignment", "bend", "segment_length", "terminal")


class NodeLayer:
    """Collects nodes and edges branch by branch; junctions come first, domes last."""

    def __init__(self, line: Centreline, spacing_mm: float) -> None:
        junctions = len(line.junction)
        self.positions = [line.junction]
        self.radii = [line.junction_radius]
        self.tangents = [np.tile([0.0, 0.0, 1.0], (junctions, 1))]
        self.kinds = [np.full(junctions, JUNCTION, np.uint8)]
        self.owners = [np.full(junctions, -1)]
        self.edges: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
        self.edge_parts: list[np.ndarray] = [np.zeros((0, len(_EDGE_COLUMNS)))]
        self.edge_owners: list[np.ndarray] = [np.zeros(0, np.int64)]
        self.path_parts: list[tuple[np.ndarray, ...]] = []  # as PathPoints, and the edge of every point
        self.thickest = np.zeros(junctions)
        self.count, self.edge_count = junctions, 0
        self.segments = len(line.branches)
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
        of_point = np.full(len(arc), -1)
        if steps > 0:
            self.edges.append(np.stack([ids[:-1], ids[1:]], axis=-1))
            self.edge_owners.append(np.full(steps, number))
            whole = np.ones(steps)
            self.edge_parts.append(
                np.column_stack(
                    [
                        whole * (length / steps),
                        radius[:-1],
                        radius[1:],
                        np.linalg.norm(np.diff(position, axis=0), axis=1),
                        np.abs((direction[:-1] * direction[1:]).sum(1)),
                        np.interp((at[:-1] + at[1:]) / 2, arc, branch.curvature),
                        whole * branch.length,
                        whole * float(branch.start < 0 or branch.end < 0),
                    ]
                )
            )
            of_point = self.edge_count + np.minimum((arc / length * steps).astype(int), steps - 1)
            self.edge_count += steps
        share = np.gradient(arc) if len(arc) > 1 else np.ones(1)
        nearest = ids[np.round(arc / max(length, 1e-9) * steps).astype(int)]
        owner = np.full(len(arc), number)
        self.path_parts.append(
            (branch.points, branch.radius, branch.curvature, share, nearest, owner, of_point)
        )

    def add_domes(
        self,
        centre: np.ndarray,
        radius: np.ndarray,
        piece: np.ndarray,
        node_piece: np.ndarray,
        nearest: np.ndarray,
    ) -> None:
        """Link a node at the middle of each dome (k, 3) to the centreline.

        Args:
            centre: (k, 3) RAS mm.
            radius: (k,) mm.
            piece: (k,) piece of the mask that each lies in.
            node_piece: (N,) the same of the nodes so far, -1 where it is not known.
            nearest: (k,) node of the centreline point nearest to each.
        """
        position, many = np.concatenate(self.positions), len(centre)
        home = anchors(centre, piece, position, np.concatenate(self.radii), node_piece, nearest)
        away = centre - position[home]
        length = np.maximum(np.linalg.norm(away, axis=1), 1e-3)
        ids, segment = self.count + np.arange(many), self.segments + np.arange(many)
        whole = np.ones(many)
        self.edge_parts.append(
            np.column_stack(
                [length, np.concatenate(self.radii)[home], radius, length, whole, 0 * whole, length, whole]
            )
        )
        self.edges.append(np.stack([home, ids], axis=-1))
        self.edge_owners.append(segment)
        self.positions.append(centre)
        self.radii.append(radius)
        self.tangents.append(away / length[:, None])
        self.kinds.append(np.full(many, DOME, np.uint8))
        self.owners.append(segment)
        self.path_parts.append(
            (centre, radius, 0 * whole, length / 2, ids, segment, self.edge_count + np.arange(many))
        )
        self.count, self.edge_count = self.count + many, self.edge_count + many
        self.segments += many

    def topology(self) -> dict[str, Any]:
        """The fields of a VesselGraph that are no features."""
        edges = np.concatenate(self.edges)
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
            "edge_length": np.concatenate(self.edge_parts)[:, 0],
            "edge_segment": np.concatenate(self.edge_owners).astype(np.int64),
        }

    def path(self) -> PathPoints:
        """All points of the centreline."""
        return PathPoints(*(np.concatenate(part) for part in zip(*self.path_parts, strict=True)))

    def edge_features(self) -> np.ndarray:
        """Rows of EDGE_FEATURES, (E, G) float32."""
        part = dict(zip(_EDGE_COLUMNS, np.concatenate(self.edge_parts).T, strict=True))
        path = self.path()
        at = path.edge >= 0
        edge, radius, bend = path.edge[at], path.radius[at], path.curvature[at]
        least, most = np.minimum(part["radius"], part["next"]), np.maximum(part["radius"], part["next"])
        np.minimum.at(least, edge, radius)
        np.maximum.at(most, edge, radius)
        sharpest = part["bend"].copy()
        np.maximum.at(sharpest, edge, bend)
        many = np.bincount(edge, minlength=self.edge_count)
        mean = np.bincount(edge, radius, self.edge_count) / np.maximum(many, 1)
        mean = np.where(many > 0, mean, (part["radius"] + part["next"]) / 2)
        curvature = np.bincount(edge, bend, self.edge_count) / np.maximum(many, 1)
        length = np.maximum(part["length"], 1e-3)
        column = {
            "log_length": np.log(length / 2),
            "log_radius": np.log(np.maximum(mean, 1e-3) / 1.5),
            "log_radius_min": np.log(np.maximum(least, 1e-3) / 1.5),
            "log_radius_max": np.log(np.maximum(most, 1e-3) / 1.5),
            "radius_step": np.abs(np.log(np.maximum(part["next"], 1e-3) / np.maximum(part["radius"], 1e-3))),
            "curvature": 3 * np.where(many > 0, curvature, part["bend"]),
            "curvature_max": 3 * sharpest,
            "straightness": part["chord"] / length,
            "alignment": part["alignment"],
            "log_segment_length": np.log(np.maximum(part["segment_length"], 1e-3) / 10),
            "terminal": part["terminal"],
        }
        rows = np.stack([column[name] for name in EDGE_FEATURES], axis=-1)
        return np.clip(rows, -4, 4).astype(np.float32)


def _tangents(points: np.ndarray) -> np.ndarray:
    """Unit directions along (m, 3) points."""
    if len(points) < 2:
        return np.zeros_like(points)
    slope = np.gradient(points, axis=0)
    return slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-9)
