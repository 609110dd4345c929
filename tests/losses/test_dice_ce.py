import pytest
import torch
import torch.nn.functional as F

from aneurysm.losses.dice_ce import DiceCELoss, DiceLoss


def test_dice_is_the_slow_formula() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, 6), (torch.rand(2, 3, 4, 5, 6) > 0.7).float()
    p = torch.sigmoid(logits)
    per_scan = 1 - (2 * (p * target).sum((2, 3, 4)) + 1e-5) / ((p + target).sum((2, 3, 4)) + 1e-5)
    torch.testing.assert_close(DiceLoss(smooth=1e-5, batch=False)(logits, target)[0], per_scan.mean())
    pooled = 1 - (2 * (p * target).sum((0, 2, 3, 4)) + 1) / ((p + target).sum((0, 2, 3, 4)) + 1)
    torch.testing.assert_close(DiceLoss()(logits, target)[0], pooled.mean())


def test_weighted_sum_and_cross_entropy_over_annotated_voxels_only() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 4, 4, 4), (torch.rand(2, 2, 4, 4, 4) > 0.7).float()
    valid = torch.tensor([[True, False], [True, True]])
    total, terms = DiceCELoss(dice_weight=0.5, ce_weight=2.0)(logits, target, valid)
    ce = F.binary_cross_entropy_with_logits(logits[valid], target[valid])
    torch.testing.assert_close(terms["ce"], ce)
    torch.testing.assert_close(total, 0.5 * terms["dice"] + 2 * ce)


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="not both 0"):
        DiceCELoss(0.0, 0.0)
