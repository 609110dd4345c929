"""Percentile bootstrap over patients: how far a figure could move with other patients.

Scans and lesions of one patient are not independent, so whole patients are drawn. A statistic receives
the draw counts of many resamples as a matrix and works on all of them at once.
Efron and Tibshirani 1993, section 13.3.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Bounds of a figure; NaN when too few resamples could be scored."""

    low: float
    high: float
    valid: int  # resamples in which the figure existed


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    patients: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    chunk: int = 64,
) -> list[Interval]:
    """Interval of each of k figures by drawing patients with replacement.

    A resample in which a figure does not exist (for instance an AUC without positives) gives NaN and is
    not counted for that figure. Fewer than half of the resamples valid, or fewer than two patients,
    gives NaN bounds: such an interval would look narrower than it is.

    Args:
        statistic: maps draw counts (b, n) of the n scans in b resamples to the figures (b, k).
        patients: the patient of each of the n scans.
        resamples: number of draws.
        seed: the same seed, patients and statistic give the same bounds.
        level: coverage, 0.95 for bounds at 2.5 % and 97.5 %.
        chunk: resamples worked on at once; bounds the memory to chunk * n numbers.

    Returns:
        One interval per figure.

    Raises:
        ValueError: no scan was given, or the statistic returned another shape than (b, k).
    """
    if len(patients) == 0:
        raise ValueError("A bootstrap needs at least one scan.")
    _, patient_of = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    count = int(patient_of.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        times = rng.multinomial(count, np.full(count, 1 / count), size=size)  # (size, patients)
        figures = np.asarray(statistic(times[:, patient_of]), dtype=np.float64)
        if figures.ndim != 2 or len(figures) != size:
            raise ValueError(f"The statistic must return ({size}, k) figures, got shape {figures.shape}.")
        drawn.append(figures)
    return [_bounds(column, level, count) for column in np.concatenate(drawn).T]


def _bounds(figures: np.ndarray, level: float, patients: int) -> Interval:
    figures_valid = figures[np.isfinite(figures)]
    valid = len(figures_valid)
    if patients < 2 or valid < max(2, len(figures) / 2):
        return Interval(float("nan"), float("nan"), valid)
    low, high = np.quantile(figures_valid, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), valid)


def resampled_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of per-scan values (n,) in each resample (b, n) -> (b, 1); NaN values are scans without one."""
    known = np.isfinite(values)
    total = weights[:, known].sum(axis=1)
    summed = weights[:, known] @ values[known]
    return np.divide(summed, total, out=np.full(len(weights), np.nan), where=total > 0)[:, None]
