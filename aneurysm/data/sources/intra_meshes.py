"""The surface meshes of IntrA: whole cerebral arterial trees and point clouds in which aneurysms are marked.

Two layouts are read. The official release:

    complete/*.obj               one triangle mesh per tree, `AN12` somewhere in the name
    annotated/ad/*.ad            per line x y z nx ny nz label; `AN12-_norm.ad`, `AN12-2-_norm.ad`

and a packed folder with the same content, `complete_meshes.npz` and `annotated_points.npz`.

Labels of points are 0 vessel, 1 aneurysm, 2 the line between them. Trees are in mm; some point files are in
tenths of a millimetre, which is found by laying them on their tree.

Axes: the meshes are taken to be in scanner coordinates of DICOM (x to the left, y to posterior, z to
    superior): the
anatomy fits that for y and z (the basilar artery lies at larger y than the carotids, the cortical branches at
larger z), and x follows if the reconstruction was not mirrored. Everything here is handed out in RAS.

Source: Yang et al. 2020, "IntrA: 3D Intracranial Aneurysm Dataset for Deep Learning", CVPR.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from aneurysm.data.errors import ReadError

ANEURYSM = 1  # point label
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_SCALES = (1.0, 0.1)  # units of annotated points in mm
_ALIGNED_MM = 1.0  # median distance up to which a segment lies on its tree; the known misfit is at 6 mm
_SAC_MM = 1.5  # the same for an aneurysm alone; three are missing from their trees, by 2 to 4 mm
_NAME = re.compile(r"AN(\d+)(?:-(\d+))?")


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a tree around one aneurysm, as points on its surface."""

    name: str  # AN12, AN12-2
    points: np.ndarray  # (n, 3) RAS mm
    normals: np.ndarray  # (n, 3) outward unit vectors, RAS
    label: np.ndarray  # (n,) uint8: 0 vessel, 1 aneurysm, 2 border
    misfit_mm: float  # median distance of the points to their tree
    sac_misfit_mm: float  # the same for the points on the aneurysm

    @property
    def aligned(self) -> bool:
        """Whether the segment lies in the frame of its tree."""
        return self.misfit_mm < _ALIGNED_MM

    @property
    def sac_in_tree(self) -> bool:
        """Whether the tree has a wall where the aneurysm is; in some only the segment shows it."""
        return self.sac_misfit_mm < _SAC_MM

    @property
    def sac_points(self) -> np.ndarray:
        """Points on the aneurysm, (m, 3) RAS mm."""
        return self.points[self.label == ANEURYSM]

    @property
    def centre_mm(self) -> np.ndarray:
        """Mean of the points on the aneurysm, RAS mm."""
        return self.sac_points.mean(0)


@dataclass(frozen=True, eq=False)
class Tree:
    """The arterial tree of one scan."""

    name: str  # AN12
    patient_id: str  # trees of one patient share it
    vertices: np.ndarray  # (v, 3) float64 RAS mm
    faces: np.ndarray  # (f, 3) int64, indices of vertices
    segments: tuple[Segment, ...]

    @property
    def fully_annotated(self) -> bool:
        """Whether every known aneurysm has its place in the tree.

        False when a segment does not lie on the tree, or when the segments' numbers have a gap: AN144-2
        without AN144-1 says that there is an aneurysm nobody marked.
        """
        numbers = sorted(int(m[2] or 1) for s in self.segments if (m := _NAME.search(s.name)))
        whole = numbers == list(range(1, len(numbers) + 1))
        return bool(self.segments) and whole and all(s.aligned for s in self.segments)


def read_trees(folder: Path, max_patients: int | None = None) -> list[Tree]:
    """All trees of a folder in either layout, by rising number.

    Two reconstructions of one scan are in the release under two names (AN195 and AN201). Left apart they
    would put one patient on both sides of a cross-validation, so trees that cover the same space share the
    first one's patient.

    Args:
        folder: the official release or the packed folder.
        max_patients: stop when so many patients have an aneurysm whose place is known.

    Raises:
        ReadError: the folder has neither layout or a file in it is broken.
    """
    folder = Path(folder)
    if (folder / "complete_meshes.npz").is_file():
        source = _packed(folder)
    elif next((folder / "complete").glob("*.obj"), None):
        source = _official(folder)
    else:
        here = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise ReadError(
            f"{folder}: no IntrA meshes. Expected complete/*.obj and annotated/ad/*.ad, or "
            f"complete_meshes.npz and annotated_points.npz; found {here}."
        )
    trees: list[Tree] = []
    cells: list[np.ndarray] = []
    for tree in source:
        own = _cells(tree.vertices)
        for twin, other in zip(trees, cells, strict=True):
            if np.isin(own, other, assume_unique=True).sum() > 0.5 * min(len(own), len(other)):
                tree = replace(tree, patient_id=twin.patient_id)
                break
        trees.append(tree)
        cells.append(own)
        located = {t.patient_id for t in trees if any(s.aligned for s in t.segments)}
        if max_patients is not None and len(located) >= max_patients:
            break
    return trees


def place_segment(
    name: str, points: np.ndarray, normals: np.ndarray, label: np.ndarray, tree: KDTree
) -> Segment:
    """Put annotated points (n, 3) RAS with outward normals, in an unknown unit, on their tree (mm).

    Raises:
        ReadError: no point is labelled as aneurysm.
    """
    if not (label == ANEURYSM).any():
        raise ReadError(f"{name}: none of {len(label)} annotated points has the label {ANEURYSM} (aneurysm).")
    probe = points[:: max(1, len(points) // 500)]
    misfit = {scale: float(np.median(tree.query(probe * scale)[0])) for scale in _SCALES}
    scale = min(misfit, key=lambda s: misfit[s])
    points = points * scale
    sac_misfit = float(np.median(tree.query(points[label == ANEURYSM])[0]))
    length = np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-9)
    return Segment(name, points, normals / length, label.astype(np.uint8), misfit[scale], sac_misfit)


def read_obj(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (v, 3) float64, as stored, and triangles (f, 3) int64 from zero of a Wavefront OBJ file.

    Raises:
        ReadError: the file holds other polygons than triangles, or no mesh.
    """
    vertices: list[str] = []
    corners: list[str] = []
    for line in path.read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "v":
            vertices += rest.split()[:3]
        elif kind == "f":
            corner = [c.partition("/")[0] for c in rest.split()]  # "7/1/3" is vertex 7
            if len(corner) != 3:
                raise ReadError(f"{path}: a face has {len(corner)} corners. Triangulate the mesh first.")
            corners += corner
    try:
        v = np.array(vertices, dtype=np.float64).reshape(-1, 3)
        f = np.array(corners, dtype=np.int64).reshape(-1, 3)
    except ValueError as error:
        raise ReadError(f"{path}: not a Wavefront OBJ file: {error}") from error
    f = np.where(f < 0, f + len(v), f - 1)  # OBJ counts from 1, or backwards from the end
    if not len(f) or f.min() < 0 or f.max() >= len(v):
        raise ReadError(f"{path}: {len(f)} triangles over {len(v)} vertices; the mesh is empty or cut off.")
    return v, f


def _official(folder: Path) -> Iterator[Tree]:
    clouds: dict[str, list[Path]] = {}
    for path in sorted((folder / "annotated" / "ad").glob("*.ad")):
        clouds.setdefault("AN" + _number(path.stem)[0], []).append(path)
    paths = sorted((folder / "complete").glob("*.obj"), key=lambda p: int(_number(p.stem)[0]))
    for path in paths:
        name = "AN" + _number(path.stem)[0]
        vertices, faces = read_obj(path)
        tree = Tree(name, name, vertices * _LPS_TO_RAS, faces, ())
        near = KDTree(tree.vertices)
        segments = [_read_cloud(cloud, near) for cloud in clouds.get(name, [])]
        yield replace(tree, segments=tuple(segments))


def _read_cloud(path: Path, tree: KDTree) -> Segment:
    try:
        rows = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ReadError(f"{path}: not a table of numbers: {error}") from error
    if rows.shape[1] != 7:
        raise ReadError(f"{path}: expected 7 columns x y z nx ny nz label, found {rows.shape[1]}.")
    number, part = _number(path.stem)
    name = f"AN{number}-{part}" if part else f"AN{number}"
    return place_segment(name, rows[:, :3] * _LPS_TO_RAS, rows[:, 3:6] * _LPS_TO_RAS, rows[:, 6], tree)


def _packed(folder: Path) -> Iterator[Tree]:
    with (
        np.load(folder / "complete_meshes.npz") as meshes,
        np.load(folder / "annotated_points.npz") as points,
    ):
        names, first_vertex, first_face = (meshes[k] for k in ("names", "vert_offset", "face_offset"))
        vertices = meshes["verts_centi_mm"]
        faces = np.cumsum(meshes["faces_delta"], dtype=np.int64).reshape(-1, 3)
        cloud_names, patients, first_point = (points[k] for k in ("names", "patient", "offset"))
        xyz, outward = np.split(points["xyz_normal"], 2, axis=1)
        labels = points["label"]
    order = sorted(range(len(names)), key=lambda i: int(_number(str(names[i]))[0]))
    for i in order:
        name = str(names[i])
        own = vertices[first_vertex[i] : first_vertex[i + 1]] / 100 * _LPS_TO_RAS
        near = KDTree(own)
        segments = []
        for k in np.flatnonzero(patients == names[i]):
            span = slice(first_point[k], first_point[k + 1])
            cloud, normals = (part[span].astype(np.float64) * _LPS_TO_RAS for part in (xyz, outward))
            segments.append(place_segment(str(cloud_names[k]), cloud, normals, labels[span], near))
        triangles = faces[first_face[i] : first_face[i + 1]].copy()
        yield Tree(name, name, own, triangles, tuple(segments))


def _number(stem: str) -> tuple[str, str | None]:
    match = _NAME.search(stem)
    if match is None:
        raise ReadError(f"{stem}: no patient number of the form AN12 in the name of an IntrA file.")
    return match[1], match[2]


def _cells(vertices: np.ndarray) -> np.ndarray:
    """The 3 mm cells that a surface passes through, as sorted whole numbers."""
    cells = np.rint(vertices / 3).astype(np.int64) + 2**19
    return np.unique((cells[:, 0] << 40) | (cells[:, 1] << 20) | cells[:, 2])
