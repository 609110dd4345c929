"""Thin a vessel mask to its centreline.

The 3D thinning of Lee, Kashyap and Chu (1994), as found in common libraries, deletes straight tubes of even
width altogether. Here voxels are peeled by growing depth, in eight passes by the parity of their position:
no two voxels of a pass touch, so a simultaneous pass equals a sequential one, symmetric tubes cannot vanish,
and the topology of the mask is kept exactly.

Sources: distance-ordered homotopic thinning, C. Pudney, CVIU 72 (1998); parity subfields, G. Bertrand and
Z. Aktouf, SPIE 2356 (1994); simple points, G. Bertrand and G. Malandain, Pattern Recogn. Lett. 15 (1994).
"""

from itertools import product

import numpy as np

from aneurysm.vessels.depth import depth
from aneurysm.vessels.voxels import STEPS, Voxels

_FACES = int(sum(1 << i for i, s in enumerate(STEPS) if np.abs(s).sum() == 1))
_FACES_AND_EDGES = int(sum(1 << i for i, s in enumerate(STEPS) if np.abs(s).sum() <= 2))
_HALF = 13  # a neighbourhood of 26 bits is looked up in two halves
_BITS = np.left_shift(np.uint32(1), np.arange(26, dtype=np.uint32))
_OPPOSITE = _BITS[::-1].copy()


def _growth_table(adjacent: np.ndarray) -> np.ndarray:
    """For each half of a 26-bit set, the set of neighbours of its members: (2, 2^13) uint32."""
    reach = (adjacent.astype(np.uint32) << np.arange(26, dtype=np.uint32)).sum(1, dtype=np.uint32)
    members = np.arange(1 << _HALF, dtype=np.uint32)
    table = np.zeros((2, 1 << _HALF), np.uint32)
    for half, bit in product(range(2), range(_HALF)):
        member = (members >> np.uint32(bit)) & np.uint32(1)
        table[half] |= member * reach[half * _HALF + bit]
    return table


_APART = np.abs(STEPS[:, None] - STEPS[None])
_GROW_FOREGROUND = _growth_table(_APART.max(-1) == 1)
_GROW_BACKGROUND = _growth_table(_APART.sum(-1) == 1)


def _flood(seed: np.ndarray, inside: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Grow sets of neighbours (k,) from a seed until nothing inside can be added."""
    reached = seed
    while True:
        low, high = reached & np.uint32((1 << _HALF) - 1), reached >> np.uint32(_HALF)
        grown = (reached | table[0][low] | table[1][high]) & inside
        if np.array_equal(grown, reached):
            return reached
        reached = grown


def simple(around: np.ndarray) -> np.ndarray:
    """Whether a voxel can go without changing topology, (k,) bool.

    `around` (k,) uint32 has bit i set where neighbour i (in the order of the 26 steps) is inside the mask.
    A voxel is simple for a 26-connected mask when its inside neighbours are one 26-connected piece and its
    outside face neighbours are one 6-connected piece of the 18-neighbourhood.
    """
    one = np.uint32(1)
    outside = ~around & np.uint32(_FACES_AND_EDGES)
    faces = outside & np.uint32(_FACES)
    result = (around != 0) & (faces != 0)
    inside, outside, faces = around[result], outside[result], faces[result]
    joined = _flood(inside & (~inside + one), inside, _GROW_FOREGROUND) == inside
    reached = _flood(faces & (~faces + one), outside, _GROW_BACKGROUND)
    result[result] = joined & ((faces & ~reached) == 0)
    return result


def thin(voxels: Voxels, depth: np.ndarray, step_mm: float) -> np.ndarray:
    """Which voxels (n,) bool are left when a mask is thinned to lines with the same pieces and rings.

    Args:
        voxels: of the mask.
        depth: (n,) mm, as from `aneurysm.vessels.depth.depth`.
        step_mm: thickness of one peeled layer, usually the smallest voxel edge.
    """
    count = len(voxels)
    near = voxels.neighbours
    # The neighbours that are still there as bits; kept up to date, because most are looked at several times.
    code = np.zeros((count + 1, 4), np.uint8)
    code[:count] = np.packbits(near < count, axis=1, bitorder="little")
    code = code.view("<u4")[:, 0].astype(np.uint32)
    there = np.append(np.ones(count, bool), False)
    # Tips are judged before the eight passes: within them any border looks like a comb of tips.
    tip = np.bitwise_count(code) <= 1
    corner = voxels.index.min(0) if count else 0
    place = voxels.index - corner  # moving the mask by a voxel changes nothing
    parity = ((place & 1) @ np.array([4, 2, 1])).astype(np.uint8)
    layer = np.floor(depth / step_mm + 1e-4).astype(np.int32)
    admitted, queued = np.zeros(count + 1, bool), np.zeros(count + 1, bool)
    last = np.zeros(count + 1, np.int32)
    order = np.argsort(layer, kind="stable").astype(np.int32)
    tops = np.flatnonzero(np.diff(layer[order], append=layer.max(initial=0) + 1)) + 1
    for fresh in np.split(order, tops[:-1]) if count else ():
        admitted[fresh] = True
        waiting = [[fresh[parity[fresh] == p]] for p in range(8)]
        queued[fresh] = True
        while any(waiting):
            changed = []
            for p in range(8):
                if not waiting[p]:
                    continue
                group = np.concatenate(waiting[p])
                waiting[p] = []
                queued[group] = False
                group = group[there[group] & ~tip[group]]
                gone = group[simple(code[group])]
                if not len(gone):
                    continue
                there[gone] = False
                around = near[gone].ravel()
                left = there[around]
                around = around[left]
                # No two of a pass touch, so every (voxel, bit) is met once.
                np.subtract.at(code, around, np.tile(_OPPOSITE, len(gone))[left])
                # A voxel that could not go is asked again only when a neighbour has gone.
                once = np.arange(len(around), dtype=np.int32)
                last[around] = once
                around = around[last[around] == once]
                changed.append(around)
                again = around[admitted[around] & ~queued[around]]
                queued[again] = True
                kind = parity[again]
                for q in range(8):
                    chosen = again[kind == q]
                    if len(chosen):
                        waiting[q].append(chosen)
            for around in changed:
                tip[around] = np.bitwise_count(code[around]) <= 1
    return there[:count]


def inside_distance(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each voxel of the mask (d, h, w) to the nearest voxel outside, 0 outside.

    As `aneurysm.vessels.depth.depth`, as a float32 volume.
    """
    voxels = Voxels.of(mask)
    return voxels.to_volume(depth(voxels, spacing).astype(np.float32))


def skeletonise(mask: np.ndarray, distance: np.ndarray, step_mm: float) -> np.ndarray:
    """As `thin`, from and to volumes.

    Args:
        mask: (d, h, w) bool.
        distance: (d, h, w) depth in mm, as from `inside_distance`.
        step_mm: thickness of one peeled layer, usually the smallest voxel edge.

    Returns:
        (d, h, w) bool, a subset of the mask; 26-connected.
    """
    voxels = Voxels.of(mask)
    return voxels.only(thin(voxels, voxels.at(distance), step_mm)).to_volume()
