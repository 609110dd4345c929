from pathlib import Path

import numpy as np
import pytest
import torch

from aneurysm.losses.cldice import ClDiceLoss, SkeletonRecallLoss, skeleton_tube


def tubes(radius: int) -> torch.Tensor:
    """Two scans with one straight vessel each, (2, 1, 24, 16, 16)."""
    h, w = np.mgrid[:16, :16]
    disc = (h - 8) ** 2 + (w - 8) ** 2 <= radius**2
    target = torch.zeros(2, 1, 24, 16, 16)
    target[:, 0, 2:22] = torch.from_numpy(disc.astype(np.float32))
    return target


def test_golden_soft_centreline(golden: Path) -> None:
    ref = np.load(golden / "cldice_skelrecall.npz")
    logits, target = torch.logit(torch.from_numpy(ref["pred"])), torch.from_numpy(ref["target"])
    for iterations, key, tolerance in ((3, "monai_iter3", 1e-6), (10, "monai_iter10", 1e-6)):
        _, terms = ClDiceLoss(iterations=iterations)(logits, target)
        assert float(terms["cldice"]) == pytest.approx(float(ref[key]), abs=tolerance)
    # the authors' own code has no 1e-4 in its harmonic mean
    assert float(terms["cldice"]) == pytest.approx(float(ref["jocpae_soft_cldice"]), abs=1e-4)


def test_golden_skeleton_recall(golden: Path) -> None:
    ref = np.load(golden / "cldice_skelrecall.npz")
    logits, target = torch.logit(torch.from_numpy(ref["pred"])), torch.from_numpy(ref["target"])
    np.testing.assert_array_equal(skeleton_tube(ref["target"][0, 0], 0), ref["skeleton"])
    np.testing.assert_array_equal(skeleton_tube(ref["target"][0, 0], 2), ref["tube"] > 0)
    _, terms = SkeletonRecallLoss(dilations=2)(logits, target)
    assert float(terms["skeleton_recall"]) == pytest.approx(1 + float(ref["skeleton_recall_loss"]), abs=1e-6)


@pytest.mark.parametrize("term", ["cldice", "skeleton_recall"])
def test_a_gap_costs_more_on_the_centreline_than_in_volume(term: str) -> None:
    """Equal numbers of missed voxels: a thinner wall keeps the vessel whole, a gap cuts it."""
    target = tubes(3)
    loss = ClDiceLoss(iterations=4) if term == "cldice" else SkeletonRecallLoss(dilations=0)
    gap = target.clone()
    gap[:, :, 10:14] = 0
    lost = int((target - gap).sum())
    wall = torch.nonzero(target - tubes(2))
    shaved = target.clone()
    shaved[tuple(wall[torch.linspace(0, len(wall) - 1, lost).long()].T)] = 0
    cut, dented = loss(20 * gap - 10, target)[1], loss(20 * shaved - 10, target)[1]
    assert float(cut["dice"]) == pytest.approx(float(dented["dice"]), abs=0.01)
    assert float(cut[term]) > 2 * float(dented[term])


def test_total_mixes_the_terms() -> None:
    target = tubes(2)
    total, terms = ClDiceLoss(share=0.3)(torch.zeros_like(target), target)
    torch.testing.assert_close(total, 0.7 * terms["dice"] + 0.3 * terms["cldice"])
    total, terms = SkeletonRecallLoss(weight=0.4)(torch.zeros_like(target), target)
    torch.testing.assert_close(total, terms["dice"] + 0.4 * terms["skeleton_recall"])


def test_no_vessel_in_the_patch_is_finite() -> None:
    empty = torch.zeros(1, 1, 8, 8, 8)
    for loss in (ClDiceLoss(), SkeletonRecallLoss()):
        logits = torch.zeros(1, 1, 8, 8, 8, requires_grad=True)
        value, _ = loss(logits, empty)
        value.backward()
        assert torch.isfinite(value) and logits.grad is not None and torch.isfinite(logits.grad).all()
