"""Pieces and cavities of a mask, found on its runs: a run is linked to those beside it, no volume is made."""

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from aneurysm.vessels.voxels import Voxels, spread, touching


def pieces(voxels: Voxels) -> tuple[int, np.ndarray]:
    """The number of 26-connected pieces, and the piece of each voxel (n,) int32."""
    if not len(voxels):
        return 0, np.zeros(0, np.int32)
    start, stop = voxels.runs
    begin, end = voxels.key[start].astype(np.int64), voxels.key[stop].astype(np.int64)
    deep, row, _ = voxels.strides
    links = [
        touching(begin + step - 1, end + step + 1, begin, end) for step in (row, deep - row, deep, deep + row)
    ]
    count, piece = _linked(len(start), links)
    return count, np.repeat(piece, stop - start + 1)


def cavities(voxels: Voxels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stretches of background that the mask encloses, 6-connected as the counterpart of its 26-connection.

    The rim of the volume is open: what touches it is no cavity.

    Returns:
        First key (g,), length (g,) and cavity (g,) of every stretch along the last axis.
    """
    deep, row, _ = voxels.strides
    start, stop = voxels.runs
    begin, end = voxels.key[start].astype(np.int64), voxels.key[stop].astype(np.int64)
    line = begin // row
    within = np.flatnonzero(line[1:] == line[:-1])  # between two runs of one row
    first, last = end[within] + 1, begin[within + 1] - 1
    if not len(first):
        return first, first, first
    rows, opening = np.unique(line, return_index=True)
    closing = np.append(opening[1:], len(line)) - 1
    left, right = begin[opening], end[closing]
    gaps = len(first)
    open_ = np.zeros(gaps, bool)
    for step in (row, -row, deep, -deep):
        beside = np.searchsorted(rows, (first + step) // row)
        beside = np.minimum(beside, len(rows) - 1)
        known = rows[beside] == (first + step) // row
        open_ |= ~known | (first + step < left[beside]) | (last + step > right[beside])
    links = [touching(first + step, last + step, first, last) for step in (row, deep)]
    mine = np.flatnonzero(open_)
    links.append((mine, np.full(len(mine), gaps)))  # one more node: the outside
    _, piece = _linked(gaps + 1, links)
    closed = piece[:-1] != piece[-1]
    cavity = np.unique(piece[:-1][closed], return_inverse=True)[1]
    return first[closed], (last - first + 1)[closed], cavity


def filled(voxels: Voxels, largest: int) -> tuple[Voxels, int, int]:
    """The mask with every cavity of at most so many voxels filled, how many there were and were filled."""
    first, length, cavity = cavities(voxels)
    if not len(cavity):
        return voxels, 0, 0
    small = np.bincount(cavity, length) <= largest
    chosen = small[cavity]
    if not chosen.any():
        return voxels, len(small), 0
    extra = spread(first[chosen], length[chosen]).astype(voxels.key.dtype)
    whole = Voxels(voxels.shape, np.sort(np.concatenate([voxels.key, extra])))
    return whole, len(small), int(small.sum())


def _linked(count: int, links: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, np.ndarray]:
    rows, columns = (np.concatenate(side) for side in zip(*links, strict=True))
    joined = sparse.coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    found, piece = connected_components(joined, directed=False)
    return int(found), piece
