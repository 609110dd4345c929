"""Cross-sections of a vessel, through which the same amount of blood must pass.

A section is a star of rays from the centre to the wall with Gauss-Legendre points on each ray: three points
per ray integrate a parabolic profile exactly, which 24 voxels of a slab do not.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import KDTree

from aneurysm.physics.lumen import Wall

RADIAL = 3  # Gauss points per ray
REACH = 1.5  # in local radii: a ray that meets no wall by then has left through a side branch or a sac
MARCH = 24  # samples along a ray in search of the wall


@dataclass(frozen=True, eq=False)
class Path:
    """A centreline in small steps; positions are (d, h, w) in mm from the middle of the crop."""

    arc_mm: Float[np.ndarray, "k"]
    position: Float[np.ndarray, "k 3"]
    tangent: Float[np.ndarray, "k 3"]  # unit, pointing along the path's order
    radius_mm: Float[np.ndarray, "k"]

    def reversed(self) -> "Path":
        """The same path, run the other way."""
        return Path(
            self.arc_mm[-1] - self.arc_mm[::-1],
            self.position[::-1].copy(),
            -self.tangent[::-1],
            self.radius_mm[::-1].copy(),
        )

    def stretch(self, first: int, last: int) -> "Path":
        """From point `first` up to, but without, point `last`."""
        own = slice(first, last)
        return Path(
            self.arc_mm[own] - self.arc_mm[first],
            self.position[own],
            self.tangent[own],
            self.radius_mm[own],
        )

    def nearest(self, points: Float[np.ndarray, "n 3"]) -> Int[np.ndarray, "n"]:
        """Index of the path point nearest to each point."""
        return np.asarray(KDTree(self.position).query(points)[1])

    def between_ends(self, points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, "n"]:
        """Whether a point lies beside the path and not beyond its first or last cross-section."""
        nearest = self.nearest(points)
        ahead = ((points - self.position[nearest]) * self.tangent[nearest]).sum(1)
        return ~(((nearest == 0) & (ahead < 0)) | ((nearest == len(self.arc_mm) - 1) & (ahead > 0)))


@dataclass(frozen=True, eq=False)
class Sections:
    """s cross-sections with m points each, in mm; an absent section has no weight and no tangent."""

    points: Float[np.ndarray, "s m 3"]
    weight_mm2: Float[np.ndarray, "s m"]
    tangent: Float[np.ndarray, "s 3"]  # unit normal, downstream


def resample_path(
    position: Float[np.ndarray, "m 3"],
    tangent: Float[np.ndarray, "m 3"],
    radius_mm: Float[np.ndarray, "m"],
    step_mm: float,
) -> Path | None:
    """Interpolates a centreline to a fixed step, or None when all its points coincide.

    Tangents get the sign of the path's order and unit length.
    """
    step = np.linalg.norm(np.diff(position, axis=0), axis=1)
    distinct = np.concatenate([[True], step > 1e-6])
    position, tangent, radius_mm = position[distinct], tangent[distinct], radius_mm[distinct]
    if len(position) < 2:
        return None
    chord = np.gradient(position, axis=0)
    tangent = np.where(((tangent * chord).sum(1) < 0)[:, None], -tangent, tangent)
    length = np.linalg.norm(tangent, axis=1, keepdims=True)
    tangent = np.where(length > 1e-6, tangent, chord) / np.where(
        length > 1e-6, length, np.linalg.norm(chord, axis=1, keepdims=True) + 1e-12
    )
    arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(position, axis=0), axis=1))])
    fine = np.linspace(0, arc[-1], max(2, int(np.ceil(arc[-1] / step_mm)) + 1))
    fine_tangent = np.stack([np.interp(fine, arc, tangent[:, i]) for i in range(3)], axis=1)
    fine_tangent /= np.linalg.norm(fine_tangent, axis=1, keepdims=True) + 1e-12
    fine_position = np.stack([np.interp(fine, arc, position[:, i]) for i in range(3)], axis=1)
    return Path(fine, fine_position, fine_tangent, np.interp(fine, arc, radius_mm))


def cross_sections(wall: Wall, path: Path, sections: int, points_per_section: int) -> Sections | None:
    """Cuts the vessel across at evenly spread places of the path, or None when fewer than 2 cuts succeed.

    Three times as many cuts as asked are tried. Cuts that are walled all around come first; a cut through
    the mouth of a sac or a side branch is open, and is used only where too few closed ones exist.

    Raises:
        ValueError: `points_per_section` is not a multiple of 3 or gives fewer than 4 rays.
    """
    rays = points_per_section // RADIAL
    if points_per_section % RADIAL or rays < 4:
        raise ValueError(
            f"points_per_section must be a multiple of {RADIAL} and at least {4 * RADIAL}, "
            f"got {points_per_section}."
        )
    along = np.linspace(0.08, 0.92, 3 * sections) * (len(path.arc_mm) - 1)
    at = np.unique(np.rint(along).astype(int))
    normal = path.tangent[at]
    centre, directions, distance, closed = cut_across(
        wall, path.position[at], normal, path.radius_mm[at], rays
    )

    open_inside = distance.min(1) > 0
    for usable in (open_inside & closed, open_inside):
        chosen = np.flatnonzero(usable)
        if len(chosen) >= 2:
            break
    else:
        return None
    chosen = chosen[np.unique(np.rint(np.linspace(0, len(chosen) - 1, sections)).astype(int))]

    position, weight = star_quadrature(centre[chosen], directions[chosen], distance[chosen])

    def fill(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.zeros((sections - len(chosen), *values.shape[1:]))])

    return Sections(fill(position), fill(weight), fill(normal[chosen]))


def cut_across(
    wall: Wall,
    centre: Float[np.ndarray, "k 3"],
    normal: Float[np.ndarray, "k 3"],
    radius_mm: Float[np.ndarray, "k"],
    rays: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Stars of rays across a vessel, from their centroid to the wall.

    Returns:
        Centroids (k, 3), unit directions (k, rays, 3), distances to the wall (k, rays) in mm, and whether
        every ray met it (k,).
    """
    reach = np.maximum(REACH * radius_mm, radius_mm + 2 * wall.step_mm)
    directions = _star(normal, rays)
    # A centreline of voxels can sit off the axis: centre the star once, then measure.
    distance, _ = _to_wall(wall, centre, directions, reach)
    area = (distance**2).sum(1)
    shift = (2 / 3 * distance**3)[..., None] * directions
    centre = centre + shift.sum(1) / np.where(area > 0, area, 1)[:, None]
    distance, closed = _to_wall(wall, centre, directions, reach)
    return centre, directions, distance, closed


def star_quadrature(
    centre: Float[np.ndarray, "k 3"],
    directions: Float[np.ndarray, "k rays 3"],
    distance: Float[np.ndarray, "k rays"],
) -> tuple[Float[np.ndarray, "k m 3"], Float[np.ndarray, "k m"]]:
    """Points and areas for integrals over stars, three on every ray: exact for parabolic profiles."""
    node, weight = np.polynomial.legendre.leggauss(RADIAL)
    node, weight = (node + 1) / 2, weight / 2  # on [0, 1]
    span = distance[..., None]
    position = centre[:, None, None] + (span * node)[..., None] * directions[:, :, None]
    area = 2 * np.pi / directions.shape[1] * span**2 * node * weight  # dA = r dr dtheta
    return position.reshape(len(centre), -1, 3), area.reshape(len(centre), -1)


def _star(normal: np.ndarray, rays: int) -> np.ndarray:
    """Unit directions (k, rays, 3) evenly around each normal (k, 3)."""
    helper = np.eye(3)[np.abs(normal).argmin(1)]
    first = np.cross(normal, helper)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(normal, first)
    angle = 2 * np.pi * (np.arange(rays) + 0.5) / rays
    return np.cos(angle)[:, None] * first[:, None] + np.sin(angle)[:, None] * second[:, None]


def _to_wall(
    wall: Wall, centre: np.ndarray, directions: np.ndarray, reach: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (k, rays) in mm from the centre to the wall, and whether all rays met it (k,)."""
    step = np.linspace(0, 1, MARCH + 1)
    length = reach[:, None, None] * step  # (k, 1, march)
    position = centre[:, None, None] + length[..., None] * directions[:, :, None]
    height = wall.interpolate(position)  # (k, rays, march)
    outside = height <= 0
    met = outside.any(-1)
    last = np.where(met, outside.argmax(-1), MARCH)  # first sample beyond the wall
    before = np.maximum(last - 1, 0)
    inner = np.take_along_axis(height, before[..., None], -1)[..., 0]
    outer = np.take_along_axis(height, last[..., None], -1)[..., 0]
    drop = np.where(met & (last > 0), inner - outer, 1.0)
    crossing = (before + np.where(met, inner / drop, 1.0)) / MARCH
    distance = np.where(last == 0, 0.0, crossing * reach[:, None])
    return distance, np.all(met, axis=-1)
