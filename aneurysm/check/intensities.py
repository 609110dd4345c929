"""Values: Hounsfield units, signs, cut-off brightness, blank slices, and what counts as air."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from aneurysm.check.findings import Collector

_SAMPLES: Final = 2_000_000  # voxels; percentiles of more do not differ in the third digit
# Soft tissue and fat of a head lie in this window, in HU; iodine, bone and air do not.
_SOFT_TISSUE: Final = (-120.0, 200.0)
# Soft tissue fills a third to a half of a head CT's field of view and nearly all of a crop; padding with a
# constant may leave it a tenth.
_LEAST_SOFT: Final = 0.05
# Bone above 900 HU is at most 6 % of a scan, even of a crop at the skull base; stored values without their
# intercept of -1024 put all soft tissue there.
_DENSE_HU: Final = 900.0
_MOST_DENSE: Final = 0.15
AIR_HU: Final = -300.0
_MOST_AT_FLOOR: Final = 0.1  # share at the lowest value; in a crop without air it is reached by single voxels
# Air in MR is noise: a few percent of the bright tissue. Flow voids and bone lie at 5 to 15 %.
AIR_SHARE_OF_BRIGHT: Final = 0.08
# The largest value stands out once (a vessel, a clip). One voxel in a hundred at it: values were cut.
_MOST_AT_TOP: Final = 0.01
_TOP_HU: Final = 2000.0  # 12-bit scanners cut metal and petrous bone at 3071 HU: no vessel is lost there


@dataclass(frozen=True)
class Levels:
    """Intensities of one volume, from a regular sample of its voxels."""

    sample: np.ndarray  # (n,) float32
    low: float  # 1st percentile
    high: float  # 99.5th percentile
    top: float  # largest value of the volume

    def air_below(self, modality: str | None) -> float:
        """Values below this are air."""
        return AIR_HU if modality == "CTA" else self.low + AIR_SHARE_OF_BRIGHT * (self.high - self.low)


def measure_levels(volume: np.ndarray) -> Levels:
    """Percentiles of a volume (d, h, w)."""
    stride = max(round((volume.size / _SAMPLES) ** (1 / 3)), 1)
    sample = np.ascontiguousarray(volume[::stride, ::stride, ::stride]).ravel()
    low, high = np.percentile(sample, [1, 99.5])
    return Levels(sample, float(low), float(high), float(volume.max()))


def check_intensities(
    volume: np.ndarray, levels: Levels, modality: str | None, slice_axis: int, found: Collector
) -> None:
    """Values of a volume.

    Args:
        volume: (d, h, w) float32, rescaled.
        modality: CTA, MRA, T1, T2, or None when it is unknown; then units are not judged.
        slice_axis: of `volume`, the axis along which the slices were stored.
    """
    if float(volume.min()) == levels.top:
        found.add("constant-image", f"All voxels are {levels.top:g}.")
        return
    if modality == "CTA":
        _check_hounsfield(levels, found)
    elif modality is not None and levels.low < -0.05 * abs(levels.high):
        share = float((levels.sample < 0).mean())
        found.add(
            "negative-mr", f"{share:.0%} of the voxels are negative; the 1st percentile is {levels.low:.4g}."
        )
    at_top = float((levels.sample >= levels.top).mean())
    if at_top > _MOST_AT_TOP and not (modality == "CTA" and levels.top >= _TOP_HU):
        found.add("clipped", f"{at_top:.1%} of the voxels have the largest value, {levels.top:g}.")
    _check_blank(volume, slice_axis, found)


def is_label_map(levels: Levels) -> bool:
    """Whether the values are a few whole numbers and mostly zero: labels that were given as an image."""
    values = np.unique(levels.sample)
    return (
        1 < len(values) <= 41
        and bool((values == np.rint(values)).all())
        and float((levels.sample == 0).mean()) > 0.5
    )


def _check_hounsfield(levels: Levels, found: Collector) -> None:
    sample = levels.sample
    soft = float(((sample > _SOFT_TISSUE[0]) & (sample < _SOFT_TISSUE[1])).mean())
    dense = float((sample > _DENSE_HU).mean())
    lowest = float(np.percentile(sample, 0.5))
    span = f"values from {lowest:.4g} to {levels.top:.4g}"
    if soft < _LEAST_SOFT:
        found.add("not-hounsfield", f"Only {soft:.1%} of the voxels have values of soft tissue; {span}.")
    elif dense > _MOST_DENSE and lowest > -200:
        found.add("not-hounsfield", f"{dense:.0%} of the voxels lie above 900 and none is air; {span}.")
    elif lowest > AIR_HU and (floor := float((sample == sample.min()).mean())) > _MOST_AT_FLOOR:
        found.add("ct-without-air", f"{floor:.0%} of the voxels have the lowest value, {lowest:g}; {span}.")
    elif levels.top - lowest < 150:  # less than from fluid to contrasted blood
        found.add("not-hounsfield", f"The values span too little for a head: {span}.")


def _check_blank(volume: np.ndarray, axis: int, found: Collector) -> None:
    """Constant slices between slices with content; masked edges and padding are no fault."""
    planes = np.moveaxis(volume, axis, 0)
    step = [max(n // 64, 1) for n in planes.shape[1:]]
    coarse = planes[:, :: step[0], :: step[1]]
    suspects = np.flatnonzero(coarse.max(axis=(1, 2)) == coarse.min(axis=(1, 2)))
    blank = np.array([i for i in suspects if planes[i].max() == planes[i].min()], dtype=int)
    content = np.setdiff1d(np.arange(len(planes)), blank)
    inside = blank[(blank > content.min()) & (blank < content.max())] if len(content) else blank
    if len(inside):
        name = ("axial", "coronal", "sagittal")[axis]
        text = f"{len(inside)} of {len(planes)} {name} slices are constant, first number {int(inside[0])}."
        found.add("blank-slices", text)
