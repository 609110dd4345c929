"""Annotated aneurysms from masks and points, and which belong together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from aneurysm.data.labels import LOCATIONS
from aneurysm.data.scan import Grid, Lesion

MATCH_MM = 5.0  # a point belongs to a mask's lesion up to this far outside the lesion's sphere
SAME_POINT_MM = 0.5  # two points nearer than a pixel are one click


def measure_lesions(aneurysm: np.ndarray | None, grid: Grid) -> list[Lesion]:
    """Centroid (RAS mm) and radius of the sphere of equal volume (mm) of every id in a lesion mask."""
    lesions = []
    for k in np.unique(aneurysm[aneurysm > 0]) if aneurysm is not None else ():
        voxels = np.argwhere(aneurysm == k)
        radius = (3 * len(voxels) * grid.voxel_mm3 / (4 * np.pi)) ** (1 / 3)
        lesions.append(Lesion(grid.to_mm(voxels.mean(axis=0)), float(radius)))
    return lesions


def match_lesions(measured: list[Lesion], points: list[Lesion]) -> list[Lesion]:
    """Give measured lesions the locations of their points, one to one and nearest first.

    A point that lies more than `MATCH_MM` outside every measured lesion stays as a lesion of its own.
    """
    if not measured or not points:
        return measured or points
    distance = np.array([[np.linalg.norm(m.centre_mm - p.centre_mm) for p in points] for m in measured])
    reach = np.array([(m.radius_mm or 0) + MATCH_MM for m in measured])[:, None]
    rows, columns = linear_sum_assignment(np.where(distance <= reach, distance, 1e6))
    matched = {m: p for m, p in zip(rows, columns, strict=True) if distance[m, p] <= reach[m, 0]}
    lesions = [
        replace(lesion, location=points[matched[m]].location) if m in matched else lesion
        for m, lesion in enumerate(measured)
    ]
    return lesions + [point for p, point in enumerate(points) if p not in matched.values()]


def merge_points(points: Sequence[Lesion], locations: np.ndarray, notes: list[str]) -> list[Lesion]:
    """Points at one place are one aneurysm, whatever number of locations they name.

    Of several locations the one that the series' labels confirm counts; when they confirm none or more than
    one, the location is unknown. `notes` gets a sentence for every such point.

    Args:
        locations: (13,) 0, 1 or NaN, the labels of the series.
    """
    merged: list[Lesion] = []
    named: list[list[int]] = []
    for point in points:
        distance = [float(np.linalg.norm(point.centre_mm - m.centre_mm)) for m in merged]
        here = [point.location] if point.location is not None else []
        if distance and min(distance) < SAME_POINT_MM:
            named[int(np.argmin(distance))] += here
        else:
            merged.append(point)
            named.append(here)
    lesions = []
    for point, places in zip(merged, named, strict=True):
        distinct = sorted(set(places))
        if len(distinct) > 1:
            confirmed = [place for place in distinct if locations[place] == 1]
            location = confirmed[0] if len(confirmed) == 1 else None
            names = " and ".join(LOCATIONS[place] for place in distinct)
            taken = LOCATIONS[location] if location is not None else "its location is unknown"
            notes.append(f"one point is given as {names}: one aneurysm, {taken}")
            point = replace(point, location=location)
        elif distinct:
            point = replace(point, location=distinct[0])
        lesions.append(point)
    return lesions
