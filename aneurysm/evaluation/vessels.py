"""How good a lumen mask is: overlap, connection, distance, thin vessels, and whether it holds the aneurysms.

Definitions, each of one scan; what has no value there is NaN, and means leave it out:

- recall, precision, Dice: of voxels. Truth is lumen with sacs.
- clDice: Shit et al., CVPR 2021, on centrelines from `vessels.skeleton`.
- Betti errors: |b_predicted - b_true| of the number of 26-connected pieces (Betti-0) and of independent rings
  (Betti-1, from the Euler number: b1 = b0 + b2 - chi, with b2 the enclosed cavities).
- HD95: the larger of the two 95th percentiles of the distances from the surface voxels of one mask to the
  nearest of the other, mm.
- recall by radius: of true voxels outside sacs, by the vessel radius at the nearest centreline voxel: its
  depth less half a voxel, since depth is measured to the middle of the first voxel outside.
- an aneurysm is in the mask when the voxel of its centre is (`centre`), or when at least half of its voxels
  are (`half`); its voxels are those of the sac mask, else those within its radius, or within 2.5 mm of a
  point.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree
from skimage import measure

from aneurysm.data.scan import Grid, Lesion
from aneurysm.evaluation.segmentation import centreline_dice, overlap
from aneurysm.vessels.skeleton import inside_distance, skeletonise
from aneurysm.vessels.voxels import bounding_box

RADIUS_BINS = (  # vessel radius in mm: from, below, column
    (0.0, 0.75, "recall_below_0_75mm"),
    (0.75, 1.25, "recall_0_75_to_1_25mm"),
    (1.25, 2.0, "recall_1_25_to_2mm"),
    (2.0, np.inf, "recall_from_2mm"),
)
POINT_RADIUS_MM = 2.5  # of an aneurysm known by a point


@dataclass(frozen=True)
class VesselFigures:
    """Figures of one scan, as defined above."""

    recall: float
    precision: float
    dice: float
    cldice: float
    betti0_error: float
    betti1_error: float
    hd95_mm: float
    recall_by_radius: dict[str, float]  # by the columns of RADIUS_BINS
    aneurysms: int  # with a known place inside the scan
    aneurysms_centre: int  # of them, with the centre in the mask
    aneurysms_half: int  # of them, with at least half of the sac in the mask

    def row(self) -> dict[str, float]:
        """One flat row of a table."""
        plain = {name: value for name, value in vars(self).items() if name != "recall_by_radius"}
        return {**plain, **self.recall_by_radius}


def vessel_figures(
    predicted: np.ndarray,
    truth: np.ndarray | None,
    grid: Grid,
    lesions: Sequence[Lesion] = (),
    sacs: np.ndarray | None = None,
) -> VesselFigures:
    """Measure a lumen mask against what is known of the scan.

    Args:
        predicted: (d, h, w), non-zero is lumen.
        truth: (d, h, w), non-zero is lumen including sacs; None where vessels are not annotated, then only
            the aneurysms are counted.
        grid: of both.
        lesions: known aneurysms.
        sacs: (d, h, w), k inside lesion k (1, 2, ...), where the sacs were drawn.

    Raises:
        ValueError: a mask does not lie on the grid.
    """
    for name, mask in (("prediction", predicted), ("truth", truth), ("sac mask", sacs)):
        if mask is not None and mask.shape != grid.shape:
            raise ValueError(f"The {name} {mask.shape} does not lie on the grid {grid.shape}.")
    found = np.asarray(predicted) != 0
    count, centre, half = aneurysms_inside(found, grid, lesions, sacs)
    unknown = float("nan")
    if truth is None:
        nothing = {column: unknown for *_, column in RADIUS_BINS}
        return VesselFigures(
            unknown, unknown, unknown, unknown, unknown, unknown, unknown, nothing, count, centre, half
        )
    true = np.asarray(truth) != 0
    shares = overlap(found, true)
    if (found | true).any():  # everything below needs only the part with vessels
        box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in bounding_box(found | true))
        found, true = found[box], true[box]
        sac = np.zeros_like(true) if sacs is None else sacs[box] > 0
    else:
        sac = np.zeros_like(true)
    true_depth = inside_distance(true, grid.spacing)
    step = float(grid.spacing.min())
    true_line = skeletonise(true, true_depth, step)
    found_line = skeletonise(found, inside_distance(found, grid.spacing), step)
    b_found, b_true = betti_numbers(found), betti_numbers(true)
    return VesselFigures(
        recall=shares.recall,
        precision=shares.precision,
        dice=shares.dice,
        cldice=centreline_dice(found, true, found_line, true_line),
        betti0_error=float(abs(b_found[0] - b_true[0])),
        betti1_error=float(abs(b_found[1] - b_true[1])),
        hd95_mm=hausdorff_95(found, true, grid.spacing),
        recall_by_radius=_recall_by_radius(found, true & ~sac, true_line, true_depth, grid.spacing),
        aneurysms=count,
        aneurysms_centre=centre,
        aneurysms_half=half,
    )


def betti_numbers(mask: np.ndarray) -> tuple[int, int, int]:
    """Pieces (26-connected), rings and cavities of a mask (d, h, w); outside the volume is background."""
    if not mask.any():
        return 0, 0, 0
    padded = np.pad(mask[bounding_box(mask)], 1)
    pieces = int(np.asarray(measure.label(padded, connectivity=3)).max())
    cavities = int(np.asarray(measure.label(~padded, connectivity=1)).max()) - 1
    return pieces, pieces + cavities - int(measure.euler_number(padded, connectivity=3)), cavities


def hausdorff_95(first: np.ndarray, second: np.ndarray, spacing: np.ndarray) -> float:
    """Symmetric 95th percentile of surface distances in mm; NaN when a mask is empty."""
    if not first.any() or not second.any():
        return float("nan")
    surfaces = [
        np.argwhere(mask & ~np.asarray(ndimage.binary_erosion(mask), bool)) * spacing
        for mask in (first, second)
    ]
    there, _ = KDTree(surfaces[1]).query(surfaces[0])
    back, _ = KDTree(surfaces[0]).query(surfaces[1])
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _recall_by_radius(
    found: np.ndarray, vessel: np.ndarray, line: np.ndarray, depth: np.ndarray, spacing: np.ndarray
) -> dict[str, float]:
    middle, voxels = np.argwhere(line), np.argwhere(vessel)
    if not len(middle) or not len(voxels):
        return {column: float("nan") for *_, column in RADIUS_BINS}
    _, nearest = KDTree(middle * spacing).query(voxels * spacing)
    radius = depth[line][nearest] - float(np.mean(spacing)) / 2
    hit = found[vessel]
    shares = {}
    for low, high, column in RADIUS_BINS:
        inside = (radius >= low) & (radius < high)
        shares[column] = float(hit[inside].mean()) if inside.any() else float("nan")
    return shares


def aneurysms_inside(
    found: np.ndarray, grid: Grid, lesions: Sequence[Lesion], sacs: np.ndarray | None
) -> tuple[int, int, int]:
    """Aneurysms, those whose centre voxel is in the mask, those with half of their voxels in it."""
    count = centre = half = 0
    for number, lesion in enumerate(lesions, start=1):
        index = np.rint(grid.to_index(lesion.centre_mm)).astype(int)
        if ((index < 0) | (index >= grid.shape)).any():
            continue
        count += 1
        centre += bool(found[tuple(index)])
        own = np.zeros(0, bool) if sacs is None else found[sacs == number]
        if not len(own):
            own = found[_ball(grid, lesion)]
        half += bool(own.mean() >= 0.5) if len(own) else bool(found[tuple(index)])
    return count, centre, half


def _ball(grid: Grid, lesion: Lesion) -> tuple[np.ndarray, ...]:
    radius = lesion.radius_mm or POINT_RADIUS_MM
    middle = grid.to_index(lesion.centre_mm)
    reach = radius / grid.spacing
    low = np.maximum(np.ceil(middle - reach), 0).astype(int)
    high = np.minimum(np.floor(middle + reach) + 1, grid.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    near = np.moveaxis(np.mgrid[box], 0, -1).reshape(-1, 3)
    inside = np.linalg.norm(grid.to_mm(near) - lesion.centre_mm, axis=1) <= radius
    return tuple(near[inside].T)
