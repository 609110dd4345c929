"""Graded errors of a lumen mask, each a function of its seed alone.

erode, dilate: surface layers taken off or put on, the likeliest error first: a surface voxel of low
    probability goes early, a voxel outside of high probability comes early. 0.5 is half of the first layer's
    voxels, 2 are two whole layers.
drop: whole branches between junctions and ends, chosen at random, as a share of the centreline's length.
blobs: balls of 1.5 to 3 mm radius at random places at least 4 mm from the mask, as number per scan.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid
from aneurysm.stages.volumes import ball_voxels
from aneurysm.vessels.graph import build_graph

GRADES: dict[str, tuple[float, ...]] = {
    "erode": (0.25, 0.5, 0.75, 1.0, 2.0),
    "drop": (0.05, 0.1, 0.2, 0.4),
    "dilate": (0.25, 0.5, 1.0, 2.0),
    "blobs": (5, 10, 20, 40),
}
UNITS = {
    "none": "",
    "erode": "surface layers taken off",
    "drop": "share of the vessel length taken out",
    "dilate": "surface layers put on",
    "blobs": "balls of 1.5 to 3 mm added per scan",
}
_BLOB_MM = (1.5, 3.0)  # radius
_AWAY_MM = 4.0  # from the middle of a blob to the mask
_AROUND_MM = 10.0  # blobs lie in the bounding box of the mask with this margin


@dataclass(frozen=True)
class MaskError:
    """One kind of error and how much of it; "none" leaves masks as they are."""

    kind: str
    level: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in UNITS:
            raise ValueError(f"There is no mask error {self.kind!r}; there are {', '.join(UNITS)}.")
        if self.level < 0 or (self.kind == "drop" and self.level > 1):
            raise ValueError(f"{self.level} is no amount of {self.kind}.")

    def __call__(
        self, mask: np.ndarray, probability: np.ndarray, grid: Grid, name: str, seed: int = 0
    ) -> np.ndarray:
        """The mask (d, h, w) bool with this error.

        Args:
            probability: (d, h, w) of lumen; says which surface voxels are the likeliest errors.
            grid: of both.
            name: of the scan, so that every scan has its own errors, whatever the order.
        """
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(self.kind.encode())])
        if self.kind == "none" or self.level == 0 or not mask.any():
            return mask.copy()
        if self.kind == "erode":
            return _peeled(mask, probability, self.level)
        if self.kind == "dilate":
            return ~_peeled(~mask, -probability, self.level)
        if self.kind == "drop":
            return _without_branches(mask, grid, self.level, rng)
        return _with_blobs(mask, grid, round(self.level), rng)


def altered(probability: np.ndarray, before: np.ndarray, after: np.ndarray, threshold: float) -> np.ndarray:
    """The probability volume a network would have given that made this mask: 0 where lumen was taken out,
    halfway between the threshold and certainty where some was put in."""
    changed = np.where(before & ~after, np.float32(0), probability)
    sure = np.float32((1 + threshold) / 2)
    return np.where(after & ~before, np.maximum(changed, sure), changed)


def _peeled(mask: np.ndarray, worth: np.ndarray, layers: float) -> np.ndarray:
    """Without its outermost layers, of the last one only the share that is worth least."""
    left = mask.copy()
    for layer in range(int(np.ceil(layers))):
        # What lies beyond the volume is taken for more of the same: a vessel is not peeled where it leaves.
        surface = left & ~np.asarray(ndimage.binary_erosion(left, border_value=1), bool)
        share = min(1.0, layers - layer)
        voxels = np.flatnonzero(surface)
        order = np.argsort(worth.ravel()[voxels], kind="stable")
        left.ravel()[voxels[order[: round(share * len(voxels))]]] = False
    return left


def _without_branches(mask: np.ndarray, grid: Grid, share: float, rng: np.random.Generator) -> np.ndarray:
    graph = build_graph(mask, grid)
    if not graph.segments:
        return mask.copy()
    length = np.bincount(graph.edge_segment, graph.edge_length, minlength=graph.segments)
    gone, so_far = np.zeros(graph.segments, bool), 0.0
    for segment in rng.permutation(graph.segments):
        # The one that crosses the line goes where that comes closer to the share than leaving it.
        if so_far + length[segment] / 2 <= share * length.sum():
            gone[segment] = True
            so_far += length[segment]
    voxels = np.argwhere(mask)
    _, nearest = KDTree(graph.position).query(grid.to_mm(voxels))
    segment = graph.segment[nearest]
    result = mask.copy()
    result[tuple(voxels[(segment >= 0) & gone[segment]].T)] = False
    return result


def _with_blobs(mask: np.ndarray, grid: Grid, count: int, rng: np.random.Generator) -> np.ndarray:
    voxels = np.argwhere(mask)
    tree = KDTree(grid.to_mm(voxels))
    margin = _AROUND_MM / grid.spacing
    low = np.maximum(voxels.min(0) - margin, 0)
    high = np.minimum(voxels.max(0) + margin, np.array(grid.shape) - 1)
    result = mask.copy()
    placed = 0
    for _ in range(200 * count):  # in a volume full of vessels there may be no room for all
        if placed == count:
            break
        centre = grid.to_mm(rng.uniform(low, high))
        radius = float(rng.uniform(*_BLOB_MM))
        if tree.query(centre)[0] < _AWAY_MM + radius:
            continue
        result[tuple(ball_voxels(grid, centre, radius).T)] = True
        placed += 1
    return result
