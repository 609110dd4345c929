"""The arteries of the circle of Willis as smooth centrelines with radii, different in every patient.

Coordinates are RAS mm (x right, y anterior, z superior) from the middle of the circle. Control points and
calibres follow the usual descriptions of the adult circle: internal carotid 4-5 mm wide, M1 2.8 mm, A1 2.2,
basilar 3.2, communicating arteries 1-1.6 mm, and its common variants (Krabbe-Hartkamp et al. 1998).
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

STEP_MM = 0.9  # between centreline points
# Radius at which side branches end: what is under 1 mm wide is neither resolved by a clinical scan nor
# annotated, and in voxels of 0.75 mm its mask is a row of dots. The communicating arteries may be thinner.
THINNEST_MM = 0.5

# Index into labels.LOCATIONS of the paired arteries, (left, right), and of the unpaired ones.
INFRACLINOID, SUPRACLINOID, MIDDLE, ANTERIOR, POSTERIOR_COMMUNICATING = (
    (0, 1),
    (2, 3),
    (4, 5),
    (7, 8),
    (9, 10),
)
ANTERIOR_COMMUNICATING, BASILAR_TIP, OTHER_POSTERIOR = 6, 11, 12

# Courses of the right side; the left is the mirror image. Each begins at the end of its parent.
_CAROTID = [
    (19, -14, -44), (18.5, -14, -34), (15.5, -9.5, -28), (11.8, -5.5, -23.5), (10, -4.2, -18),
    (9.5, -3, -13.5), (9, 2, -11.6), (8.8, 6.5, -11.2), (8.7, 9.6, -8.6), (9, 8.6, -5.2), (9.8, 3.8, -2.6),
    (11, 0.3, 0), (11.6, -0.6, 3.6),
]  # fmt: skip
_RING = (9.2, 7.2, -4.2)  # the distal dural ring ends the infraclinoid part
_M1 = [(15, 0.6, 4.6), (19.5, 1.8, 4.2), (24, 1.2, 2.8)]
_M2_UPPER = [(26.5, -0.5, 6), (28.5, -4, 12), (30.5, -9, 19), (32, -15, 27), (34, -22, 36)]
_M2_LOWER = [(26.8, -2, 1.2), (29, -8, 3.5), (30.5, -15, 8), (32.5, -23, 14), (35, -33, 20)]
_A1 = [(8.5, 3.2, 4.6), (5, 7.6, 4.2), (2.2, 11, 4.0)]
_A2 = [(1.7, 14, 8), (1.6, 17.5, 15), (1.6, 18, 23), (1.7, 13, 31), (1.7, 4, 37)]
_P2 = [(13.5, -20, 0.6), (17, -26, 2.8), (16.5, -33, 6), (14, -40, 9)]
_CEREBELLAR = [(5, -15, -6.2), (11.5, -19, -6.5), (16, -26, -4.5), (15, -35, -2)]
_BASILAR = [(0, -12.8, -27), (0, -11.8, -20), (0, -12, -11), (0, -14, -3)]
_VERTEBRAL = [(3, -13.2, -30.5), (6, -16, -36), (9, -20, -43)]


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of artery with one name."""

    name: str
    location: int  # index into labels.LOCATIONS
    points: np.ndarray  # (n, 3) RAS mm, in the direction of flow
    radii: np.ndarray  # (n,) mm

    def __post_init__(self) -> None:
        if len(self.points) < 2 or len(self.points) != len(self.radii) or (self.radii <= 0).any():
            raise ValueError(
                f"{self.name}: a segment has at least two points, each with a radius above zero."
            )

    @property
    def tangents(self) -> np.ndarray:
        """(n, 3) unit vectors along the flow."""
        slope = np.gradient(self.points, axis=0)
        return slope / np.linalg.norm(slope, axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class ArterialTree:
    """All segments of a patient and the pose of the head."""

    segments: tuple[Segment, ...]
    centre_mm: np.ndarray  # (3,) where the middle of the circle lies
    rotation: np.ndarray  # (3, 3) from the upright head to the patient's
    scale: float  # 1 = adult mean

    def find(self, name: str) -> Segment | None:
        """The segment of that name, None when this patient lacks it."""
        return next((segment for segment in self.segments if segment.name == name), None)


def sample_tree(rng: np.random.Generator, tortuosity: float = 1.0) -> ArterialTree:
    """Draw the arteries of one patient.

    Args:
        tortuosity: 1 for middle age; multiplies the waviness of every course.
    """
    segments: list[Segment] = []
    ends: list[tuple[np.ndarray, float]] = []  # (A1-A2 junction, A2 radius), left then right

    basilar = _course(_BASILAR, rng, 0.5, tortuosity)
    width = rng.normal(1.6, 0.15)
    basilar_radii = _taper(basilar, width * 1.05, width, rng)
    trunk, top = _cut(basilar, basilar_radii, _length(basilar) - rng.uniform(6, 8))
    segments.append(Segment("basilar trunk", OTHER_POSTERIOR, *trunk))
    segments.append(Segment("basilar tip", BASILAR_TIP, *top))

    dominant = rng.integers(2)
    for side in (0, 1):  # left, right
        mirror = np.array([1.0 if side else -1.0, 1, 1])
        prefix = ("left", "right")[side]
        terminus, supra, ica_radius = _carotid(segments, side, prefix, mirror, rng, tortuosity)

        m1 = _course([terminus, *_M1 * mirror], rng, 0.8, tortuosity)
        m1_radius = ica_radius * rng.normal(0.74, 0.05)
        segments.append(
            Segment(f"{prefix} M1", MIDDLE[side], m1, _taper(m1, m1_radius * 1.05, m1_radius, rng))
        )
        for name, course, share in (("upper M2", _M2_UPPER, 0.8), ("lower M2", _M2_LOWER, 0.74)):
            m2 = _course([m1[-1], *course * mirror], rng, 1.2, tortuosity)
            radii = _taper(m2, m1_radius * share, m1_radius * share * 0.6, rng)
            segments.append(Segment(f"{prefix} {name}", MIDDLE[side], m2, radii))
            segments.extend(_twigs(segments[-1], rng, tortuosity))

        hypoplastic = side != dominant and rng.random() < 0.2
        a1 = _course([terminus, *_A1 * mirror], rng, 0.5, tortuosity)
        a2_radius = max(rng.normal(1.02, 0.1), 0.75)
        a1_radius = rng.uniform(0.5, 0.7) if hypoplastic else a2_radius * rng.normal(1.08, 0.05)
        segments.append(Segment(f"{prefix} A1", ANTERIOR[side], a1, _taper(a1, a1_radius, a1_radius, rng)))
        a2 = _course([a1[-1], *_A2 * mirror], rng, 0.35, tortuosity * 0.7)
        a2_radii = _taper(a2, a2_radius, a2_radius * 0.7, rng)
        segments.append(Segment(f"{prefix} A2", ANTERIOR[side], a2, a2_radii))
        segments.extend(_twigs(segments[-1], rng, tortuosity))
        ends.append((a1[-1], a2_radius))

        _posterior(segments, side, prefix, mirror, supra, top[0][-1], trunk, top, rng, tortuosity)
        vertebral = _course([basilar[0], *_VERTEBRAL * mirror], rng, 0.8, tortuosity)[::-1]
        share = rng.normal(0.98, 0.06) if side == dominant else rng.uniform(0.45, 0.95)
        radii = _taper(vertebral, width * share, width * share, rng)
        segments.append(Segment(f"{prefix} vertebral", OTHER_POSTERIOR, vertebral, radii))

    if rng.random() > 0.07:  # otherwise there is no anterior communicating artery
        (left, _), (right, _) = ends
        middle = (left + right) / 2 + (0, rng.normal(0.5, 0.4), rng.normal(0, 0.4))
        acom = _spline(np.array([left, middle, right]))
        radius = rng.uniform(0.5, 0.85)
        segments.append(Segment("ACom", ANTERIOR_COMMUNICATING, acom, _taper(acom, radius, radius, rng)))
    return _posed(segments, rng)


def _carotid(
    segments: list[Segment], side: int, prefix: str, mirror: np.ndarray, rng: np.random.Generator, wave: float
) -> tuple[np.ndarray, Segment, float]:
    """Add an internal carotid artery; returns its end, its supraclinoid part and the radius at the end."""
    path = _course(_CAROTID * mirror, rng, 0.7, 0.5 * wave)
    radius = np.clip(rng.normal(1.95, 0.15), 1.6, 2.4)
    radii = _taper(path, radius * 1.2, radius, rng)
    arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    # The siphon bends back on itself, so only points above the horizontal cavernous part may be the ring.
    upper = np.flatnonzero(arc > 0.6 * arc[-1])
    ring = upper[np.argmin(np.linalg.norm(path[upper] - _RING * mirror, axis=1))]
    below, above = _cut(path, radii, float(arc[ring]))
    segments.append(Segment(f"{prefix} infraclinoid ICA", INFRACLINOID[side], *below))
    supra = Segment(f"{prefix} supraclinoid ICA", SUPRACLINOID[side], *above)
    segments.append(supra)
    return path[-1], supra, float(radii[-1])


def _posterior(
    segments: list[Segment],
    side: int,
    prefix: str,
    mirror: np.ndarray,
    supra: Segment,
    tip: np.ndarray,
    trunk: tuple[np.ndarray, np.ndarray],
    top: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    wave: float,
) -> None:
    """Add the posterior cerebral, posterior communicating and cerebellar arteries of a side."""
    kind = rng.choice(["absent", "hypoplastic", "usual", "fetal"], p=[0.18, 0.22, 0.48, 0.12])
    p2_radius = max(rng.normal(1.0, 0.09), 0.75)
    p1_radius = p2_radius * (rng.uniform(0.45, 0.65) if kind == "fetal" else rng.normal(1.05, 0.05))
    joint = np.array((8.5, -15.8, -1.2)) * mirror + rng.normal(0, 0.5, 3)
    p1 = _course([tip, np.array((4, -14.2, -1.6)) * mirror, joint], rng, 0.4, wave)
    radii = _taper(p1, p1_radius, p1_radius, rng)
    first, rest = _cut(p1, radii, 2.7)
    segments.append(Segment(f"{prefix} P1 origin", BASILAR_TIP, *first))
    segments.append(Segment(f"{prefix} P1", OTHER_POSTERIOR, *rest))
    joint = p1[-1]
    p2 = _course([joint, *_P2 * mirror], rng, 0.9, wave)
    segments.append(Segment(f"{prefix} P2", OTHER_POSTERIOR, p2, _taper(p2, p2_radius, p2_radius * 0.7, rng)))
    segments.extend(_twigs(segments[-1], rng, wave))
    if kind != "absent":
        origin = supra.points[int(len(supra.points) * rng.uniform(0.4, 0.55))]
        radius = {"hypoplastic": (0.38, 0.5), "usual": (0.55, 0.85), "fetal": (0.95, 1.15)}[kind]
        between = [np.array((10.2, -5, -1.6)) * mirror, np.array((9.2, -11, -2)) * mirror]
        pcom = _course([origin, *between, joint], rng, 0.5, wave, hold_end=True)
        width = rng.uniform(*radius)
        radii = _taper(pcom, width, width, rng)
        if rng.random() < 0.25:  # infundibulum: a funnel-shaped origin that is no aneurysm
            arc = np.linalg.norm(pcom - origin, axis=1) - 1.6
            radii = radii + (1.1 - min(width, 0.8)) * np.exp(-((np.clip(arc, 0, None) / 1.4) ** 2))
        segments.append(Segment(f"{prefix} PCom", POSTERIOR_COMMUNICATING[side], pcom, radii))
    above = top[0][len(top[0]) // 2]
    sca = _course([above, *_CEREBELLAR * mirror], rng, 0.8, wave)
    segments.append(Segment(f"{prefix} SCA", OTHER_POSTERIOR, sca, _taper(sca, 0.72, THINNEST_MM, rng)))
    if rng.random() < 0.7:
        start = trunk[0][len(trunk[0]) // 3]
        aica = _course(
            [start, *np.array([(6, -15, -22), (13, -18, -21), (20, -22, -18)]) * mirror], rng, 1, wave
        )
        segments.append(Segment(f"{prefix} AICA", OTHER_POSTERIOR, aica, _taper(aica, 0.6, THINNEST_MM, rng)))


def _twigs(parent: Segment, rng: np.random.Generator, wave: float) -> list[Segment]:
    """Two side branches of a distal artery."""
    found = []
    for number, at in enumerate(rng.uniform((0.35, 0.6), (0.55, 0.85))):
        index = int(at * len(parent.points))
        outward = rng.normal(0, 1, 3)
        outward /= np.linalg.norm(outward)
        heading = parent.tangents[index] * 0.8 + outward
        reach = rng.uniform(9, 16) * heading / np.linalg.norm(heading)
        start = parent.points[index]
        path = _course([start, start + 0.45 * reach, start + reach + rng.normal(0, 1.5, 3)], rng, 0.7, wave)
        radius = max(float(parent.radii[index]) * rng.uniform(0.6, 0.75), 1.1 * THINNEST_MM)
        radii = _taper(path, radius, max(THINNEST_MM, 0.6 * radius), rng)
        found.append(Segment(f"{parent.name} branch {number + 1}", parent.location, path, radii))
    return found


def _posed(segments: list[Segment], rng: np.random.Generator) -> ArterialTree:
    """Tilt, scale and shift the whole head."""
    scale = float(np.clip(rng.normal(1.0, 0.04), 0.9, 1.1))
    angles = np.clip(rng.normal(0, 4, 3), -9, 9)
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    centre = rng.uniform(-1, 1, 3) * (0.8, 1.5, 1.5)
    posed = tuple(
        Segment(s.name, s.location, s.points @ rotation.T * scale + centre, s.radii * scale) for s in segments
    )
    return ArterialTree(posed, centre, rotation, scale)


def _course(
    control: np.ndarray | list,
    rng: np.random.Generator,
    jitter_mm: float,
    wave: float,
    hold_end: bool = False,
) -> np.ndarray:
    """A wavy line (n, 3) through control points; the first stays, the others move by about `jitter_mm`."""
    points = np.array(control, np.float64)
    free = slice(1, -1 if hold_end else None)
    shift = rng.normal(0, jitter_mm, points[free].shape)
    points[free] += np.clip(shift, -2 * jitter_mm, 2 * jitter_mm)
    path = _spline(points)
    along = np.linspace(0, 1, len(path))[:, None]
    length = _length(path)
    for wavelength in (7.0, 13.0):
        amplitude = rng.normal(0, 0.028 * wavelength * wave, 3)
        phase = rng.uniform(0, 2 * np.pi, 3)
        # The waves fade at both ends, where the line joins others.
        path = path + amplitude * np.sin(2 * np.pi * along * length / wavelength + phase) * np.sin(
            np.pi * along
        )
    return path


def _spline(points: np.ndarray) -> np.ndarray:
    """Cubic spline by chord length, resampled at about STEP_MM."""
    chord = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    count = max(int(np.ceil(chord[-1] / STEP_MM)) + 1, 4)
    return CubicSpline(chord, points, axis=0, bc_type="natural")(np.linspace(0, chord[-1], count))


def _taper(path: np.ndarray, start: float, end: float, rng: np.random.Generator) -> np.ndarray:
    """Radii (n,) in mm from start to end with a slight unevenness of the wall."""
    along = np.linspace(0, 1, len(path))
    uneven = 0.03 * np.sin(2 * np.pi * (along * _length(path) / rng.uniform(6, 12) + rng.random()))
    return (start + (end - start) * along) * (1 + uneven)


def _length(path: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())


def _cut(
    path: np.ndarray, radii: np.ndarray, at_mm: float
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Split a line at an arc length; both parts keep the point of the cut."""
    arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    index = int(np.clip(np.searchsorted(arc, at_mm), 1, len(path) - 2))
    return (path[: index + 1], radii[: index + 1]), (path[index:], radii[index:])
