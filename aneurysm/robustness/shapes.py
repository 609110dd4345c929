"""Vessels of known shape as a scan shows them: lumen probability with partial volume on an oblique grid."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from aneurysm.data.scan import Grid
from aneurysm.data.voxelise import partial_volume, subdivided
from aneurysm.physics.reference_vessels import FormulaWall, bend, tube, tube_with_sac

RADIUS_MM = 1.5  # of the parent vessel, R
VOXEL_MM = 0.5
FINE = 3  # sub-voxels along the edge of a voxel
HALF = 8.0  # R: half the length of every vessel; the crop of a candidate ends before
MARGIN_MM = 2.0  # of empty volume around the vessel
# No wall lies along the voxels.
_TURN = Rotation.from_euler("xyz", (20.0, 25.0, 15.0), degrees=True).as_matrix()


def uneven_fork(
    half_length: float, angle_deg: float = 35.0, daughters: tuple[float, float] = (0.9, 0.65)
) -> FormulaWall:
    """A parent of radius 1 along the first axis that divides at the origin into a wide and a narrow daughter.

    The daughters lie in the plane of the first two axes; their radii obey Murray's law, 1 = a^3 + b^3. phi
    has a kink where two vessels meet: made for masks, not for flows.
    """
    angle = np.deg2rad(angle_deg)
    ways = torch.tensor(
        [[-1, 0, 0], [np.cos(angle), np.sin(angle), 0], [np.cos(angle), -np.sin(angle), 0]],
        dtype=torch.float64,
    )
    radii = torch.tensor((1.0, *daughters), dtype=torch.float64)

    def phi(x: torch.Tensor) -> torch.Tensor:
        along = (x @ ways.T).clamp(min=0)[..., None]  # (..., 3, 1)
        square = (x[..., None, :] - along * ways).square().sum(-1)
        return (radii**2 - square).amax(-1)

    side = half_length * np.sin(angle) + 1
    return FormulaWall(phi, (-half_length, -side, -1.0), (half_length, side, 1.0))


@dataclass(frozen=True, eq=False)
class Shape:
    """A vessel by formula, and where on it the candidate lies; in R."""

    wall: FormulaWall
    candidate: tuple[float, float, float] = (0.0, 0.0, 0.0)


SHAPES = {
    "tube": Shape(tube(HALF)),
    "bend": Shape(bend(0.2, HALF)),
    "fork": Shape(uneven_fork(HALF)),
    "small_sac": Shape(tube_with_sac(HALF, sac_radius=0.8, distance=1.4), (0.0, 0.0, 1.4)),
    "sac": Shape(tube_with_sac(HALF, sac_radius=1.3, distance=2.04), (0.0, 0.0, 2.04)),
}


@dataclass(frozen=True, eq=False)
class Scanned:
    """A vessel on a grid of voxels."""

    grid: Grid
    depth_mm: np.ndarray  # (FINE d, FINE h, FINE w) of sub-voxels below the wall, negative outside
    candidate_mm: np.ndarray  # (3,) RAS

    def probability(self, grown_voxels: float = 0.0) -> np.ndarray:
        """(d, h, w) share of every voxel that is lumen, its wall moved outwards by so many voxels.

        The wall moves by what is asked to a tenth of a voxel.
        """
        return partial_volume(self.depth_mm > -grown_voxels * VOXEL_MM, FINE)


@cache
def scanned(name: str) -> Scanned:
    """A vessel of SHAPES, R = 1.5 mm, turned, in voxels of 0.5 mm."""
    shape = SHAPES[name]
    low, high = np.array(shape.wall.low), np.array(shape.wall.high)
    corners = np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1).T * RADIUS_MM @ _TURN.T
    first = corners.min(0) - MARGIN_MM
    size = np.ceil((corners.max(0) + MARGIN_MM - first) / VOXEL_MM).astype(int)[::-1]
    affine = np.eye(4)
    affine[:3, :3] = VOXEL_MM * np.fliplr(np.eye(3))  # (d, h, w) run along (z, y, x)
    affine[:3, 3] = first
    grid = Grid((int(size[0]), int(size[1]), int(size[2])), affine)
    fine = subdivided(grid, FINE)
    index = np.moveaxis(np.indices(fine.shape), 0, -1)
    at = fine.to_mm(index) @ _TURN / RADIUS_MM
    inside = ((at >= low) & (at <= high)).all(-1) & (shape.wall.interpolate(at) > 0)
    step = VOXEL_MM / FINE
    within, beyond = (np.asarray(ndimage.distance_transform_edt(part)) for part in (inside, ~inside))
    depth = within - beyond
    depth = (depth - 0.5 * np.sign(depth)) * step  # to the wall, which lies between two sub-voxels
    return Scanned(grid, depth.astype(np.float32), np.array(shape.candidate) * RADIUS_MM @ _TURN.T)
