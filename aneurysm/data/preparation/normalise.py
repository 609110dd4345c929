"""Where the head is in a scan, and the map from its intensities to what the nets see."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, binary_opening, gaussian_filter
from skimage.filters import threshold_otsu
from skimage.measure import label

from aneurysm.data.errors import ReadError
from aneurysm.data.scan import Grid

_COARSE_MM = 4.0  # the head is found on a grid about this coarse
# Smaller parts are not a head but, say, vessels without their surroundings: all of them are kept.
_LEAST_HEAD = 0.05
_LEAST_TISSUE = 0.002
_LEAST_FIELD_MM = 120.0  # front to back or left to right
_TISSUE_HU = -300.0  # between air and fat
# The 5-95 % range of a normal distribution is 3.29 standard deviations.
_SPREADS_PER_SIGMA = 3.29


def find_head(volume: np.ndarray, grid: Grid, modality: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The bounding box of the largest tissue region, and a sample of its intensities.

    Args:
        volume: (d, h, w); HU for CTA, arbitrary units for MR.
        name: of the series, for messages.

    Returns:
        box (2, 3): first and one-past-last voxel along (d, h, w), the whole volume when its field of view is
        too small to hold a head with air around it; tissue (n,) float32 intensities.

    Raises:
        ReadError: nothing in the volume is brighter than its background.
    """
    stride = np.maximum(np.rint(_COARSE_MM / grid.spacing).astype(int), 1)
    coarse = np.asarray(volume[tuple(slice(None, None, s) for s in stride)], dtype=np.float32)
    smooth = gaussian_filter(coarse, 0.7)
    if modality == "CTA":
        tissue = smooth > _TISSUE_HU
    else:
        low, high = np.percentile(smooth, [0.5, 99.5])
        if high - low <= 1e-5 * max(abs(low), abs(high)):  # rounding of the blur
            raise ReadError(f"{name}: no head in the image, nearly all voxels are {low:g}. Export it again.")
        # The root draws vessels and fat towards brain: Otsu then parts air from head, not dark from bright.
        root = np.sqrt(np.clip(smooth, low, high) - low)
        tissue = root > threshold_otsu(root)
    if tissue.mean() < _LEAST_TISSUE:
        hint = f"; a CT in Hounsfield units has its head above {_TISSUE_HU:g}" if modality == "CTA" else ""
        raise ReadError(
            f"{name}: no head in an image of values from {coarse.min():g} to {coarse.max():g}{hint}. "
            "Check the modality and the export."
        )
    if min(np.array(volume.shape[1:]) * grid.spacing[1:]) < _LEAST_FIELD_MM:
        # Too narrow for a head with air around it: all of it is wanted, and most of it is tissue. A bright
        # minority is then vessels in tissue, not tissue in air.
        sample = tissue if tissue.mean() > 0.5 else coarse != coarse.min()
        return np.array([(0, 0, 0), volume.shape]), coarse[sample]
    # Opening cuts the head holder and the table off, where the volume is thick enough to be opened.
    thick = min(tissue.shape) >= 8
    opened = np.asarray(binary_opening(tissue)) if thick else tissue
    labels = np.asarray(label(opened))
    sizes = np.bincount(labels.ravel(), minlength=2)[1:]
    if sizes.max() > _LEAST_HEAD * tissue.size:
        head = labels == sizes.argmax() + 1
        tissue = (
            np.logical_and(binary_dilation(head), tissue) if thick else head
        )  # the crown that opening took off
    inside = np.argwhere(tissue)
    first, last = inside.min(axis=0) * stride, inside.max(axis=0) * stride + stride
    box = np.stack([first, np.minimum(last, volume.shape)])
    core = np.asarray(binary_erosion(tissue), bool)  # voxels at the surface are part air
    return box, coarse[core] if core.sum() > 100 else coarse[np.asarray(tissue, bool)]


def head_box(
    box: np.ndarray, grid: Grid, margin_mm: float, height_mm: float | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Start and size (voxels) of the crop around a head, within the volume.

    Args:
        box: (2, 3) from `find_head`.
        margin_mm: kept around the head.
        height_mm: kept below the top of the head; neck and chest go. None keeps all.
    """
    start, stop = box[0].astype(int), box[1].astype(int)
    if height_mm is not None:
        start[0] = max(start[0], stop[0] - int(np.ceil(height_mm / grid.spacing[0])))
    margin = np.ceil(margin_mm / grid.spacing).astype(int)
    start, stop = np.maximum(start - margin, 0), np.minimum(stop + margin, grid.shape)
    size = stop - start
    return (int(start[0]), int(start[1]), int(start[2])), (int(size[0]), int(size[1]), int(size[2]))


@dataclass(frozen=True)
class Scale:
    """A linear map of intensities, clipped."""

    offset: float  # intensity that becomes 0
    divisor: float  # intensity difference that becomes 1
    low: float  # lowest value of the result
    high: float

    def __call__(self, volume: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Normalised intensities, float32, same shape; `out` may be the volume itself."""
        scaled = np.subtract(volume, np.float32(self.offset), out=out, dtype=np.float32)
        scaled = np.divide(scaled, np.float32(self.divisor), out=out)
        return np.clip(scaled, np.float32(self.low), np.float32(self.high), out=out)


def ct_scale(window: tuple[float, float], soft_tissue: float, vessel: float) -> Scale:
    """Hounsfield units: soft tissue to 0, enhanced vessel to 1, clipped to a window (all in HU)."""
    divisor = vessel - soft_tissue
    return Scale(
        soft_tissue, divisor, (window[0] - soft_tissue) / divisor, (window[1] - soft_tissue) / divisor
    )


def mr_scale(tissue: np.ndarray, clip: tuple[float, float], name: str) -> Scale:
    """MR without units: the head's median to 0, its robust standard deviation to 1.

    Raises:
        ReadError: the head has a single intensity.
    """
    low, middle, high = np.percentile(tissue, [5, 50, 95])
    spread = (high - low) / _SPREADS_PER_SIGMA
    if not spread > 0:
        raise ReadError(f"{name}: the head has no contrast (5 % and 95 % are both {low:g}). Export it again.")
    return Scale(float(middle), float(spread), clip[0], clip[1])
