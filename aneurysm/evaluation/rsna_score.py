"""The score of the RSNA 2025 challenge, with a rule for labels that a small set of scans cannot score.

    score = sum_c w_c AUC_c / sum_c w_c,   w = 13 for "Aneurysm Present", 1 for each of the 13 locations

A column that holds one class only has no AUC. It is left out, named, and the weights are renormalised
over the rest; counting it as 0 (or 0.5) would make small folds incomparable.
"""

from dataclasses import dataclass

import numpy as np

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS, PRESENT

COLUMN_WEIGHTS = np.array([1.0] * len(LOCATIONS) + [float(len(LOCATIONS))])


@dataclass(frozen=True, eq=False)
class RsnaScore:
    """The weighted score and what it is made of."""

    score: float  # 0..1, NaN when no column could be scored
    per_column: dict[str, float]  # AUC of each column that could be scored
    left_out: tuple[tuple[str, str], ...]  # (column, reason) of the others
    positives: dict[str, int]  # known positive scans per column
    negatives: dict[str, int]  # known negative scans per column

    @property
    def present(self) -> float:
        """AUC of "Aneurysm Present", NaN when left out."""
        return self.per_column.get(PRESENT, float("nan"))

    @property
    def locations(self) -> float:
        """Mean AUC over the locations that could be scored, NaN when none could."""
        areas = [area for name, area in self.per_column.items() if name != PRESENT]
        return float(np.mean(areas)) if areas else float("nan")


def rsna_score(truth: np.ndarray, probability: np.ndarray) -> RsnaScore:
    """Score the 14 probabilities of n scans as the RSNA 2025 challenge does.

    Args:
        truth: (n, 14) float, 0 or 1 in submission order, NaN where the label is unknown.
        probability: (n, 14) float in 0..1, same order, no NaN.

    Raises:
        ValueError: shapes differ, a truth is not 0, 1 or NaN, or a probability is outside 0..1.
    """
    # Imported here: they take seconds, and resampled figures do without them.
    import torch
    from torchmetrics.functional.classification import binary_auroc

    truth, probability = _checked(truth, probability)
    areas: dict[str, float] = {}
    left_out: list[tuple[str, str]] = []
    positives, negatives = {}, {}
    for column, name in enumerate(LABEL_COLUMNS):
        known = np.isfinite(truth[:, column])
        positives[name] = int((truth[known, column] == 1).sum())
        negatives[name] = int((truth[known, column] == 0).sum())
        if not known.any():
            left_out.append((name, "no scan has a known label"))
        elif positives[name] == 0:
            left_out.append((name, f"no positive among {negatives[name]} scans"))
        elif negatives[name] == 0:
            left_out.append((name, f"no negative among {positives[name]} scans"))
        else:
            areas[name] = float(
                binary_auroc(
                    torch.from_numpy(probability[known, column]),
                    torch.from_numpy(truth[known, column].astype(np.int64)),
                )
            )
    weights = {name: COLUMN_WEIGHTS[LABEL_COLUMNS.index(name)] for name in areas}
    total = sum(weights.values())
    score = sum(weights[name] * area for name, area in areas.items()) / total if total else float("nan")
    return RsnaScore(float(score), areas, tuple(left_out), positives, negatives)


def resampled_auc(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of one column in many resamples at once; ties count half, a resample of one class gives NaN.

    Args:
        truth: (n,) 0, 1 or NaN.
        probability: (n,).
        weights: (b, n) how often each scan was drawn in each resample.

    Returns:
        (b,) AUC per resample.
    """
    known = np.isfinite(truth)
    _, group = np.unique(probability[known], return_inverse=True)
    order = np.argsort(group, kind="stable")
    if order.size == 0:
        return np.full(len(weights), np.nan)
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    drawn = weights[:, known][:, order].astype(np.float64)
    label = truth[known][order]
    positive = np.add.reduceat(drawn * (label == 1), starts, axis=1)  # (b, distinct scores)
    negative = np.add.reduceat(drawn * (label == 0), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    won = (positive * (below + negative / 2)).sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def resampled_columns(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of all columns in many resamples: (n, 14), (n, 14), (b, n) -> (b, 14), NaN where one class only."""
    truth, probability = _checked(truth, probability)
    columns = range(len(LABEL_COLUMNS))
    return np.stack([resampled_auc(truth[:, c], probability[:, c], weights) for c in columns], axis=1)


def combined(areas: np.ndarray) -> np.ndarray:
    """Weighted score of each row of AUCs (b, 14) -> (b,), renormalised over the columns that are not NaN."""
    weights = np.where(np.isfinite(areas), COLUMN_WEIGHTS, 0.0)
    total = weights.sum(axis=1)
    weighted = (np.nan_to_num(areas) * weights).sum(axis=1)
    return np.divide(weighted, total, out=np.full(len(areas), np.nan), where=total > 0)


def _checked(truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth = np.asarray(truth, dtype=np.float64)
    probability = np.asarray(probability, dtype=np.float64)
    if truth.ndim != 2 or truth.shape[1] != len(LABEL_COLUMNS) or truth.shape != probability.shape:
        raise ValueError(
            f"Truth and probability must both be (n, {len(LABEL_COLUMNS)}) in submission order, "
            f"got {truth.shape} and {probability.shape}."
        )
    if not np.isin(truth[np.isfinite(truth)], (0, 1)).all() or np.isinf(truth).any():
        raise ValueError("Truth must be 0, 1 or NaN (unknown).")
    # torchmetrics would silently take scores outside 0..1 for logits, and NaN has no rank.
    bad = ~((probability >= 0) & (probability <= 1))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{int(bad.sum())} probabilities are NaN or outside 0..1, the first in row {row}, "
            f"column {LABEL_COLUMNS[column]!r}: {probability[row, column]}. A scan that could not be read "
            "needs a fallback probability, for example the share of positives in training."
        )
    return truth, probability
