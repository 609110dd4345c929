"""How much of a lumen every hysteresis rule would find, for all thresholds at once.

A rule keeps the pieces of the voxels above a low threshold that hold enough voxels above a high one. To label
the pieces anew for every threshold would cost a pass over the volume each; here voxels are added from the
highest probability downwards and pieces only ever merge, so that one pass answers all rules.

Notation: n voxels that are not surely background, m pairs of touching ones, K pieces, C cores, L levels.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from aneurysm.data.scan import Grid

LEVELS = 255  # probabilities are compared in these steps, which is how they are stored
CORE_MM3 = 30.0  # of sure voxels in a piece: some 10 mm of a vessel 2 mm wide
LOWEST = 4  # level below which no threshold is looked for: a net that needs it would mark the whole head
CORES = (26, 51, 89, 128, 166, 204, 230, 242, 250)  # levels from which a voxel may count as sure
_AHEAD = np.array([s for s in product((-1, 0, 1), repeat=3) if s > (0, 0, 0)])  # (13, 3) half the neighbours
_STEPS = (np.arange(LEVELS + 1) / LEVELS).astype(np.float32)


@dataclass(frozen=True, eq=False)
class RuleCounts:
    """What each rule (core c, threshold level l) would mark in one scan."""

    hits: np.ndarray  # (C, LEVELS + 1) int64, marked voxels that are lumen; 0 below LOWEST
    marked: np.ndarray  # (C, LEVELS + 1) int64
    lumen: int  # true lumen voxels

    @property
    def recall(self) -> np.ndarray:
        """(C, LEVELS + 1), NaN without lumen."""
        return self.hits / self.lumen if self.lumen else np.full(self.hits.shape, np.nan)

    @property
    def dice(self) -> np.ndarray:
        """(C, LEVELS + 1), NaN where truth and mask are empty."""
        whole = self.marked + self.lumen
        return np.divide(2.0 * self.hits, whole, out=np.full(self.hits.shape, np.nan), where=whole > 0)


def count_rules(probability: np.ndarray, target: np.ndarray, grid: Grid) -> RuleCounts:
    """Hits and marks of every rule in one scan.

    Args:
        probability: (d, h, w) float32.
        target: (d, h, w) bool.

    Raises:
        ValueError: the volumes differ in shape from the grid.
    """
    if probability.shape != grid.shape or target.shape != grid.shape:
        raise ValueError(
            f"Probability {probability.shape} and target {target.shape} do not lie on the grid {grid.shape}."
        )
    shape = (len(CORES), LEVELS + 1)
    hits, marked = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    lumen = int(np.count_nonzero(target))
    voxels = np.flatnonzero(probability >= _STEPS[LOWEST])
    level = np.searchsorted(_STEPS, probability.ravel()[voxels].astype(np.float32), side="right") - 1
    order = np.argsort(-level, kind="stable")
    voxels, level = voxels[order], level[order]  # the surest first
    if not len(voxels):
        return RuleCounts(hits, marked, lumen)
    # Every voxel starts as a piece of one: its size, its lumen voxels and its sure voxels for every core.
    own = np.ones((len(voxels), 2 + len(CORES)), np.int64)
    own[:, 1] = target.ravel()[voxels]
    own[:, 2:] = level[:, None] >= CORES
    first, second = _touching(voxels, grid.shape)
    joined_at = np.maximum(first, second)  # the fainter of a pair comes later
    turn = np.argsort(joined_at, kind="stable")
    first, second, joined_at = first[turn], second[turn], joined_at[turn]
    enough = CORE_MM3 / grid.voxel_mm3

    piece = np.empty(len(voxels), np.int64)  # of the voxels so far
    held = np.zeros((0, own.shape[1]), np.int64)  # what each piece holds, (K, 2 + C)
    past = pairs = 0
    for now in range(LEVELS, LOWEST - 1, -1):
        reach = int(np.searchsorted(-level, -now, side="right"))
        if reach > past:
            piece[past:reach] = len(held) + np.arange(reach - past)
            held = np.concatenate([held, own[past:reach]])
            upto = int(np.searchsorted(joined_at, reach, side="left"))
            a, b = piece[first[pairs:upto]], piece[second[pairs:upto]]
            links = sparse.coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(len(held),) * 2)
            count, joined = connected_components(links, directed=False)
            gather = sparse.csr_matrix(
                (np.ones(len(held), np.int64), (joined, np.arange(len(held)))), shape=(count, len(held))
            )
            piece[:reach], held = joined[piece[:reach]], np.asarray(gather @ held)
            past, pairs = reach, upto
        kept = held[:, 2:] >= enough  # (K, C)
        marked[:, now] = held[:, 0] @ kept
        hits[:, now] = held[:, 1] @ kept
    return RuleCounts(hits, marked, lumen)


def _touching(voxels: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of 26-neighbours among the voxels (flat indices, any order), as their places in the list."""
    by_index = np.argsort(voxels)
    ordered = voxels[by_index]
    place = np.stack(np.unravel_index(voxels, shape), axis=-1)
    firsts, seconds = [], []
    for step in _AHEAD:
        there = place + step
        valid = ((there >= 0) & (there < shape)).all(axis=1)
        wanted = voxels[valid] + int(step @ np.array([shape[1] * shape[2], shape[2], 1]))
        at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        found = ordered[at] == wanted
        firsts.append(np.flatnonzero(valid)[found])
        seconds.append(by_index[at[found]])
    return np.concatenate(firsts), np.concatenate(seconds)
