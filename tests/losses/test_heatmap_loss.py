"""The heat-map loss by hand, and that it teaches a peak."""

import math

import pytest
import torch

from aneurysm.losses.dice_ce import DiceCELoss
from aneurysm.losses.heatmap import HeatmapLoss, WithHeatmap

SHAPE = (1, 1, 1, 1, 2)


def test_values_by_hand():
    logits = torch.tensor([0.0, math.log(3)]).reshape(SHAPE)  # p = 0.5, 0.75
    target = torch.tensor([1.0, 0.25]).reshape(SHAPE)
    entropy = math.log(2), -(0.25 * math.log(0.75) + 0.75 * math.log(0.25))
    focal, terms = HeatmapLoss("focal", gamma=2.0, least_mass=1.0)(logits, target)
    by_hand = (0.25 * entropy[0] + 0.25 * entropy[1]) / 1.25
    assert float(focal) == pytest.approx(by_hand, rel=1e-5) and float(terms["heatmap"]) == float(focal)
    plain, _ = HeatmapLoss("bce", positive_weight=4.0, least_mass=10.0)(logits, target)
    assert float(plain) == pytest.approx((5 * entropy[0] + 2 * entropy[1]) / 10, rel=1e-5)


def test_unknown_scans_do_not_count_whatever_they_hold():
    logits = torch.randn(2, 1, 4, 4, 4, requires_grad=True)
    target = torch.rand(2, 1, 4, 4, 4)
    target[1] = torch.nan
    known = torch.tensor([[True], [False]])
    loss, _ = HeatmapLoss(least_mass=1.0)(logits, target, known)
    alone, _ = HeatmapLoss(least_mass=1.0)(logits[:1], target[:1])
    assert float(loss.detach()) == pytest.approx(float(alone.detach()))
    loss.backward()
    assert logits.grad is not None and (logits.grad[1] == 0).all() and (logits.grad[0] != 0).any()


@pytest.mark.parametrize("kind", ["focal", "bce"])
def test_descent_raises_the_peak_above_everything_else(kind: str):
    target = torch.zeros(1, 1, 7, 7, 7)
    target[0, 0, 3, 3, 3], target[0, 0, 3, 3, 4] = 1.0, 0.5
    logits = torch.full_like(target, -2.0, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.2)
    for _ in range(60):
        loss, _ = HeatmapLoss(kind)(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    p = torch.sigmoid(logits.detach())[0, 0]
    assert p[3, 3, 3] > 0.7 > p[3, 3, 4] > 0.3 > p[0, 0, 0]


def test_masks_and_heat_map_have_losses_of_their_own():
    logits, target = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4).round()
    masks, peaks = DiceCELoss(), HeatmapLoss()
    total, terms = WithHeatmap(masks, peaks, weight=3.0)(logits, target)
    expected = masks(logits[:, :2], target[:, :2])[0] + 3 * peaks(logits[:, 2:], target[:, 2:])[0]
    assert float(total) == pytest.approx(float(expected), rel=1e-5) and "heatmap" in terms
    with pytest.raises(ValueError, match="focal, bce"):
        HeatmapLoss("mse")
    with pytest.raises(ValueError, match="weight"):
        WithHeatmap(masks, peaks, 0.0)
