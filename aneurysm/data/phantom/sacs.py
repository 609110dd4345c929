"""Saccular aneurysms: where they grow on an arterial tree and what shape they have."""

from dataclasses import dataclass

import numpy as np

from aneurysm.data.phantom.tree import (
    ANTERIOR,
    ANTERIOR_COMMUNICATING,
    BASILAR_TIP,
    INFRACLINOID,
    MIDDLE,
    OTHER_POSTERIOR,
    POSTERIOR_COMMUNICATING,
    SUPRACLINOID,
    ArterialTree,
    Segment,
)


@dataclass(frozen=True, eq=False)
class Site:
    """A place on an artery from which a sac can grow."""

    location: int  # index into labels.LOCATIONS
    artery: str  # name of the parent segment
    point_mm: np.ndarray  # (3,) on the centreline
    radius_mm: float  # of the parent lumen there
    outward: np.ndarray  # (3,) unit vector from the centreline through the neck


@dataclass(frozen=True, eq=False)
class Sac:
    """A dome on a neck: an uneven ellipsoid, a tapered stem into the parent lumen and perhaps a bleb."""

    location: int
    artery: str
    extent_mm: float  # largest width of the dome outside the parent lumen
    centre_mm: np.ndarray  # (3,) of the ellipsoid
    frame: np.ndarray  # (3, 3) rows: dome direction and two widths, unit vectors
    semiaxes_mm: np.ndarray  # (3,) along the rows of `frame`
    stem_mm: np.ndarray  # (2, 3) ends of the neck: in the parent lumen, in the dome
    stem_radii_mm: np.ndarray  # (2,)
    unevenness: np.ndarray  # (4, 4) rows: direction (3,), relative height of a bump or dent
    bleb: tuple[np.ndarray, float] | None  # centre (3,) and radius in mm

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance (...,) in mm of points (..., 3) in RAS mm, negative inside.

        First-order accurate at the wall: f / |grad f| of the implicit ellipsoid.
        """
        local = (points - self.centre_mm) @ self.frame.T
        scaled = local / self.semiaxes_mm
        level = np.linalg.norm(scaled, axis=-1)
        direction = scaled / np.maximum(level, 1e-6)[..., None]
        slope = np.linalg.norm(scaled / self.semiaxes_mm, axis=-1) / np.maximum(level, 1e-6)
        slope = np.clip(slope, 1 / self.semiaxes_mm.max(), None)
        bumps = sum(
            height * np.exp(4 * (direction @ axis - 1))
            for axis, height in zip(self.unevenness[:, :3], self.unevenness[:, 3], strict=True)
        )
        dome = (level / (1 + bumps) - 1) / slope
        start, end = self.stem_mm
        axis = end - start
        t = np.clip(((points - start) @ axis) / (axis @ axis), 0, 1)
        gap = np.linalg.norm(points - start - t[..., None] * axis, axis=-1)
        stem = gap - (self.stem_radii_mm[0] * (1 - t) + self.stem_radii_mm[1] * t)
        found = smooth_union(dome, stem, 0.5)
        if self.bleb is not None:
            centre, radius = self.bleb
            found = smooth_union(found, np.linalg.norm(points - centre, axis=-1) - radius, 0.4)
        return found

    @property
    def reach_mm(self) -> float:
        """Radius of a sphere around `centre_mm` that holds the whole sac."""
        ends = np.linalg.norm(self.stem_mm - self.centre_mm, axis=1) + self.stem_radii_mm
        bleb = 0.0
        if self.bleb is not None:
            bleb = float(np.linalg.norm(self.bleb[0] - self.centre_mm)) + self.bleb[1]
        uneven = 1 + np.abs(self.unevenness[:, 3]).sum()
        return float(max(self.semiaxes_mm.max() * uneven, ends.max(), bleb))


def smooth_union(a: np.ndarray, b: np.ndarray, radius_mm: float) -> np.ndarray:
    """Signed distance of the union with a fillet (polynomial smooth minimum)."""
    h = np.clip(0.5 + 0.5 * (b - a) / radius_mm, 0, 1)
    return b + (a - b) * h - radius_mm * h * (1 - h)


def sample_site(tree: ArterialTree, location: int, rng: np.random.Generator) -> Site | None:
    """Draw a typical site of that location, None when the patient lacks the artery."""
    for (left, right), draw in (
        (INFRACLINOID, _infraclinoid),
        (SUPRACLINOID, _supraclinoid),
        (MIDDLE, _middle),
        (ANTERIOR, _anterior),
        (POSTERIOR_COMMUNICATING, _posterior_communicating),
    ):
        if location in (left, right):
            return draw(tree, location, "right" if location == right else "left", rng)
    if location == ANTERIOR_COMMUNICATING:
        return _anterior_communicating(tree, rng)
    if location == BASILAR_TIP:
        return _apex(tree, "basilar tip", BASILAR_TIP, rng)
    return _other_posterior(tree, rng)


def sample_sac(site: Site, extent_mm: float, rng: np.random.Generator) -> Sac:
    """Draw the shape of a sac of a given largest extent (mm) on a site."""
    slender = rng.uniform(0.85, 1.4)  # height over width
    # The diagonal of an uneven dome on a neck is about a tenth longer than its axes.
    height = 0.9 * extent_mm * min(1.0, slender)
    widths = height / slender * np.array([1.0, rng.uniform(0.85, 1.0)])
    sunk = rng.uniform(0.08, 0.2)  # share of the ellipsoid that lies inside the parent lumen
    along = height / (1 - sunk) / 2
    tilt = site.outward + rng.normal(0, 0.12, 3)
    axis = tilt / np.linalg.norm(tilt)
    side = np.cross(axis, rng.normal(0, 1, 3))
    side /= np.linalg.norm(side)
    frame = np.stack([axis, side, np.cross(axis, side)])
    wall = site.point_mm + site.outward * site.radius_mm * 0.95
    centre = wall + axis * along * (1 - 2 * sunk)
    neck = max(0.6, rng.uniform(0.5, 0.75) * widths[0] / 2)
    bumps = rng.normal(0, 1, (4, 3))
    bumps /= np.linalg.norm(bumps, axis=1, keepdims=True)
    heights = np.clip(rng.normal(0, 0.05, (4, 1)), -0.1, 0.1)
    bleb = None
    if extent_mm > 4.5 and rng.random() < 0.3:
        ray = axis + 0.9 * rng.normal(0, 1, 3)
        ray /= np.linalg.norm(ray)
        scaled = (frame @ ray) / np.array([along, *widths / 2])
        radius = float(rng.uniform(0.28, 0.4) * widths[0] / 2)
        # Sunk to its equator, so that the extent of the sac grows little.
        bleb = (centre + ray * (1 / np.linalg.norm(scaled) - 0.6 * radius), radius)
    return Sac(
        location=site.location,
        artery=site.artery,
        extent_mm=float(extent_mm),
        centre_mm=centre,
        frame=frame,
        semiaxes_mm=np.array([along, *widths / 2]),
        # Begins off the centreline, so that it does not bulge the far wall of the parent.
        stem_mm=np.stack([site.point_mm + 0.6 * site.radius_mm * site.outward, wall + axis * 0.4 * along]),
        stem_radii_mm=np.array([min(neck, 0.75 * site.radius_mm), neck]),
        unevenness=np.concatenate([bumps, heights], axis=1),
        bleb=bleb,
    )


def overlap(sac: Sac, site: Site, tree: ArterialTree) -> float:
    """How deep (mm) the dome runs into arteries other than at its own neck; 0 when it is free."""
    keep_off = 1.3 * site.radius_mm + float(sac.stem_radii_mm[1]) + 1.2
    deepest = 0.0
    for segment in tree.segments:
        away = np.linalg.norm(segment.points - site.point_mm, axis=1) > keep_off
        if away.any():
            depth = segment.radii[away] - sac.distance(segment.points[away])
            deepest = max(deepest, float(depth.max()))
    return deepest


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _wall(segment: Segment, at: float, location: int, toward: np.ndarray, rng: np.random.Generator) -> Site:
    """A side-wall site at a share of the segment's length, on the outer curve or `toward` a direction."""
    index = int(np.clip(round(at * (len(segment.points) - 1)), 1, len(segment.points) - 2))
    tangent = segment.tangents[index]
    bend = segment.points[index - 1] + segment.points[index + 1] - 2 * segment.points[index]
    bend = -bend / (np.linalg.norm(bend) + 0.05)  # away from the centre of curvature
    outward = bend + toward + rng.normal(0, 0.3, 3)
    outward = _unit(outward - (outward @ tangent) * tangent)
    return Site(location, segment.name, segment.points[index], float(segment.radii[index]), outward)


def _apex(tree: ArterialTree, name: str, location: int, rng: np.random.Generator) -> Site | None:
    """The crotch of the bifurcation at the end of a segment, where its stream hits the wall."""
    segment = tree.find(name)
    if segment is None:
        return None
    ahead = _unit(segment.points[-1] - segment.points[max(-4, -len(segment.points))])
    outward = _unit(ahead + rng.normal(0, 0.22, 3))
    return Site(location, name, segment.points[-1], float(segment.radii[-1]), outward)


def _infraclinoid(tree: ArterialTree, location: int, side: str, rng: np.random.Generator) -> Site | None:
    segment = tree.find(f"{side} infraclinoid ICA")
    if segment is None:
        return None
    return _wall(segment, rng.uniform(0.68, 0.95), location, np.zeros(3), rng)


def _supraclinoid(tree: ArterialTree, location: int, side: str, rng: np.random.Generator) -> Site | None:
    if rng.random() < 0.25:  # the terminus
        return _apex(tree, f"{side} supraclinoid ICA", location, rng)
    segment = tree.find(f"{side} supraclinoid ICA")
    if segment is None:
        return None
    # Ophthalmic aneurysms point upwards, hypophyseal ones to the midline.
    medial = np.array([-0.8 if side == "right" else 0.8, 0, 0.2])
    toward = tree.rotation @ (np.array([0, 0.2, 1.0]) if rng.random() < 0.6 else medial)
    return _wall(segment, rng.uniform(0.1, 0.75), location, toward, rng)


def _middle(tree: ArterialTree, location: int, side: str, rng: np.random.Generator) -> Site | None:
    if rng.random() < 0.8:
        return _apex(tree, f"{side} M1", location, rng)
    segment = tree.find(f"{side} M1")
    return None if segment is None else _wall(segment, rng.uniform(0.25, 0.8), location, np.zeros(3), rng)


def _anterior(tree: ArterialTree, location: int, side: str, rng: np.random.Generator) -> Site | None:
    distal = rng.random() < 0.7  # most are pericallosal, where the artery turns round the genu
    segment = tree.find(f"{side} A2" if distal else f"{side} A1")
    if segment is None:
        return None
    at = rng.uniform(0.3, 0.7) if distal else rng.uniform(0.25, 0.7)
    toward = tree.rotation @ np.array([0, 0.8, 0.2] if distal else [0, -0.3, 0.6])
    return _wall(segment, at, location, toward, rng)


def _posterior_communicating(
    tree: ArterialTree, location: int, side: str, rng: np.random.Generator
) -> Site | None:
    branch, carotid = tree.find(f"{side} PCom"), tree.find(f"{side} supraclinoid ICA")
    if branch is None or carotid is None:
        return None
    index = int(np.argmin(np.linalg.norm(carotid.points - branch.points[0], axis=1)))
    lateral = tree.rotation @ np.array([0.7 if side == "right" else -0.7, -1.0, -0.3])
    tangent = carotid.tangents[index]
    outward = lateral + rng.normal(0, 0.2, 3)
    outward = _unit(outward - (outward @ tangent) * tangent)
    point = carotid.points[index] + 0.6 * tangent  # just distal to the branch
    return Site(location, branch.name, point, float(carotid.radii[index]), outward)


def _anterior_communicating(tree: ArterialTree, rng: np.random.Generator) -> Site | None:
    acom, left, right = tree.find("ACom"), tree.find("left A1"), tree.find("right A1")
    if acom is None or left is None or right is None:
        return None
    feeder = max((left, right), key=lambda a1: float(a1.radii[-1]))  # the jet of the larger A1 hits the wall
    ahead = _unit(feeder.points[-1] - feeder.points[-4])
    start = acom.points[np.argmin(np.linalg.norm(acom.points - feeder.points[-1], axis=1))]
    radius = max(float(acom.radii.mean()), 0.8 * float(feeder.radii[-1]))
    point = start + 0.25 * (acom.points[len(acom.points) // 2] - start)
    vertical = rng.choice([-0.7, 0.5, 0.9]) * (tree.rotation @ np.array([0, 0, 1.0]))
    outward = _unit(ahead + vertical + rng.normal(0, 0.25, 3))
    return Site(ANTERIOR_COMMUNICATING, "ACom", point, radius, outward)


def _other_posterior(tree: ArterialTree, rng: np.random.Generator) -> Site | None:
    side = ("left", "right")[rng.integers(2)]
    draw = rng.random()
    if draw < 0.3:  # origin of the superior cerebellar artery
        trunk, branch = tree.find("basilar tip"), tree.find(f"{side} SCA")
        if trunk is None or branch is None:
            return None
        return _wall(trunk, 0.5, OTHER_POSTERIOR, _unit(branch.points[3] - branch.points[0]), rng)
    names = {0.5: f"{side} P2", 0.65: f"{side} P1", 0.85: "basilar trunk", 1.0: f"{side} vertebral"}
    segment = tree.find(next(name for limit, name in names.items() if draw < limit))
    if segment is None:
        return None
    at = rng.uniform(0.55, 0.9) if "vertebral" in segment.name else rng.uniform(0.1, 0.6)
    return _wall(segment, at, OTHER_POSTERIOR, np.zeros(3), rng)
