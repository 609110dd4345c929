"""The true centreline that skeleton recall asks for: no vessel is left out of it."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.morphology import skeletonize

from aneurysm.losses.cldice import SkeletonRecallLoss, centreline, skeleton_tube


def straight(width: int, length: slice = slice(4, 28), axis: int = 0) -> np.ndarray:
    mask = np.zeros((32, 32, 32), bool)
    mask[length, 10 : 10 + width, 12 : 12 + width] = True
    return np.moveaxis(mask, 0, axis)


def uncovered(mask: np.ndarray) -> float:
    """How far the worst voxel lies from the line, in half widths of the thickest vessel."""
    away = ndimage.distance_transform_edt(~centreline(mask))
    half = ndimage.distance_transform_edt(mask).max()
    return float(away[mask].max() / half)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7])
def test_straight_tubes_of_any_width_keep_a_line(width, axis):
    mask = straight(width, axis=axis)
    if width % 2 == 0:
        assert not skeletonize(mask).any()  # why there is something to repair
    line = centreline(mask)
    assert (line & ~mask).sum() == 0
    along = line.any(tuple(a for a in range(3) if a != axis))
    # Thinning shortens the ends by the radius; nothing in between is missing.
    found = np.flatnonzero(along)
    assert found[0] <= 4 + width and found[-1] >= 27 - width and along[found[0] : found[-1] + 1].all()


@pytest.mark.parametrize("width", [2, 4, 6])
def test_a_branch_of_even_width_is_not_lost_beside_its_parent(width):
    mask = straight(width, slice(0, 32))
    mask[14 : 14 + width, 10 : 10 + width, 12:] = True
    assert not skeletonize(mask)[:10].any()
    line = centreline(mask)
    assert line[2].any() and line[30 - width].any() and line[..., 30 - width].any()
    gaps = np.flatnonzero(np.diff(np.flatnonzero(line.any((1, 2)))) > 4)
    assert not len(gaps) and uncovered(mask) <= 2


def test_a_thin_branch_on_a_wide_vessel_keeps_its_line():
    h, w = np.mgrid[:32, :32]
    mask = np.broadcast_to((h - 15.5) ** 2 + (w - 9.5) ** 2 <= 36, (32, 32, 32)).copy()
    mask[15:17, 15:17, 10:32] = True  # two voxels wide
    line = centreline(mask)
    assert line[15:17, 15:17, 20:31].any((0, 1)).all() and line[:, :, 4:15].any((1, 2)).sum() >= 24


@pytest.mark.parametrize("seed", range(4))
def test_crooked_vessels_keep_the_line_of_the_thinning(seed):
    """Where Lee's thinning works, nothing or hardly anything is added to it."""
    rng = np.random.default_rng(seed)
    path = np.array([3, 8, 16]) + np.cumsum(rng.normal((0.6, 0.3, 0), 0.7, (40, 3)), axis=0)
    mask = np.zeros((40, 40, 40), bool)
    mask[tuple(np.clip(np.round(path), 0, 39).astype(int).T)] = True
    mask = ndimage.binary_dilation(mask, ndimage.generate_binary_structure(3, 1), iterations=2)
    lee, line = skeletonize(mask), centreline(mask)
    assert (line & lee).sum() == lee.sum() and (line & ~lee).sum() <= 0.1 * lee.sum()


def test_nothing_and_everything():
    assert not centreline(np.zeros((6, 6, 6))).any()
    assert centreline(np.ones((6, 6, 6))).any()
    assert not skeleton_tube(np.zeros((6, 6, 6)), 2).any()
    single = np.zeros((6, 6, 6))
    single[2, 3, 4] = 1
    assert centreline(single).sum() == 1


def test_a_missed_vessel_of_even_width_costs():
    """With skimage's skeleton alone this vessel would have no centreline, and its loss would be free."""
    target = torch.from_numpy(straight(4)[None, None].astype(np.float32))
    loss = SkeletonRecallLoss(dilations=0)
    assert float(loss(torch.full_like(target, -9.0), target)[1]["skeleton_recall"]) > 0.99
    assert float(loss(20 * target - 10, target)[1]["skeleton_recall"]) < 1e-3


@pytest.mark.parametrize("dilations", [0, 1, 2])
def test_what_the_loader_draws_is_what_the_loss_would(dilations):
    target = torch.zeros(2, 2, 32, 32, 32)
    target[0, 0] = torch.from_numpy(straight(3))
    target[1, 1] = torch.from_numpy(straight(2, axis=2))
    logits = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)) + 2 * target
    loss = SkeletonRecallLoss(dilations=dilations)
    drawn = torch.from_numpy(np.stack([loss.beside(scan.numpy()) for scan in target]))
    assert drawn.dtype == torch.bool and drawn.shape == target.shape
    valid = torch.tensor([[True, False], [True, True]])
    torch.testing.assert_close(loss(logits, target, valid, drawn)[0], loss(logits, target, valid)[0])
