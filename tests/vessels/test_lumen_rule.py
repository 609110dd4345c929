"""The lumen mask: thin branches of the tree are kept, specks away from it are not."""

import numpy as np
import pytest

from aneurysm.data.scan import Grid
from aneurysm.vessels.hysteresis import CORES, RuleCounts, count_rules
from aneurysm.vessels.lumen_rule import LumenRule, LumenRules, choose_rule, choose_rules

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


def counted(probability: np.ndarray, truth: np.ndarray) -> RuleCounts:
    return count_rules(probability.astype(np.float32), truth, GRID)


def noisy_scans(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    scans = []
    for _ in range(count):
        probability, truth = tree_and_specks()
        noisy = np.clip(probability + rng.normal(0, 0.1, probability.shape), 0, 1)
        scans.append((noisy.astype(np.float32), truth))
    return scans


def mean_recall_and_dice(rule: LumenRule, scans: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    masks = [(rule(p, GRID), t) for p, t in scans]
    recall = np.mean([m[t].mean() for m, t in masks])
    return float(recall), float(np.mean([2 * (m & t).sum() / (m.sum() + t.sum()) for m, t in masks]))


def test_the_rule_has_the_best_dice_above_the_floor():
    scans = noisy_scans(3)
    counts = [counted(p, t) for p, t in scans]
    choices = [choose_rule(counts, floor, 0.5) for floor in (0.6, 0.99, 0.997)]
    for choice, floor in zip(choices, (0.6, 0.99, 0.997), strict=True):
        recall, dice = mean_recall_and_dice(choice.rule, scans)
        assert choice.met and recall >= floor
        assert (choice.recall, choice.dice) == pytest.approx((recall, dice))
    # A low floor does not bind; where it binds, the next threshold misses it.
    assert choices[0].dice >= choices[1].dice > choices[2].dice
    assert choices[0].rule.threshold >= choices[1].rule.threshold > choices[2].rule.threshold
    bound = choices[2].rule
    assert mean_recall_and_dice(LumenRule(bound.threshold + 1 / 255, bound.core), scans)[0] < 0.997
    # No other rule that meets the floor is better.
    rivals = [LumenRule(level / 255, core / 255) for level in range(5, 90, 6) for core in (128, 204, 242)]
    figures = [mean_recall_and_dice(rival, scans) for rival in rivals]
    assert max(dice for recall, dice in figures if recall >= 0.99) <= choices[1].dice + 1e-9


def test_the_floor_is_one_of_the_mean_over_scans_not_of_all_voxels_together():
    easy, truth = tree_and_specks()
    hard = np.where(truth, 0.3 * easy, 0).astype(np.float32)
    hard[10:20, 18:22, 18:22] = 0.9  # sure of a part
    small = truth.copy()
    small[20:] = False
    counts = [counted(easy, truth), counted(np.where(small, hard, 0), small)]
    choice = choose_rule(counts, 0.95)
    assert choice.met and choice.recall >= 0.95
    assert choice.rule.threshold <= 0.27


def test_confidence_asks_for_more_where_scans_differ():
    """With the mean the floor holds in about half of new samples, with a lower bound more often."""
    rng = np.random.default_rng(5)
    level = np.arange(256)
    scans = []
    for middle in rng.normal(110, 16, 120):  # lumen that fades at another level in every scan
        hits = np.tile(1000 / (1 + np.exp((level - middle) / 10)), (len(CORES), 1)).astype(int)
        marked = hits + np.tile(4000 * np.exp(-level / 60), (len(CORES), 1)).astype(int)
        scans.append(RuleCounts(hits, marked, 1000))
    reached, dice = {}, {}
    for confidence in (0.5, 0.9):
        chosen = [choose_rule(scans[k : k + 8], 0.95, 0.0, confidence) for k in range(0, 120, 8)]
        levels = [round(choice.rule.threshold * 255) for choice in chosen]
        everywhere = [np.mean([scan.recall[0, one] for scan in scans]) for one in levels]
        reached[confidence] = np.mean(np.array(everywhere) >= 0.95)
        dice[confidence] = np.mean([np.mean([scan.dice[0, one] for scan in scans]) for one in levels])
    assert reached[0.5] <= 0.65 and reached[0.9] >= reached[0.5] + 0.15
    assert dice[0.9] < dice[0.5]  # that is its price


def test_precision_bounds_what_recall_may_cost():
    probability, truth = tree_and_specks()
    halo = np.zeros(GRID.shape, bool)
    halo[:, 10:30, 10:30] = True
    vague = np.where(halo & (probability == 0), np.float32(0.1), probability)
    missed = truth.copy()
    missed[2, 2, :30] = True  # never found
    missed[:6, 11, 11:29] = True  # in the halo
    choices = [choose_rule([counted(vague, missed)], 0.99, p) for p in (0.0, 0.5, 0.9)]
    assert not any(choice.met for choice in choices)
    assert (choices[0].rule(vague, GRID) & halo & ~truth).any()  # nothing forbids the halo
    for choice, least in zip(choices[1:], (0.5, 0.9), strict=True):
        mask = choice.rule(vague, GRID)
        assert not (mask & halo & ~truth).any()
        assert (mask & missed).sum() / mask.sum() > least


def test_a_scan_on_which_the_net_failed_does_not_lower_the_threshold_of_all_others():
    probability, truth = tree_and_specks()
    failed = np.where(truth, np.float32(0.01), probability)
    good = choose_rule([counted(probability, truth)] * 9, 0.99)
    nine = [counted(probability, truth)] * 9
    with_failure = choose_rule([counted(failed, truth), *nine], 0.99)
    assert with_failure.rule == good.rule and (with_failure.left_out, good.left_out) == (1, 0)
    assert with_failure.recall < 0.99  # it is told all the same
    # Among a handful of scans none can be called the exception.
    few = choose_rule([counted(failed, truth), counted(probability, truth)], 0.99)
    assert not few.met and few.left_out == 0


def test_a_failure_that_a_low_threshold_brings_back_takes_part():
    probability, truth = tree_and_specks()
    faint = np.where(truth, np.float32(0.1), np.float32(0))
    faint[:, 19:21, 19:21] = 0.99
    choice = choose_rule([counted(faint, truth), *[counted(probability, truth)] * 9], 0.99)
    assert choice.met and choice.left_out == 0 and choice.rule.threshold <= 26 / 255


def test_nothing_known_gives_a_rule_all_the_same():
    _, truth = tree_and_specks()
    nothing = np.full(GRID.shape, 0.001, np.float32)
    choice = choose_rule([counted(nothing, truth)], 0.9, 0.5)
    assert not choice.met and not choice.rule(nothing, GRID).any()
    unlabelled = choose_rule([counted(nothing, np.zeros(GRID.shape, bool))], 0.9, 0.5)
    assert unlabelled.rule == LumenRule(0.5, 0.5) and unlabelled.scans == 0


def test_a_modality_with_enough_scans_has_its_own_rule():
    scans = noisy_scans(3)
    faint = [(p * np.float32(0.4), t) for p, t in noisy_scans(3, seed=1)]
    for p, _ in faint:
        p[:, 19:21, 19:21] = 0.95
    counts = {
        "MRA": [counted(p, t) for p, t in scans],
        "T2": [counted(p, t) for p, t in faint],
        "T1": [counted(*scans[0])],
    }
    common, _ = choose_rules(counts, 0.98)
    own, _ = choose_rules(counts, 0.98, per_modality=True)
    assert not common.by_modality and own.common == common.common
    assert set(own.by_modality) == {"MRA", "T2"}  # one T1 scan is too few
    assert own.of("T1") == own.common and own.of("T2").threshold < own.of("MRA").threshold
    assert mean_recall_and_dice(own.of("MRA"), scans)[1] >= mean_recall_and_dice(own.common, scans)[1]


def test_rules_survive_being_written_down_and_averaged():
    rules = LumenRules(LumenRule(0.2, 0.9), {"CTA": LumenRule(0.3, 0.8)})
    figures = {**rules.to_figures(), "dice": 0.5, "dice/CTA": 0.4}
    assert LumenRules.from_figures(figures) == rules
    old = LumenRules.from_figures({"threshold": 0.4, "core": 0.5})  # as in bundles without modalities
    assert old == LumenRules(LumenRule(0.4, 0.5))
    mean = LumenRules.mean([rules, old])
    assert mean.common.threshold == pytest.approx(0.3)
    own = mean.of("CTA")  # with the common rule of the fold that has no other
    assert (own.threshold, own.core) == (pytest.approx(0.35), pytest.approx(0.65))
    assert mean.of("T2") == mean.common


def test_wrong_input():
    with pytest.raises(ValueError, match="between 0 and 1"):
        LumenRule(0.0, 0.5)
    with pytest.raises(ValueError, match="shape"):
        LumenRule(0.2, 0.5)(np.zeros((2, 2, 2)), GRID)
    for floor, precision, confidence in ((0.0, 0.5, 0.5), (0.9, 1.0, 0.5), (0.9, 0.5, 0.4)):
        with pytest.raises(ValueError, match="A rule is chosen for"):
            choose_rule([], floor, precision, confidence)
