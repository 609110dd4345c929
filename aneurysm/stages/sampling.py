"""Where the patches that a segmentation network trains on are cut."""

import zlib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from aneurysm.stages.patches import aneurysm_voxels, network_volume, vessel_volume, vessel_voxels
from aneurysm.stages.stored import AnyCase, opened
from aneurysm.vessels.skeleton import inside_distance

_BRIGHT_KEPT = 4096  # voxels per scan from which `bright` chooses


@dataclass(frozen=True)
class Sampling:
    """Shares of the patches by what their centre lies on; what is left of 1 lies anywhere in the scan.

    vessel: a voxel of a vessel, all alike. Most of them belong to the few wide arteries.
    thin: a voxel of a vessel with a chance of 1 / radius^2, so that a millimetre of a thin artery is chosen
        as often as a millimetre of a wide one, which has many times its voxels.
    sac: a voxel of an aneurysm; in a scan without one, as `vessel`.
    bright: a voxel outside all vessels that is as bright as the brighter half of theirs: bone, fat, veins,
        whatever this scan confuses with them.
    """

    vessel: float = 0.9
    thin: float = 0.0
    sac: float = 0.0
    bright: float = 0.0

    def __post_init__(self) -> None:
        shares = [getattr(self, f.name) for f in fields(self)]
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(
                f"sampling: shares lie in 0..1 and do not exceed 1 together, got vessel {self.vessel}, thin "
                f"{self.thin}, sac {self.sac}, bright {self.bright}."
            )

    def centre(self, case: AnyCase, path: Path, rng: np.random.Generator) -> np.ndarray:
        """Index (3,) of a voxel of a case.

        Args:
            path: where the case is stored; what the shares need to know of it is found once per process.
            rng: the only source of randomness; the same state gives the same voxel.
        """
        kind = int(
            np.searchsorted(np.cumsum([self.vessel, self.thin, self.sac, self.bright]), rng.random(), "right")
        )
        flat: int | None = None
        if kind == 3:
            flat = _one_of(bright_voxels(path), rng)
        elif kind == 1 and "vessel" in case.masks and len(shares := thin_shares(path)):
            chosen = int(np.searchsorted(shares, rng.random(), "right"))
            voxels = vessel_voxels(case)
            assert voxels is not None
            flat = int(voxels[min(chosen, len(shares) - 1)])
        elif kind == 2:
            flat = _one_of(aneurysm_voxels(case), rng)
        if flat is None and kind < 3:
            flat = _one_of(vessel_voxels(case), rng)
        if flat is None:
            return np.array([int(rng.integers(n)) for n in case.grid.shape])
        return np.array(np.unravel_index(flat, case.grid.shape))

    def look_up(self, paths: list[Path]) -> None:
        """Find out beforehand what `centre` needs to know of cases, for loader processes to inherit."""
        for path in paths:
            if self.thin and "vessel" in opened(path).masks:
                thin_shares(path)
            if self.bright:
                bright_voxels(path)


def _one_of(voxels, rng: np.random.Generator) -> int | None:
    return int(voxels[int(rng.integers(len(voxels)))]) if voxels is not None and len(voxels) else None


@lru_cache(maxsize=16384)
def thin_shares(path: Path) -> np.ndarray:
    """Of a stored case: the sum of chances up to each entry of `vessel_voxels`, 1 at the last, float32."""
    case = opened(path)
    lumen = vessel_volume(case)
    if lumen is None or not lumen.any():
        return np.zeros(0, np.float32)
    chance = 1 / local_radius(lumen, case.grid.spacing) ** 2
    total = np.cumsum(chance)
    return (total / total[-1]).astype(np.float32)


def local_radius(lumen: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Radius in mm of the vessel around each voxel of a mask (d, h, w), in the order of flat indices.

    The depth of the nearest voxel that lies as deep as all its neighbours.
    """
    depth = np.pad(inside_distance(lumen, spacing), 1)
    flat = np.flatnonzero(depth > 0)
    steps = np.array([s for s in np.ndindex(3, 3, 3) if s != (1, 1, 1)]) - 1
    offsets = steps @ np.array([depth.shape[1] * depth.shape[2], depth.shape[2], 1])
    values = depth.ravel()
    ridge = np.ones(len(flat), bool)
    for offset in offsets:
        ridge &= values[flat] >= values[flat + offset]
    voxels = np.stack(np.unravel_index(flat, depth.shape), axis=1) * np.asarray(spacing, float)
    _, nearest = KDTree(voxels[ridge]).query(voxels)
    return values[flat[ridge]][nearest]


@lru_cache(maxsize=16384)
def bright_voxels(path: Path) -> np.ndarray | None:
    """Of a stored case: flat indices of some voxels that look like vessels and are none, rising; None if its
    vessels are unknown."""
    case = opened(path)
    lumen = vessel_volume(case)
    if lumen is None or not lumen.any():
        return None
    image = network_volume(case)
    voxels = np.flatnonzero(~lumen & (image >= np.median(image[lumen])))
    if len(voxels) > _BRIGHT_KEPT:
        rng = np.random.default_rng(zlib.crc32(case.series_uid.encode()))
        voxels = np.sort(rng.choice(voxels, _BRIGHT_KEPT, replace=False))
    return voxels
