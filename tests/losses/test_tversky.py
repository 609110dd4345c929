from pathlib import Path

import numpy as np
import pytest
import torch

from aneurysm.losses.tversky import FocalTverskyLoss, TverskyLoss


def voxels(found: int, missed: int, false: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Saturated logits and a target with the given numbers of voxels, shape (1, 1, 10, 10, 10)."""
    logits, target = torch.full((1000,), -30.0), torch.zeros(1000)
    target[: found + missed] = 1
    logits[:found] = 30
    logits[found + missed : found + missed + false] = 30
    return logits.reshape(1, 1, 10, 10, 10), target.reshape(1, 1, 10, 10, 10)


def test_golden_values(golden: Path) -> None:
    ref = np.load(golden / "tversky.npz")
    logits, target = torch.from_numpy(ref["logits"]), torch.from_numpy(ref["target"])
    for exponent, key in ((1.0, "tversky_fn0p7_per_sample"), (0.75, "focal_tversky_exp_0p75")):
        loss, _ = TverskyLoss(0.7, 0.3, exponent, smooth=1e-5, batch=False)(logits, target)
        assert float(loss) == pytest.approx(ref[key].mean(), abs=1e-6)
    loss, _ = FocalTverskyLoss(exponent=4 / 3, smooth=1e-5, batch=False)(logits, target)
    assert float(loss) == pytest.approx(ref["focal_tversky_exp_4over3"].mean(), abs=1e-6)
    loss, _ = TverskyLoss(fn_weight=0.3, fp_weight=0.7, smooth=1e-5, batch=False)(logits, target)
    assert float(loss) == pytest.approx(float(ref["monai_alpha0p7_beta0p3_mean"]), abs=1e-6)


def test_fn_weight_prices_missed_voxels() -> None:
    loss = TverskyLoss(fn_weight=0.7, fp_weight=0.3, smooth=1e-5)
    missed, _ = loss(*voxels(found=300, missed=200, false=0))
    false, _ = loss(*voxels(found=500, missed=0, false=200))
    assert float(missed) == pytest.approx(1 - 300 / (300 + 0.7 * 200), abs=1e-5)
    assert float(false) == pytest.approx(1 - 500 / (500 + 0.3 * 200), abs=1e-5)


def test_batch_counts_match_the_slow_formula() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(3, 2, 4, 5, 6), (torch.rand(3, 2, 4, 5, 6) > 0.8).float()
    p = torch.sigmoid(logits)
    expected = []
    for c in range(2):
        tp = (p[:, c] * target[:, c]).sum()
        fn, fp = ((1 - p[:, c]) * target[:, c]).sum(), (p[:, c] * (1 - target[:, c])).sum()
        expected.append((1 - (tp + 1) / (tp + 0.6 * fn + 0.4 * fp + 1)) ** 0.75)
    loss, terms = TverskyLoss(0.6, 0.4, 0.75)(logits, target)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert list(terms) == ["tversky"]


def test_a_patch_without_foreground_still_teaches() -> None:
    """A batch of one empty patch: the gradient must push false positives down."""
    logits = torch.full((1, 1, 8, 8, 8), -3.0, requires_grad=True)
    loss, _ = TverskyLoss()(logits, torch.zeros(1, 1, 8, 8, 8))
    loss.backward()
    assert logits.grad is not None and (logits.grad > 0).all()


def test_focal_exponent_has_a_finite_gradient_at_the_optimum() -> None:
    logits, target = voxels(500, 0, 0)
    logits.requires_grad_()
    loss, terms = FocalTverskyLoss()(logits, target)
    loss.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and list(terms) == ["focal_tversky"]


def test_nonsense_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="not both 0"):
        TverskyLoss(fn_weight=0.0, fp_weight=0.0)
    with pytest.raises(ValueError, match="exponent and smooth"):
        TverskyLoss(exponent=0.0)
