"""The lumen mask: thin branches of the tree are kept, specks away from it are not."""

import numpy as np
import pytest

from aneurysm.data.scan import Grid
from aneurysm.vessels.lumen_rule import LumenRule

GRID = Grid((40, 40, 40), np.diag([0.75, 0.75, 0.75, 1.0])[[2, 1, 0, 3]])


def tree_and_specks() -> tuple[np.ndarray, np.ndarray]:
    """A sure trunk, a faint branch on it, faint specks and one bright speck elsewhere; and the truth."""
    probability = np.zeros(GRID.shape, np.float32)
    probability[:, 18:22, 18:22] = 0.9
    probability[20, 20, 22:34] = 0.3
    truth = probability > 0
    probability[::8, 4, 4:30:6] = 0.4
    probability[5:7, 35:37, 35:37] = 0.95  # 8 voxels, 3.4 mm3
    return probability, truth


def test_branches_are_kept_and_specks_are_not():
    probability, truth = tree_and_specks()
    np.testing.assert_array_equal(LumenRule(0.2, 0.8)(probability, GRID), truth)
    # A bare threshold would have to give up the branch or take the specks.
    assert ((probability >= 0.2) != truth).any() and ((probability >= 0.5) != truth).any()
    assert not LumenRule(0.2, 0.97)(probability, GRID).any()


def test_the_rule_reaches_the_recall_it_is_asked_for():
    rng = np.random.default_rng(0)
    scans, targets = [], []
    for _ in range(3):
        probability, truth = tree_and_specks()
        noisy = np.clip(probability + rng.normal(0, 0.1, probability.shape), 0, 1)
        scans.append(noisy.astype(np.float32))
        targets.append(truth)
    grids = [GRID] * 3
    rules = [LumenRule.for_recall(scans, targets, grids, recall, 0.5) for recall in (0.6, 0.9, 0.99)]
    assert rules[0].threshold > rules[1].threshold > rules[2].threshold
    for rule, recall in zip(rules, (0.6, 0.9, 0.99), strict=True):
        masks = [rule(p, GRID) for p in scans]
        found = sum(int(m[t].sum()) for m, t in zip(masks, targets, strict=True))
        wanted = sum(int(t.sum()) for t in targets)
        assert found / wanted >= recall
        # One step higher misses it: the threshold is the highest.
        higher = LumenRule(rule.threshold + 1 / 255, rule.core)
        assert (
            sum(int(higher(p, GRID)[t].sum()) for p, t in zip(scans, targets, strict=True)) < recall * wanted
        )


def test_precision_bounds_what_recall_may_cost():
    probability, truth = tree_and_specks()
    halo = np.zeros(GRID.shape, bool)
    halo[:, 10:30, 10:30] = True
    vague = np.where(halo & (probability == 0), np.float32(0.1), probability)
    missed = truth.copy()
    missed[2, 2, :30] = True  # never found
    rules = [LumenRule.for_recall([vague], [missed], [GRID], 0.99, p) for p in (0.0, 0.5, 0.9)]
    assert rules[0].threshold <= 1 / 255
    assert rules[1].threshold == rules[2].threshold == pytest.approx(26 / 255)  # just above the halo
    mask = rules[1](vague, GRID)
    assert (mask & missed).sum() / mask.sum() > 0.9


def test_a_scan_on_which_the_net_failed_does_not_lower_the_threshold_of_all_others():
    probability, truth = tree_and_specks()
    failed = np.where(truth, np.float32(0.01), probability)
    good = LumenRule.for_recall([probability] * 9, [truth] * 9, [GRID] * 9, 0.99, 0.0)
    with_failure = LumenRule.for_recall([failed, *[probability] * 9], [truth] * 10, [GRID] * 10, 0.99, 0.0)
    assert with_failure == good
    # Among a handful of scans none can be called the exception.
    few = LumenRule.for_recall([failed, probability], [truth] * 2, [GRID] * 2, 0.99, 0.0)
    assert few.threshold < good.threshold


def test_nothing_known_gives_a_rule_all_the_same():
    _, truth = tree_and_specks()
    nothing = np.full(GRID.shape, 0.001, np.float32)
    rule = LumenRule.for_recall([nothing], [truth], [GRID], 0.9, 0.5)
    assert not rule(nothing, GRID).any()
    unlabelled = LumenRule.for_recall([nothing], [np.zeros(GRID.shape, bool)], [GRID], 0.9, 0.5)
    assert (unlabelled.threshold, unlabelled.core) == (0.5, 0.5)


def test_wrong_input():
    with pytest.raises(ValueError, match="between 0 and 1"):
        LumenRule(0.0, 0.5)
    with pytest.raises(ValueError, match="shape"):
        LumenRule(0.2, 0.5)(np.zeros((2, 2, 2)), GRID)
