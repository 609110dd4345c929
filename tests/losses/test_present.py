"""What every segmentation loss owes to unknown annotations."""

import math

import pytest
import torch
from torch import nn

from aneurysm.losses.cbdice import CbDiceLoss
from aneurysm.losses.cldice import ClDiceLoss, SkeletonRecallLoss
from aneurysm.losses.deep_supervision import DeepSupervision
from aneurysm.losses.dice_ce import DiceCELoss, DiceLoss
from aneurysm.losses.present import known_channels
from aneurysm.losses.tversky import FocalTverskyLoss, TverskyLoss
from aneurysm.losses.weighted_sum import WeightedSum

LOSSES = [
    TverskyLoss(),
    TverskyLoss(batch=False),
    FocalTverskyLoss(),
    DiceLoss(),
    DiceLoss(batch=False),
    DiceCELoss(),
    ClDiceLoss(),
    SkeletonRecallLoss(),
    CbDiceLoss(),
    WeightedSum({"tversky": TverskyLoss(ce_weight=1.0), "recall": SkeletonRecallLoss()}, {"recall": 0.5}),
    DeepSupervision(DiceCELoss()),
]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.zeros(2, 2, 10, 9, 8)
    target[0, :, 2:8, 3:6, 3:6] = 1
    target[1, :, 1:4, 2:5, 2:8] = 1
    return torch.randn(2, 2, 10, 9, 8, generator=generator) + 3 * target, target


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_unknown_channels_neither_count_nor_learn(loss: nn.Module) -> None:
    logits, target = batch()
    valid = torch.tensor([[True, False], [True, False]])
    logits.requires_grad_()
    value, _ = loss(logits, target, valid)
    value.backward()
    assert logits.grad is not None
    assert logits.grad[:, 1].abs().max() == 0
    assert logits.grad[:, 0].abs().max() > 0
    other = target.clone()
    other[:, 1] = math.nan
    torch.testing.assert_close(loss(logits, other, valid)[0], value)
    torch.testing.assert_close(loss(logits[:, :1], target[:, :1])[0], value)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_an_unknown_scan_does_not_change_the_loss_of_the_other(loss: nn.Module) -> None:
    logits, target = batch()
    valid = torch.tensor([[True, True], [False, False]])
    torch.testing.assert_close(loss(logits, target, valid)[0], loss(logits[:1], target[:1])[0])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_nothing_known_is_zero_and_differentiable(loss: nn.Module) -> None:
    logits, target = batch()
    logits.requires_grad_()
    value, terms = loss(logits, target, torch.zeros(2, 2, dtype=torch.bool))
    value.backward()
    assert float(value) == 0 and all(float(term) == 0 for term in terms.values())
    assert logits.grad is not None and logits.grad.abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_better_predictions_cost_less_and_losses_stay_positive(loss: nn.Module) -> None:
    _, target = batch()
    values = [float(loss(sharpness * (2 * target - 1), target)[0]) for sharpness in (0.5, 2.0, 8.0)]
    assert values[0] > values[1] > values[2] >= 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_gradients_are_those_of_the_formula(loss: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.zeros(2, 1, 3, 4, 3, dtype=torch.float64)
    target[0, :, :2, 1:3, :2] = 1
    logits = torch.randn(target.shape, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target)[0], logits, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_bfloat16_logits_are_counted_in_full_precision(loss: nn.Module) -> None:
    logits, target = batch()
    logits = logits.bfloat16()
    value, _ = loss(logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), target)[0])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_patch_without_vessels_is_finite_and_pushes_down(loss: nn.Module) -> None:
    logits = torch.full((1, 1, 8, 8, 8), -1.0, requires_grad=True)
    value, _ = loss(logits, torch.zeros(1, 1, 8, 8, 8))
    value.backward()
    assert (
        torch.isfinite(value) and logits.grad is not None and (logits.grad >= 0).all() and logits.grad.any()
    )


def test_half_precision_counts_a_large_volume() -> None:
    """2 * 10^5 voxels of one class: a float16 sum would be infinite."""
    target = torch.ones(1, 1, 60, 60, 60)
    value, _ = TverskyLoss()(torch.full_like(target, 5.0).half(), target)
    assert value.dtype == torch.float32 and float(value) == pytest.approx(0.0047, abs=1e-3)


def test_shapes_are_checked_with_a_hint() -> None:
    logits = torch.zeros(1, 2, 4, 4, 4)
    # the plain function: under the tests' type checks the annotation would complain first
    check = getattr(known_channels, "__wrapped__", known_channels)
    with pytest.raises(Exception, match=r"one shape|target"):
        check(logits, torch.zeros(1, 1, 4, 4, 4), None)
