"""Small vessels with an aneurysm as triangle meshes, written in the layout of the IntrA release."""

from pathlib import Path

import numpy as np
from skimage.measure import marching_cubes

SAC_MM = np.array([4.0, 0.0, 1.0])  # centre of the sac, LPS
SAC_RADIUS_MM = 3.0
TUBE_RADIUS_MM = 2.0
HALF_MM = 25.0
STEP_MM = 0.5


def tube(radius: float, length: float, sides: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """An open cylinder around z, with the volume of its inscribed polygon close to the circle's."""
    angle = np.arange(sides) * 2 * np.pi / sides
    levels = np.linspace(-length / 2, length / 2, 41)
    ring = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    vertices = np.concatenate([np.c_[ring, np.full(sides, z)] for z in levels])
    i, j = np.meshgrid(np.arange(len(levels) - 1), np.arange(sides), indexing="ij")
    a, b = i * sides + j, i * sides + (j + 1) % sides
    faces = np.stack([np.stack([a, b, b + sides], -1), np.stack([a, b + sides, a + sides], -1)]).reshape(
        -1, 3
    )
    return vertices, faces


def vessel_with_sac(hollow: bool = False, branch_mm: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """A tube along z, a branch along y and a sac; open where the vessels leave the box. LPS mm.

    Args:
        hollow: leave a cave in the sac, as slow flow does.
        branch_mm: height at which the branch leaves; makes trees differ.
    """
    axis = np.arange(-HALF_MM, HALF_MM + STEP_MM / 2, STEP_MM)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    trunk = np.hypot(x, y) - TUBE_RADIUS_MM
    branch = np.maximum(np.hypot(x, z - branch_mm) - 1.5, -y)
    from_sac = np.linalg.norm(np.stack([x, y, z], -1) - SAC_MM, axis=-1)
    distance = np.minimum(np.minimum(trunk, branch), from_sac - SAC_RADIUS_MM)
    if hollow:
        distance = np.maximum(distance, 1.8 - from_sac)
    vertices, faces, _, _ = marching_cubes(distance, 0.0, spacing=(STEP_MM,) * 3)
    return vertices - HALF_MM, faces.astype(np.int64)


def sac_points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, outward normals and labels around the sac: 1 on it, 0 on the trunk, LPS mm."""
    n = 900
    k = np.arange(n) + 0.5
    polar, turn = np.arccos(1 - 2 * k / n), np.pi * (1 + 5**0.5) * k
    normals = np.stack([np.cos(turn) * np.sin(polar), np.sin(turn) * np.sin(polar), np.cos(polar)], 1)
    ball = SAC_MM + SAC_RADIUS_MM * normals
    on_sac = np.hypot(ball[:, 0], ball[:, 1]) > TUBE_RADIUS_MM
    wall, _ = tube(TUBE_RADIUS_MM, 16.0)
    on_wall = np.linalg.norm(wall - SAC_MM, axis=1) > SAC_RADIUS_MM
    outward = wall * [1, 1, 0] / TUBE_RADIUS_MM
    points = np.concatenate([ball[on_sac], wall[on_wall]])
    label = np.concatenate([np.ones(on_sac.sum()), np.zeros(on_wall.sum())])
    return points, np.concatenate([normals[on_sac], outward[on_wall]]), label


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# a comment", "g vessel"]
    lines += [f"v {x:.4f} {y:.4f} {z:.4f}" for x, y, z in vertices]
    lines += [f"f {a}//{a} {b}//{b} {c}//{c}" for a, b, c in faces + 1]
    path.write_text("\n".join(lines) + "\n")


def write_cloud(path: Path, scale: float = 1.0, shift_mm: float = 0.0) -> None:
    """An .ad file around the sac, in units of 1 / scale mm."""
    points, normals, label = sac_points()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, np.c_[(points + shift_mm) * scale, normals, label], fmt=["%.4f"] * 6 + ["%d"])
