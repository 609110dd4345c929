"""The region of interest of a head scan: the box around the circle of Willis that the fine networks look at.

Four fifths of a head scan hold no artery that bears aneurysms. A small net looks at the whole scan in voxels
of some 3 mm and marks what lies near arteries; the box of a given size that holds most of it is the region,
and the windows of the fine networks only have to cover that. Where the answer is doubtful the whole scan is
looked at, and the reason is kept: an artery left out is lost, time is not.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_dilation
from torch import nn

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.resample import isotropic, resample
from aneurysm.data.scan import Grid
from aneurysm.stages.volumes import aneurysm_target, network_image, vessel_target
from aneurysm.stages.windows import Box, Region

NEAR_VOXELS = 1  # of the coarse grid: how far from an artery "near" is
_FEWEST_MM3 = 3000.0  # near arteries; those of a whole circle of Willis fill ten times as much
_NARROWEST_MM = 25.0  # of what is found, from left to right: both carotids, or it is no circle of Willis
_TAIL = 0.5  # per cent of what is found that is not waited for at either end of an axis


@dataclass(frozen=True)
class RoiSettings:
    """How the region is found.

    spacing_mm: voxels of the coarse pass; size_mm: of the region along d, h, w, less where the scan ends;
    min_probability: of a coarse voxel that counts;
    min_share: of all that counts which the region must hold, else it is doubtful; fallback: "whole", look at
    the whole scan where the region is doubtful, or "region", take it all the same; exact: see
    `windows.place`.
    """

    spacing_mm: float
    size_mm: tuple[float, float, float]
    min_probability: float
    min_share: float
    fallback: str
    exact: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "size_mm", tuple(float(n) for n in self.size_mm))
        if len(self.size_mm) != 3 or min(self.size_mm) < _NARROWEST_MM or self.spacing_mm <= 0:
            raise ValueError(
                f"A region has three sides of at least {_NARROWEST_MM:g} mm and coarse voxels a size, got "
                f"size_mm {self.size_mm}, spacing_mm {self.spacing_mm}."
            )
        if not 0 < self.min_probability < 1 or not 0 <= self.min_share <= 1:
            raise ValueError(
                "min_probability lies between 0 and 1, min_share in 0..1; got "
                f"{self.min_probability}, {self.min_share}."
            )
        if self.fallback not in ("whole", "region"):
            raise ValueError(f"fallback is whole or region, got {self.fallback!r}.")


@dataclass(frozen=True)
class Roi:
    """Where to look in a scan, and why.

    region: in the prepared grid, None: everywhere; note: one sentence for people.
    """

    region: Region | None
    note: str

    @property
    def box(self) -> Box | None:
        """The region's voxels."""
        return None if self.region is None else self.region.box

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        if self.region is None:
            return {"region": None, "note": self.note}
        return {"region": asdict(self.region), "note": self.note}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Roi":
        """From what `plain` gave."""
        region = plain["region"]
        return cls(region and Region(Box(**region["box"]), region["exact"]), plain["note"])


WHOLE = Roi(None, "the whole scan, as it is set")


def is_large(grid: Grid, settings: RoiSettings) -> bool:
    """Whether a scan holds at least twice the region; others are looked at whole without a coarse pass."""
    field = np.array(grid.shape) * grid.spacing
    return bool(np.prod(np.maximum(field, settings.size_mm)) >= 2 * np.prod(settings.size_mm))


def coarse_image(case: PreparedCase, settings: RoiSettings) -> tuple[np.ndarray, Grid]:
    """What the coarse net sees: (d, h, w) float32 and its grid."""
    grid = isotropic(case.grid, settings.spacing_mm)
    image = network_image(case)
    return resample(image, case.grid, grid, fill=float(image.flat[0]), smooth=True), grid


def coarse_target(case: PreparedCase, grid: Grid) -> np.ndarray:
    """What it learns to mark: coarse voxels (d, h, w) bool at most one voxel from lumen or a sac.

    Raises:
        ValueError: the vessels of the case are not annotated.
    """
    vessel = vessel_target(case)
    if vessel is None:
        raise ValueError(f"{case.series_uid}: its vessels are not annotated.")
    sac = aneurysm_target(case)
    wanted = vessel if sac is None else vessel | sac
    share = resample(wanted.astype(np.float32), case.grid, grid, smooth=True)
    return binary_dilation(share > 0.05, iterations=NEAR_VOXELS)


@torch.no_grad()
def coarse_probability(net: nn.Module, image: np.ndarray) -> np.ndarray:
    """Probability that arteries are near, (d, h, w), in one look at the whole coarse image."""
    net.eval()
    device = next(net.parameters()).device
    return torch.sigmoid(net(torch.from_numpy(image)[None, None].to(device)).float())[0, 0].cpu().numpy()


def find_roi(nets: list[nn.Module], case: PreparedCase, settings: RoiSettings) -> Roi:
    """The region of a scan, from the mean of coarse nets; the whole scan where there is none or no need."""
    if not is_large(case.grid, settings):
        return Roi(None, "the scan is hardly larger than the region of interest would be")
    if not nets:
        return Roi(None, "no coarse net was trained: no training scan was larger than the region of interest")
    image, grid = coarse_image(case, settings)
    probability = np.mean([coarse_probability(net, image) for net in nets], axis=0)
    return locate(probability, grid, case.grid, settings)


def locate(probability: np.ndarray, coarse: Grid, fine: Grid, settings: RoiSettings) -> Roi:
    """The box that holds most of what is near arteries, on the fine grid.

    Args:
        probability: (d, h, w) on the coarse grid, which is parallel to the fine one.
    """
    mass = np.where(probability >= settings.min_probability, probability, 0).astype(np.float64)
    found_mm3 = float(mass.sum() * coarse.voxel_mm3)
    if found_mm3 < _FEWEST_MM3:
        return Roi(None, f"the whole scan: hardly any artery was found in it ({found_mm3:.0f} mm3)")
    size = np.minimum(np.rint(np.array(settings.size_mm) / coarse.spacing).astype(int), mass.shape)
    start = _fullest(mass, size)
    inside = mass[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
    share = float(inside.sum() / mass.sum())
    low, high = _extent(inside)  # voxels in the box, high included
    width = (high - low + 1) * coarse.spacing
    # The box is moved so that the arteries lie in its middle, and not made smaller where they fill less: the
    # coarse net marks distal branches last, and a smaller box would save few windows.
    middle = start + (low + high) / 2
    centre = fine.to_index(coarse.to_mm(middle))
    shape = np.array(fine.shape)
    count = np.maximum(np.rint(np.array(settings.size_mm) / fine.spacing).astype(int), 1)
    first = np.rint(centre - (count - 1) / 2).astype(int)
    box = Box(tuple(np.maximum(first, 0)), tuple(np.minimum(first + count, shape)))
    # An artery that leaves the scan may do so with what is looked for, unless all of that axis is in the box.
    leaves = (start + low == 0) | (start + high == np.array(mass.shape) - 1)
    longer = shape * fine.spacing > settings.size_mm
    doubt = None
    if share < settings.min_share:
        doubt = f"the region would hold only {share:.0%} of the arteries found"
    elif width[2] < _NARROWEST_MM:
        doubt = f"what was found is only {width[2]:.0f} mm wide"
    elif (leaves & longer).any():
        doubt = "the arteries found lie at the border of the scan"
    if doubt and settings.fallback == "whole":
        return Roi(None, f"the whole scan: {doubt}")
    sides = " x ".join(f"{n:.0f}" for n in np.array(box.size) * fine.spacing)
    note = f"a region of {sides} mm that holds {share:.0%} of the arteries found"
    region = Region(box, settings.exact)
    return Roi(region, f"{note}; doubtful: {doubt}" if doubt else note)


def within(case: PreparedCase, box: Box | None) -> PreparedCase:
    """The case as if nothing outside the box were annotated as vessel or aneurysm; the image stays."""
    if box is None:
        return case
    masks: dict[str, Any] = {}
    for name in case.masks:
        masks[name] = np.zeros_like(getattr(case, name))
        masks[name][box.slices] = getattr(case, name)[box.slices]
    return replace(case, **masks)


def share_of_lesions(case: PreparedCase, box: Box | None) -> float:
    """Share of the annotated aneurysms whose centre lies in the box; NaN where there is none."""
    if not case.lesions:
        return float("nan")
    if box is None:
        return 1.0
    index = np.rint(case.grid.to_index(np.stack([lesion.centre_mm for lesion in case.lesions])))
    return float(((index >= box.start) & (index < box.stop)).all(1).mean())


def _fullest(mass: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Start of the box of `size` voxels with the largest sum, the first of equals."""
    total = np.pad(mass, ((1, 0), (1, 0), (1, 0)))
    for axis, n in enumerate(size):
        total = np.cumsum(total, axis=axis)
        count = total.shape[axis]
        total = np.take(total, range(n, count), axis) - np.take(total, range(count - n), axis)
    return np.array(np.unravel_index(int(total.argmax()), total.shape))


def _extent(mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel along each axis between which all but the tails of the mass lie."""
    ends = []
    for axis in range(3):
        along = mass.sum(axis=tuple(a for a in range(3) if a != axis)).cumsum()
        ends.append(np.searchsorted(along, np.array([_TAIL, 100 - _TAIL]) / 100 * along[-1]))
    low, high = np.array(ends).T
    return low, high
