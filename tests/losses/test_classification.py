import math

import pytest
import torch
import torch.nn.functional as F

from aneurysm.losses.classification import BinaryFocalLoss, BinaryLoss, LocationLoss, OffsetLoss


@pytest.mark.parametrize("loss", [BinaryLoss(), BinaryFocalLoss()], ids=lambda loss: type(loss).__name__)
def test_unknown_labels_are_skipped(loss: torch.nn.Module) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 14, requires_grad=True)
    target = (torch.rand(4, 14) > 0.7).float()
    holes = target.clone()
    holes[:, 3:9] = math.nan
    value, _ = loss(logits, holes)
    value.backward()
    assert logits.grad is not None and logits.grad[:, 3:9].abs().max() == 0
    keep = ~torch.isnan(holes)
    torch.testing.assert_close(value, loss(logits[keep], target[keep])[0])
    empty, _ = loss(logits, torch.full((4, 14), math.nan))
    empty.backward()
    assert float(empty) == 0


def test_binary_loss_is_weighted_cross_entropy() -> None:
    logits, target = torch.tensor([0.3, -1.2]), torch.tensor([1.0, 0.0])
    p = torch.sigmoid(logits)
    expected = -(3 * torch.log(p[0]) + torch.log(1 - p[1])) / 2
    torch.testing.assert_close(BinaryLoss(positive_weight=3.0)(logits, target)[0], expected)
    smooth = F.binary_cross_entropy(p, torch.tensor([0.95, 0.05]))
    torch.testing.assert_close(BinaryLoss(smoothing=0.1)(logits, target)[0], smooth)


def test_focal_loss_is_equation_5() -> None:
    logits, target = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.0, 0.0])
    p = torch.sigmoid(logits)
    truth = torch.where(target == 1, p, 1 - p)
    alpha = torch.where(target == 1, 0.25, 0.75)
    expected = (-((1 - truth) ** 2) * torch.log(truth)).mean()
    torch.testing.assert_close(BinaryFocalLoss(gamma=2.0)(logits, target)[0], expected)
    expected = (-alpha * (1 - truth) ** 1.5 * torch.log(truth)).mean()
    torch.testing.assert_close(BinaryFocalLoss(gamma=1.5, alpha=0.25)(logits, target)[0], expected)


def test_location_skips_negative_targets() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 13, requires_grad=True)
    target = torch.tensor([3, -1, 12, -1, 0])
    value, _ = LocationLoss()(logits, target)
    torch.testing.assert_close(value, F.cross_entropy(logits[[0, 2, 4]], target[[0, 2, 4]]))
    value.backward()
    assert logits.grad is not None and logits.grad[[1, 3]].abs().max() == 0
    nothing, _ = LocationLoss()(logits, torch.full((5,), -1))
    nothing.backward()
    assert float(nothing) == 0


def test_offset_skips_invalid_and_unknown() -> None:
    offset = torch.tensor([[0.2, 0.0, 0.0], [5.0, 5.0, 5.0], [3.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0, 0.0], [math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    value, _ = OffsetLoss(beta=1.0)(offset, target)
    assert float(value) == pytest.approx((0.5 * 0.04 + 2.5) / 3 / 2)
    value, terms = OffsetLoss()(offset, target, torch.tensor([True, True, False]))
    value.backward()
    assert float(terms["offset"]) == pytest.approx(0.02 / 3)
    assert offset.grad is not None and offset.grad[1:].abs().max() == 0
