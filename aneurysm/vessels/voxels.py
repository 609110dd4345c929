"""The voxels of a mask as a sorted list: vessels fill a thousandth of a head, so nothing here walks the rest.

A voxel is known by its key, its position in C order in the volume padded by one voxel on every side: keys of
neighbours differ by a constant and no step leaves the volume or wraps into the next row. Notation: n voxels,
R runs (unbroken stretches along the last axis).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Final

import numpy as np

from aneurysm.data.scan import Grid

# The neighbours of a voxel in C order: step i and step 25 - i are opposite.
STEPS: Final = np.array([s for s in product((-1, 0, 1), repeat=3) if any(s)])  # (26, 3)
_FORWARD_ROWS: Final = ((0, 1), (1, -1), (1, 0), (1, 1))  # steps along (d, h); the others are opposite
_SLAB = 1 << 24  # voxels looked at in one go where a copy is needed


@dataclass(frozen=True, eq=False)
class Voxels:
    """The non-zero voxels of a (d, h, w) mask."""

    shape: tuple[int, int, int]  # of the mask
    key: np.ndarray  # (n,) rising integers, position in the mask padded by 1

    @classmethod
    def of(cls, mask: np.ndarray) -> "Voxels":
        """The voxels of a mask (d, h, w) that are not zero."""
        d, h, w = (int(n) for n in np.shape(mask))
        place = _nonzero(np.asarray(mask))
        row, along = np.divmod(place, w)
        deep, row = np.divmod(row, h)
        key = ((deep + 1) * (h + 2) + row + 1) * (w + 2) + along + 1
        return cls((d, h, w), key.astype(_key_type((d, h, w))))

    def __len__(self) -> int:
        return len(self.key)

    @property
    def strides(self) -> tuple[int, int, int]:
        """What one step along (d, h, w) adds to a key."""
        _, h, w = self.shape
        return (h + 2) * (w + 2), w + 2, 1

    @cached_property
    def index(self) -> np.ndarray:
        """Voxel indices (n, 3) int32 along (d, h, w)."""
        row, along = np.divmod(self.key, self.strides[1])
        deep, row = np.divmod(row, self.shape[1] + 2)
        return np.stack([deep, row, along], axis=-1).astype(np.int32) - 1

    @cached_property
    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Where in the list each run begins and where it ends, the last voxel included: (R,) each."""
        breaks = np.flatnonzero(np.diff(self.key) != 1)
        if not len(self):
            return breaks, breaks
        return np.append(0, breaks + 1), np.append(breaks, len(self) - 1)

    @cached_property
    def neighbours(self) -> np.ndarray:
        """Place in the list of the neighbour at each of the 26 STEPS, n where none is: (n, 26) int32."""
        count, key = len(self), self.key
        table = np.full((count, 26), count, np.int32)
        here = np.arange(count, dtype=np.int32)
        joined = np.flatnonzero(np.diff(key) == 1)
        table[joined, 13], table[joined + 1, 12] = joined + 1, joined
        closed = np.append(key, np.iinfo(key.dtype).max)  # a place past the end matches nothing
        for deep, row in _FORWARD_ROWS:
            step = deep * self.strides[0] + row * self.strides[1]
            place = np.searchsorted(key, key + key.dtype.type(step - 1)).astype(np.int32)
            first = 13 + 9 * deep + 3 * row - 1  # of the three neighbours in that row
            for along in (-1, 0, 1):
                found = closed[place] == key + key.dtype.type(step + along)
                mine, other = here[found], place[found]
                column = first + along
                table[mine, column], table[other, 25 - column] = other, mine
                place = place + found
        return table

    def at(self, mask: np.ndarray) -> np.ndarray:
        """Values of a volume (d, h, w) at the voxels, (n,)."""
        return mask[tuple(self.index.T)]

    def only(self, keep: np.ndarray) -> "Voxels":
        """The voxels for which `keep` (n,) holds."""
        return Voxels(self.shape, self.key[keep])

    def find(self, index: np.ndarray) -> np.ndarray:
        """Place in the list of voxel indices (..., 3), n where they are not in it or outside the volume."""
        index = np.asarray(index, np.int64)
        known = ((index >= 0) & (index < self.shape)).all(-1)
        key = np.where(known, (index + 1) @ np.array(self.strides), -1)
        place = np.searchsorted(self.key, key)
        hit = np.append(self.key, -2)[place] == key
        return np.where(hit, place, len(self))

    @classmethod
    def at_index(cls, shape: tuple[int, int, int], index: np.ndarray) -> "Voxels":
        """The voxels at indices (m, 3) inside the volume, in any order, some perhaps more than once."""
        d, h, w = shape
        deep, row, along = (np.asarray(index, np.int64).reshape(-1, 3) + 1).T
        key = np.unique((deep * (h + 2) + row) * (w + 2) + along)
        return cls((d, h, w), key.astype(_key_type((d, h, w))))

    def among(self, other: "Voxels") -> np.ndarray:
        """Which of these voxels are in another list of the same volume, (n,) bool."""
        place = np.searchsorted(other.key, self.key)
        return np.append(other.key, -1)[place] == self.key

    def plus(self, other: "Voxels") -> "Voxels":
        """These voxels and those of another list."""
        new = other.key[~other.among(self)]
        if not len(new):
            return self
        return Voxels(self.shape, np.insert(self.key, np.searchsorted(self.key, new), new))

    def minus(self, other: "Voxels") -> "Voxels":
        """These voxels without those of another list."""
        return self.only(~self.among(other))

    def to_volume(self, values: np.ndarray | bool = True) -> np.ndarray:
        """A volume (d, h, w) with values (n,) at the voxels, zero elsewhere; a mask when none are given."""
        filled = np.asarray(values)
        volume = np.zeros(self.shape, filled.dtype)
        volume[tuple(self.index.T)] = filled
        return volume


def check_on_grid(mask: np.ndarray | Voxels, grid: Grid) -> None:
    """Refuse a volume that has another shape than its grid.

    Raises:
        ValueError: the shapes differ.
    """
    shape = mask.shape if isinstance(mask, Voxels) else np.shape(mask)
    if shape != grid.shape:
        raise ValueError(
            f"A mask of shape {shape} does not lie on a grid of shape {grid.shape}. "
            "Resample it onto that grid first."
        )


def bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """Smallest box (slices along d, h, w) that holds every non-zero voxel of a mask that has some."""
    spans = []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        filled = np.flatnonzero(np.any(mask, axis=other))
        spans.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return spans[0], spans[1], spans[2]


def _key_type(shape: tuple[int, int, int]) -> type[np.signedinteger]:
    d, h, w = shape
    return np.int32 if (d + 2) * (h + 2) * (w + 2) < 2**31 else np.int64


def _nonzero(mask: np.ndarray) -> np.ndarray:
    """Positions in C order of what is not zero; eight voxels of a byte mask are looked at in one go."""
    if mask.flags.c_contiguous and mask.itemsize == 1:
        flat = mask.reshape(-1).view(np.uint8)
        whole = len(flat) // 8 * 8
        word = np.flatnonzero(flat[:whole].view(np.uint64))
        inner = np.flatnonzero(flat[:whole].reshape(-1, 8)[word].reshape(-1))
        tail = whole + np.flatnonzero(flat[whole:])
        return np.concatenate([word[inner // 8] * 8 + inner % 8, tail])
    slabs = max(1, _SLAB // max(1, int(np.prod(mask.shape[1:]))))
    size = int(np.prod(mask.shape[1:]))
    parts = [np.flatnonzero(mask[i : i + slabs]) + i * size for i in range(0, len(mask), slabs)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def touching(
    first: np.ndarray, last: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j) of intervals [first_i, last_i] and [begin_j, end_j] that overlap, ends included.

    The second intervals rise and do not overlap each other.
    """
    low, high = np.searchsorted(end, first), np.searchsorted(begin, last, side="right")
    many = np.maximum(high - low, 0)
    mine = np.repeat(np.arange(len(first)), many)
    return mine, spread(low, many)


def spread(start: np.ndarray, many: np.ndarray) -> np.ndarray:
    """start_i, start_i + 1, ... (many_i of them) for every i, one after the other."""
    before = np.cumsum(many) - many
    return np.arange(int(many.sum())) + np.repeat(start - before, many)
