"""Centreline Dice that knows radii."""

import numpy as np
import pytest
import torch

from aneurysm.losses.cbdice import CbDiceLoss, soft_centreline
from aneurysm.losses.cldice import ClDiceLoss


def vessel(radius: float, shift: float = 0.0, length: slice = slice(2, 22)) -> torch.Tensor:
    """A straight vessel, (1, 1, 24, 24, 24)."""
    h, w = np.mgrid[:24, :24]
    disc = (h - 11 - shift) ** 2 + (w - 11) ** 2 <= radius**2
    mask = torch.zeros(1, 1, 24, 24, 24)
    mask[:, :, length] = torch.from_numpy(disc.astype(np.float32))
    return mask


def cost(found: torch.Tensor, truth: torch.Tensor, kind: type = CbDiceLoss) -> float:
    term = {CbDiceLoss: "cbdice", ClDiceLoss: "cldice"}[kind]
    return float(kind(iterations=7)(20 * found - 10, truth)[1][term])


@pytest.mark.parametrize("radius", [0.5, 1, 2, 3.5, 5])
def test_a_perfect_answer_costs_nothing(radius):
    assert cost(vessel(radius), vessel(radius)) == pytest.approx(0, abs=2e-3)


def test_radius_and_depth_are_those_of_the_vessel():
    for radius in (1, 3, 5):
        line, r, depth = soft_centreline(vessel(radius), 7)
        on = line > 0.5
        middle = (slice(None), slice(None), slice(8, 16))
        assert on[middle].any((3, 4)).all()  # unbroken
        assert abs(float(depth[0, 0, 12, 11, 11]) - (radius + 1)) <= 1
        torch.testing.assert_close(r[on], depth[on])  # the line lies where its radius says


def test_width_is_seen_where_cldice_is_blind():
    truth = vessel(2)
    for other in (vessel(4), vessel(1)):
        assert cost(other, truth) > 0.25 > 0.15 > cost(other, truth, ClDiceLoss)


def test_a_shift_by_half_the_width_is_seen():
    truth = vessel(4)
    costs = [cost(vessel(4, shift), truth) for shift in (0, 1, 2, 4, 6)]
    assert costs == sorted(costs) and costs[2] > 0.2
    assert cost(vessel(4, 2), truth, ClDiceLoss) < 0.5 * costs[2]


def test_a_gap_is_not_weighed_by_volume():
    """A fifth of the length is missing, of a vessel of radius 1 and of one of 4 with ten times the voxels.

    It still costs somewhat more in the wide one: the gap's ends taper over a radius.
    """
    gaps = []
    for radius in (1, 4):
        cut = vessel(radius)
        cut[:, :, 10:14] = 0
        gaps.append(cost(cut, vessel(radius)))
    assert 0.05 < gaps[0] < 0.3 and 0.5 < gaps[1] / gaps[0] < 4 < vessel(4).sum() / vessel(1).sum()


def test_a_missing_thin_vessel_costs_more_than_its_volume():
    both = vessel(5)
    both[:, :, 2:22, 20:22, 20:22] = 1
    terms = CbDiceLoss(iterations=7)(20 * vessel(5) - 10, both)[1]
    assert float(terms["cbdice"]) > 3 * float(terms["dice"])


def test_options():
    target = vessel(2)
    logits = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)) + target
    total, terms = CbDiceLoss(share=0.3)(logits, target)
    torch.testing.assert_close(total, 0.7 * terms["dice"] + 0.3 * terms["cbdice"])
    # A vessel deeper than the erosions has no centreline left, and only Dice sees it.
    assert cost(vessel(1), vessel(5)) > 0.3
    assert float(CbDiceLoss(iterations=1)(20 * vessel(1) - 10, vessel(9))[1]["cbdice"]) < 0.9
    pair = torch.cat([target, torch.zeros_like(target)])
    answers = torch.cat([logits, logits])
    by_batch, by_scan = CbDiceLoss(batch=True), CbDiceLoss(batch=False, smooth=3.0)
    assert float(by_batch(answers, pair)[1]["dice"]) != float(by_scan(answers, pair)[1]["dice"])
    with pytest.raises(ValueError, match="share"):
        CbDiceLoss(share=1.5)
    with pytest.raises(ValueError, match="iterations"):
        CbDiceLoss(iterations=0)


def test_it_teaches_the_way_to_the_vessel():
    """Plain gradient descent on the logits of a broken, too thin answer mends it."""
    truth = vessel(3)
    start = vessel(1)
    start[:, :, 10:14] = 0
    logits = (4 * start - 2).requires_grad_()
    optimiser = torch.optim.Adam([logits], 0.3)
    loss = CbDiceLoss(share=0.5, iterations=5)
    for _ in range(60):
        optimiser.zero_grad()
        loss(logits, truth)[0].backward()
        optimiser.step()
    found = (logits.detach() > 0).float()
    assert float(2 * (found * truth).sum() / (found.sum() + truth.sum())) > 0.97
