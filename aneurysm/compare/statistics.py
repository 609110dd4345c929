"""What a difference between two variants of a network is worth, given few and dependent repeats.

Notation: k folds, r seeds, n = k r repeats, x_i the figure of repeat i, d_i the difference of two variants on
the same fold and seed.

The trainings of a cross-validation share patients, so its repeats are not independent and s / sqrt(n)
is too narrow. The corrected resampled t-test (Nadeau and Bengio, Machine Learning 52, 2003; for repeated
cross-validation Bouckaert and Frank, PAKDD 2004) widens it:

    var(mean) = (1/n + n_test/n_train) s^2,   n_test/n_train = 1/(k - 1)

Seeds of one fold are tested on the same patients: five seeds of four folds are not twenty independent
repeats. Where folds differ more than seeds do, t has fewer than n - 1 degrees of freedom, down to k - 1
(Satterthwaite, Biometrics Bulletin 2, 1946, on the sums of squares between folds B and within folds W):

    nu = (B + W)^2 / (B^2 / (k - 1) + W^2 / (n - k)),   n - 1 with one seed

Many comparisons are corrected by Holm (Scandinavian Journal of Statistics 6, 1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import stdtr, stdtrit

MIN_REPEATS = 3  # two differences give a line, not a spread
LEVEL = 0.95

Repeat = tuple[int, int]  # fold, seed


class Verdict(StrEnum):
    """What may be said about a variant against the reference."""

    REFERENCE = "reference"
    BETTER = "better"
    WORSE = "worse"
    NOISE = "inside the noise"
    FEW = "too few repeats"


@dataclass(frozen=True)
class Estimate:
    """A mean over n repeats and how far it can be trusted; NaN bounds and sd below two repeats."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Of a variant to the reference, over the folds and seeds that both have."""

    estimate: Estimate
    p: float  # two-sided, of this comparison alone; NaN below MIN_REPEATS
    corrected: float  # for all comparisons made
    verdict: Verdict


def estimate(values: np.ndarray, folds: int = 0, of_fold: np.ndarray | None = None) -> Estimate:
    """Mean of n repeats with its 95 % t interval.

    Args:
        values: (n,) finite.
        folds: k of the cross-validation the repeats come from, to correct for training sets that overlap;
            0 takes the repeats as independent, which is how the mean of one variant is described.
        of_fold: (n,) the fold of each repeat, where seeds of one fold are among them.
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    sd = float(np.std(values, ddof=1))
    nu = degrees_of_freedom(values, of_fold)
    reach = float(stdtrit(nu, (1 + LEVEL) / 2)) * sd * math.sqrt(1 / n + overlap(folds))
    return Estimate(mean, sd, mean - reach, mean + reach, n)


def overlap(folds: int) -> float:
    """n_test / n_train of k-fold cross-validation."""
    return 1 / (folds - 1) if folds > 1 else 0.0


def degrees_of_freedom(values: np.ndarray, of_fold: np.ndarray | None = None) -> float:
    """Of the spread of n repeats: n - 1, or fewer when most of it lies between few folds."""
    n = len(values)
    if of_fold is None:
        return n - 1.0
    groups = [values[of_fold == fold] for fold in np.unique(of_fold)]
    k, mean = len(groups), np.mean(values)
    between = float(sum(len(g) * (np.mean(g) - mean) ** 2 for g in groups))
    within = float(sum(((g - np.mean(g)) ** 2).sum() for g in groups))
    if k in (1, n) or between + within == 0:
        return n - 1.0
    return (between + within) ** 2 / (between**2 / (k - 1) + within**2 / (n - k))


def p_value(differences: np.ndarray, folds: int, of_fold: np.ndarray | None = None) -> float:
    """Two-sided p of "no difference"; NaN below MIN_REPEATS.

    Differences that are all the same leave no spread to measure with (coarse figures on small folds do this).
    Then 2 / 2^n, the least that turning their signs could give, stands in for a p of 0.
    """
    n = len(differences)
    if n < MIN_REPEATS:
        return math.nan
    mean, sd = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if sd <= 1e-12 * max(1.0, abs(mean)):
        return 1.0 if abs(mean) <= 1e-12 else 2.0 ** (1 - n)
    t = mean / (sd * math.sqrt(1 / n + overlap(folds)))
    return float(2 * stdtr(degrees_of_freedom(differences, of_fold), -abs(t)))


def holm(p: Sequence[float], family: int) -> list[float]:
    """Holm's step-down correction of the p values at hand for a family of at least as many comparisons.

    Raises:
        ValueError: the family is smaller than the number of p values.
    """
    if family < len(p):
        raise ValueError(f"{len(p)} p values cannot come from a family of {family} comparisons.")
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (family - rank) * p[index]))
        corrected[index] = largest
    return corrected


def best_of(values: Sequence[Mapping[Repeat, float]], higher: bool) -> int | None:
    """The variant with the best mean on equal terms; None when nothing was measured.

    A variant of which only an easy fold is finished must not win: means are taken over the repeats that
    at least half of the variants have, and only of variants that have all of them.
    """
    measured = [v for v in values if v]
    if not measured:
        return None
    repeats = {r for v in measured for r in v}
    common = {r for r in repeats if 2 * sum(r in v for v in measured) >= len(measured)}
    most = max(len(common & v.keys()) for v in measured)
    fair = [i for i, v in enumerate(values) if v and len(common & v.keys()) == most]
    means = {i: float(np.mean([values[i][r] for r in values[i] if r in common or not most])) for i in fair}
    return (max if higher else min)(means, key=lambda i: means[i])


def against(
    values: Sequence[Mapping[Repeat, float]], reference: int, folds: int, higher: bool, chosen: bool
) -> list[Difference]:
    """Every variant against the reference, paired by fold and seed.

    Args:
        values: repeats of each variant.
        reference: which of them the others are compared with.
        folds: k of the cross-validation.
        higher: whether a higher figure is better.
        chosen: the reference was named beforehand. Otherwise it was picked because it looks best, and every
            pair of variants counts as compared: with the best of many, the second best is always near and
            the worst always far, effect or not.
    """
    base = values[reference]
    paired: list[tuple[np.ndarray, np.ndarray]] = []  # differences, and the fold of each
    for one in values:
        shared = sorted(base.keys() & one.keys())
        differences = np.array([one[r] - base[r] for r in shared], dtype=np.float64)
        paired.append((differences, np.array([fold for fold, _ in shared])))
    p = [p_value(d, folds, of) if i != reference else math.nan for i, (d, of) in enumerate(paired)]
    tested = [i for i, value in enumerate(p) if not math.isnan(value)]
    family = len(tested) if chosen else len(tested) * (len(tested) + 1) // 2
    corrected = dict(zip(tested, holm([p[i] for i in tested], family), strict=True))
    return [
        Difference(
            estimate(d, folds, of),
            p[i],
            corrected.get(i, math.nan),
            Verdict.REFERENCE if i == reference else _verdict(d, corrected.get(i), higher),
        )
        for i, (d, of) in enumerate(paired)
    ]


def _verdict(differences: np.ndarray, corrected: float | None, higher: bool) -> Verdict:
    if corrected is None:
        return Verdict.FEW
    if corrected >= 1 - LEVEL:
        return Verdict.NOISE
    return Verdict.BETTER if (float(np.mean(differences)) > 0) == higher else Verdict.WORSE
