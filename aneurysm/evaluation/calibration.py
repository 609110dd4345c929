"""Whether a probability of 0.7 means seven in ten."""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import binary_calibration_error


@dataclass(frozen=True, eq=False)
class Calibration:
    """Reliability of one probability, in equal-width bins that hold at least one case."""

    predicted: np.ndarray  # (k,) mean probability in the bin
    observed: np.ndarray  # (k,) share of positives in the bin
    count: np.ndarray  # (k,) cases in the bin
    ece: float  # expected calibration error, 0 is perfect; NaN without cases
    brier: float  # mean squared error of the probability, 0 is perfect; NaN without cases
    prevalence: float  # share of positives over all cases

    @property
    def cases(self) -> int:
        """Number of cases with a known label."""
        return int(self.count.sum())


def calibration(truth: np.ndarray, probability: np.ndarray, bins: int = 10) -> Calibration:
    """Reliability bins, expected calibration error (Naeini et al., AAAI 2015) and Brier score.

    Args:
        truth: (n,) 0, 1, or NaN for cases to leave out.
        probability: (n,) in 0..1.
        bins: number of equal-width bins.

    Raises:
        ValueError: shapes differ or a probability is outside 0..1.
    """
    truth, probability = np.asarray(truth, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    if truth.shape != probability.shape or truth.ndim != 1:
        raise ValueError(
            f"Truth and probability must both be (n,), got {truth.shape} and {probability.shape}."
        )
    known = np.isfinite(truth)
    label, p = truth[known], probability[known]
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"Probabilities must lie in 0..1, got {p.min()} to {p.max()}.")
    if p.size == 0:
        empty = np.zeros(0)
        return Calibration(empty, empty, empty.astype(np.int64), *[float("nan")] * 3)
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    filled = count > 0
    error = binary_calibration_error(
        torch.from_numpy(p), torch.from_numpy(label.astype(np.int64)), n_bins=bins, norm="l1"
    )
    return Calibration(
        predicted=np.bincount(index, p, bins)[filled] / count[filled],
        observed=np.bincount(index, label, bins)[filled] / count[filled],
        count=count[filled],
        ece=float(error),
        brier=float(np.mean((p - label) ** 2)),
        prevalence=float(label.mean()),
    )
