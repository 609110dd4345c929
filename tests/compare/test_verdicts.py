"""Statistics against scipy, and the verdicts against simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats

from aneurysm.compare.statistics import (
    Verdict,
    against,
    best_of,
    degrees_of_freedom,
    estimate,
    holm,
    p_value,
)


def test_the_interval_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(0).normal(0.8, 0.1, 7)
    one = estimate(values)
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert (one.low, one.high) == pytest.approx((low, high))
    assert one.sd == pytest.approx(values.std(ddof=1))


def test_one_repeat_has_a_mean_and_nothing_else():
    one = estimate(np.array([0.7]))
    assert one.mean == 0.7
    assert one.n == 1
    assert all(math.isnan(value) for value in (one.sd, one.low, one.high))
    assert estimate(np.array([])).n == 0


def test_without_overlap_p_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=9), rng.normal(0.4, 1, size=9)
    assert p_value(b - a, folds=0) == pytest.approx(stats.ttest_rel(b, a).pvalue)


def test_overlapping_training_sets_widen_the_interval_as_nadeau_and_bengio_say():
    d = np.random.default_rng(2).normal(0.02, 0.03, 10)  # five folds, two seeds: tested on 1/4 of what trains
    t = d.mean() / math.sqrt((1 / 10 + 1 / 4) * d.var(ddof=1))
    assert p_value(d, folds=5) == pytest.approx(2 * stats.t.sf(abs(t), 9))
    reach = stats.t.ppf(0.975, 9) * math.sqrt((1 / 10 + 1 / 4) * d.var(ddof=1))
    assert estimate(d, folds=5).high == pytest.approx(d.mean() + reach)


def test_interval_and_p_say_the_same():
    for seed in range(50):
        d = np.random.default_rng(seed).normal(0.5, 1, 6)
        one = estimate(d, folds=3)
        assert (one.low > 0 or one.high < 0) == (p_value(d, folds=3) < 0.05)


def test_holm_against_the_definition():
    assert holm([0.01, 0.04, 0.03], family=3) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, 0.04], family=6) == pytest.approx([0.06, 0.2])
    assert holm([0.5, 0.6], family=2) == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="family of 1"):
        holm([0.1, 0.2], family=1)


def test_equal_differences_do_not_make_certainty():
    # Coarse figures of small folds: the same step in every fold leaves no spread, and t would be infinite.
    assert p_value(np.full(3, 0.0625), folds=3) == pytest.approx(0.25)
    assert p_value(np.zeros(5), folds=5) == 1.0


def test_no_verdict_without_repeats():
    values = [{(0, 0): 0.5}, {(0, 0): 0.9}, {(0, 0): 0.1, (1, 0): 0.1}, {(5, 5): 0.9}]
    found = against(values, 0, folds=5, higher=True, chosen=True)
    assert [d.verdict for d in found] == [Verdict.REFERENCE, *[Verdict.FEW] * 3]
    assert found[3].estimate.n == 0  # nothing in common


def test_an_easy_fold_does_not_win():
    complete = {(k, 0): 0.8 + 0.05 * k for k in range(4)}
    lucky = {(3, 0): 0.97}  # the easiest fold only; its mean is the highest
    worse = {(k, 0): 0.7 + 0.05 * k for k in range(4)}
    assert best_of([worse, complete, lucky], higher=True) == 1
    assert best_of([worse, complete, lucky], higher=False) == 0
    # Further seeds of one variant do not shut the others out.
    repeated = {(k, s): 0.5 for k in range(4) for s in range(5)}
    assert best_of([worse, complete, repeated], higher=True) == 1
    assert best_of([{}, {}], higher=True) is None


def test_the_direction_of_a_figure_decides_what_is_better():
    rng = np.random.default_rng(3)
    low = {(k, s): 0.1 + rng.normal(0, 0.001) for k in range(4) for s in range(2)}
    high = {r: v + 0.5 for r, v in low.items()}
    assert against([low, high], 0, 4, higher=True, chosen=True)[1].verdict == Verdict.BETTER
    assert against([low, high], 0, 4, higher=False, chosen=True)[1].verdict == Verdict.WORSE


def test_seeds_of_one_fold_are_not_independent_repeats():
    rng = np.random.default_rng(6)
    of_fold = np.repeat(np.arange(4), 5)
    between = np.repeat(rng.normal(size=4), 5)
    assert degrees_of_freedom(between, of_fold) == pytest.approx(3)  # five times the same
    assert degrees_of_freedom(rng.normal(size=4), np.arange(4)) == 3
    assert degrees_of_freedom(rng.normal(size=5), np.zeros(5)) == 4  # one fold: seeds are all there is
    noise = [degrees_of_freedom(rng.normal(size=20), of_fold) for _ in range(200)]
    assert 12 < np.mean(noise) < 19
    d = between + rng.normal(0, 0.1, 20) + 1
    nu = degrees_of_freedom(d, of_fold)
    t = d.mean() / math.sqrt((1 / 20 + 1 / 3) * d.var(ddof=1))
    assert p_value(d, 4, of_fold) == pytest.approx(2 * stats.t.sf(t, nu))
    assert estimate(d, 4, of_fold).high - d.mean() == pytest.approx(
        stats.t.ppf(0.975, nu) * math.sqrt((1 / 20 + 1 / 3) * d.var(ddof=1))
    )


def simulated(rng, gains, folds=4, seeds=2, fit=0.006):
    """Repeats of variants whose true means differ by `gains`; folds differ, and suit some variants more."""
    level = rng.normal(0, 0.03, folds)
    suits = rng.normal(0, fit, (len(gains), folds))
    return [
        {
            (k, s): gain + level[k] + suits[i, k] + rng.normal(0, 0.01)
            for k in range(folds)
            for s in range(seeds)
        }
        for i, gain in enumerate(gains)
    ]


@pytest.mark.parametrize(
    ("folds", "seeds", "fit"),
    [(4, 2, 0.006), (5, 1, 0.006), (3, 3, 0.006), (4, 5, 0.02)],
    ids=["4 folds x 2 seeds", "5 folds", "3 folds x 3 seeds", "many seeds, folds that differ"],
)
@pytest.mark.parametrize("chosen", [True, False], ids=["named baseline", "best as reference"])
def test_without_an_effect_at_most_one_sweep_in_twenty_finds_one(folds, seeds, fit, chosen):
    rng, sweeps = np.random.default_rng(4), 300
    wrong = uncorrected = 0
    for _ in range(sweeps):
        values = simulated(rng, [0.0] * 5, folds, seeds, fit)
        reference = 0 if chosen else best_of(values, higher=True)
        found = against(values, reference, folds, higher=True, chosen=chosen)
        wrong += any(d.verdict in (Verdict.BETTER, Verdict.WORSE) for d in found)
        table = np.array([list(v.values()) for v in values])
        others = np.delete(table - table[reference], reference, axis=0)
        uncorrected += any(p_value(d, folds=0) < 0.05 for d in others)
    assert wrong <= 0.05 * sweeps
    assert uncorrected > 0.10 * sweeps  # what a plain paired t-test would have claimed


def test_a_strong_effect_is_found():
    rng, found = np.random.default_rng(5), []
    for _ in range(200):
        values = simulated(rng, [0.0, 0.06, 0.0, -0.06])
        verdicts = [d.verdict for d in against(values, 0, 4, higher=True, chosen=True)]
        found.append(verdicts[1] == Verdict.BETTER and verdicts[3] == Verdict.WORSE)
    assert np.mean(found) > 0.9
