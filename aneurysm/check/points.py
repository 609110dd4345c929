"""Localizers against the images that they name: does the point exist, and does it lie on something?"""

from pathlib import Path
from typing import Final

import numpy as np
from scipy.spatial import KDTree

from aneurysm.check.findings import Collector
from aneurysm.check.intensities import Levels
from aneurysm.data.dicom.headers import Header
from aneurysm.data.dicom.slices import SliceIndex
from aneurysm.data.errors import ReadError
from aneurysm.data.labels import LOCATIONS, VESSEL_LABEL
from aneurysm.data.scan import Grid
from aneurysm.data.sources.lesions import MATCH_MM
from aneurysm.data.sources.rsna_tables import parse_coordinates

_BALL_MM: Final = 4.0  # around a point on a vessel there is tissue, whatever the flow void in the middle
# Sacs reach 25 mm, their centre 12 mm from the parent artery; masks stop a few mm along small arteries.
FAR_FROM_VESSEL_MM: Final = 15.0


def place_points(
    points: tuple[dict[str, str], ...], headers: dict[Path, Header], index: SliceIndex, found: Collector
) -> list[tuple[str, np.ndarray]]:
    """(location name, RAS mm) of the points that can be placed; why not, for the others."""
    # As the reader calls them: a file without this tag goes by its name.
    images = {h.text("SOPInstanceUID") or h.path.stem: h for h in headers.values()}
    placed = []
    for point in points:
        sop, text = point.get("SOPInstanceUID", ""), point.get("coordinates", "")
        try:
            x, y, frame = parse_coordinates(text)
        except ReadError:
            found.add("localizer-unparsable", f"coordinates are {text!r}.")
            continue
        header = images.get(sop)
        if header is None:
            found.add("localizer-unknown-image", f"{sop} is not among the {len(images)} images.")
            continue
        try:
            frames = header.integer("NumberOfFrames", 1)
            rows, columns = header.integer("Rows"), header.integer("Columns")
        except ReadError as error:
            found.add("localizer-unknown-image", str(error))
            continue
        if frames > 1 and (frame is None or not 0 <= frame < frames):
            found.add("localizer-no-frame", f"Frame {frame} of an image with {frames} frames ({text}).")
            continue
        if not (-0.5 <= x <= columns - 0.5 and -0.5 <= y <= rows - 0.5):
            text = f"Column {x:g}, row {y:g} of an image with {columns} columns and {rows} rows."
            found.add("localizer-outside", text)
            continue
        try:
            placed.append((point.get("location", ""), index.to_mm(sop, x, y, frame)))
        except ReadError as error:
            found.add("localizer-unknown-image", str(error))
    return placed


def check_point_in_air(
    location: str,
    mm: np.ndarray,
    volume: np.ndarray,
    grid: Grid,
    levels: Levels,
    modality: str,
    found: Collector,
) -> None:
    """Whether there is any tissue within some mm of a point."""
    centre, reach = grid.to_index(mm), _BALL_MM / grid.spacing
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, volume.shape).astype(int)
    around = volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    limit = levels.air_below(modality)
    if around.size and float(around.max()) < limit:
        values = f"The largest value within {_BALL_MM:g} mm is {around.max():.4g}"
        found.add("localizer-in-air", f"'{location}': {values}; air is below {limit:.4g}.")


def check_point_on_aneurysm(
    location: str, mm: np.ndarray, aneurysm: np.ndarray, grid: Grid, found: Collector
) -> None:
    """Distance of a point to the nearest lesion voxel."""
    marked = np.argwhere(aneurysm)
    if not len(marked):
        return
    distance = float(np.linalg.norm(grid.to_mm(marked) - mm, axis=1).min())
    if distance > MATCH_MM:
        found.add(
            "localizer-far-from-aneurysm",
            f"'{location}' lies {distance:.1f} mm from the nearest lesion voxel.",
        )


def check_point_on_vessel(
    location: str, mm: np.ndarray, vessel: np.ndarray, grid: Grid, found: Collector
) -> None:
    """Distance of a point to the artery of its name, when the mask has that artery."""
    # "Other" arteries reach beyond what masks of the circle of Willis show.
    if location not in LOCATIONS or location.startswith("Other"):
        return
    own = np.argwhere(vessel == VESSEL_LABEL[LOCATIONS.index(location)])
    if not len(own):
        return
    distance = float(KDTree(grid.to_mm(own)).query(mm)[0])
    if distance > FAR_FROM_VESSEL_MM:
        found.add(
            "localizer-far-from-vessel", f"'{location}' lies {distance:.1f} mm from that artery in the mask."
        )
