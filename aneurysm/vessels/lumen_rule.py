"""From lumen probability to a lumen mask: arteries are one connected tree, false alarms are crumbs.

A threshold low enough to keep the thin branches also lets through specks of fat, marrow and cortex. What
tells them apart is where they are: a branch hangs on a vessel that the network is sure of. So voxels above
a low threshold count only in pieces that hold enough voxels above a high one (hysteresis, Canny 1986).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skimage import measure

from aneurysm.data.scan import Grid
from aneurysm.vessels.cleanup import check_on_grid

CORE_RECALL = 0.5  # share of the lumen that is sure
CORE_MM3 = 30.0  # of sure voxels in a piece: some 10 mm of a vessel 2 mm wide
FAILURES = 0.1  # share of scans, those found worst, that do not take part in the choice of a threshold
LEVELS = 255  # probabilities are compared in these steps, which is how they are stored


@dataclass(frozen=True)
class LumenRule:
    """Which voxels are lumen.

    threshold: lowest probability of a lumen voxel.
    core: probability from which a voxel is sure to be lumen.
    """

    threshold: float
    core: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or not 0 < self.core < 1:
            raise ValueError(f"Lumen thresholds lie between 0 and 1, got {self.threshold} and {self.core}.")

    def __call__(self, probability: np.ndarray, grid: Grid) -> np.ndarray:
        """The mask, (d, h, w) bool, of a probability volume on `grid`; empty where nothing is sure.

        Raises:
            ValueError: the volume does not lie on the grid.
        """
        check_on_grid(probability, grid)
        return _pieces_with_core(probability, self.threshold, max(self.core, self.threshold), grid.voxel_mm3)

    @classmethod
    def for_recall(
        cls,
        probability: Sequence[np.ndarray],
        target: Sequence[np.ndarray],
        grids: Sequence[Grid],
        recall: float,
        precision: float,
    ) -> "LumenRule":
        """The highest threshold whose masks still find `recall` of the lumen voxels of the scans together.

        The worst `FAILURES` of the scans are left out: where a net has not seen a vessel no threshold brings
        it back, and one such scan would cover all others with false voxels.

        Where their precision is then below `precision`, the lowest threshold that has it: a net that knows
        too little would call the whole head a vessel, and the graph of such a mask is as useless as it is
        slow. The core is where half of the lumen is found.

        Args:
            probability: per scan (d, h, w) float32; take scans of the training patients.
            target: per scan (d, h, w) bool.
            grids: per scan.
        """
        scans = _without_failures(list(zip(probability, target, grids, strict=True)))
        inside = np.zeros(LEVELS + 1, np.int64)
        for p, t, _ in scans:
            inside += np.bincount(np.floor(p[t] * LEVELS).astype(np.int64), minlength=LEVELS + 1)
        total = int(inside.sum())
        if total == 0:
            return cls(0.5, 0.5)
        found = inside[::-1].cumsum()[::-1] / total  # recall of the bare threshold i / LEVELS
        core = _last(found >= CORE_RECALL)

        def found_and_marked(level: int) -> tuple[int, int]:
            counts = np.zeros(2, np.int64)
            for p, t, g in scans:
                mask = _pieces_with_core(p, level / LEVELS, max(core, level) / LEVELS, g.voxel_mm3)
                counts += int(mask[t].sum()), int(mask.sum())
            return int(counts[0]), int(counts[1])

        def precise(level: int) -> bool:
            hits, marked = found_and_marked(level)
            return hits >= precision * marked

        # Masks shrink as the threshold rises, so bisection finds it; against `found` they only lose pieces.
        low, high = 1, max(_last(found >= recall), 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if found_and_marked(middle)[0] >= recall * total else (low, middle - 1)
        high = LEVELS - 1
        if precise(low):
            high = low
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if precise(middle) else (middle + 1, high)
        return cls(low / LEVELS, core / LEVELS)


def _without_failures(
    scans: list[tuple[np.ndarray, np.ndarray, Grid]],
) -> list[tuple[np.ndarray, np.ndarray, Grid]]:
    """The scans but the tenth with the lowest recall at probability one half."""
    scans = [scan for scan in scans if scan[1].any()]
    scans.sort(key=lambda scan: float((scan[0][scan[1]] >= 0.5).mean()))
    return scans[int(len(scans) * FAILURES) :]


def _last(reached: np.ndarray) -> int:
    """Highest level within 1 .. LEVELS - 1 at which a falling curve is still high enough."""
    levels = np.flatnonzero(reached[1:LEVELS]) + 1
    return int(levels[-1]) if len(levels) else 1


def _pieces_with_core(probability: np.ndarray, low: float, high: float, voxel_mm3: float) -> np.ndarray:
    mask = probability >= low
    pieces = np.asarray(measure.label(mask, connectivity=3))
    keep = np.bincount(pieces[probability >= high], minlength=int(pieces.max()) + 1) * voxel_mm3 >= CORE_MM3
    keep[0] = False
    return keep[pieces]
