"""How alike folds are, and the exchange of patients that makes them more alike."""

import numpy as np
import pandas as pd

_CANDIDATES = 700  # patients of a fold that an exchange is looked for among; bounds memory
_WORTH = 1e-4  # an exchange that lowers the cost by less than this share ends the search between two folds


def exchange_patients(
    counts: np.ndarray, weights: np.ndarray, fold: np.ndarray, k: int, seed: int, most: int = 2000
) -> np.ndarray:
    """Swap patients between folds while that makes the folds more alike.

    Dealing by rare labels (iterative stratification) is greedy: what is dealt last pays for it. Every step
    here makes the swap between two folds that lowers most

        sum over folds f and traits l of weight_l * (count_fl - ideal_l)^2 / ideal_l

    until no swap does. Folds keep their number of patients.

    Args:
        counts: (patients, traits), how many series of a patient have a trait.
        weights: (traits,) importance.
        fold: (patients,) int, 0..k-1.
        most: swaps.

    Returns:
        (patients,) int, the new folds.
    """
    counts, fold = np.asarray(counts, np.float64), fold.copy()
    ideal = counts.sum(0) / k
    scale = np.divide(weights, ideal, out=np.zeros_like(ideal), where=ideal > 0)
    excess = np.stack([counts[fold == f].sum(0) for f in range(k)]) - ideal  # (k, traits)
    pattern = np.unique(counts, axis=0, return_inverse=True)[1].reshape(-1)
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(k) for b in range(a + 1, k)]
    settled: set[tuple[int, int]] = set()
    for _ in range(most):
        waiting = [pair for pair in pairs if pair not in settled]
        if not waiting:
            break
        a, b = max(waiting, key=lambda p: float(scale @ (excess[p[0]] - excess[p[1]]) ** 2))
        i, j, gain = _best_swap(counts, pattern, fold, a, b, scale, excess[b] - excess[a], rng)
        if gain > -_WORTH * max(float((excess**2 @ scale).sum()), 1e-6):
            settled.add((a, b))
            continue
        moved = counts[i] - counts[j]
        excess[a] -= moved
        excess[b] += moved
        fold[i], fold[j] = b, a
        settled = {pair for pair in settled if not {a, b} & set(pair)}
    return fold


def _best_swap(
    counts: np.ndarray,
    pattern: np.ndarray,
    fold: np.ndarray,
    a: int,
    b: int,
    scale: np.ndarray,
    slope: np.ndarray,
    rng: np.random.Generator,
) -> tuple[int, int, float]:
    """The patients of folds a and b whose exchange changes the cost most, and by how much."""
    in_a, in_b = (_distinct(pattern, np.flatnonzero(fold == f), rng) for f in (a, b))
    x, y = counts[in_a], counts[in_b]
    # Moving d = x_i - y_j from a to b changes the cost by sum of scale * (2 d^2 + 2 d slope).
    cost_x = 2 * (x**2 @ scale) + 2 * (x @ (scale * slope))
    cost_y = 2 * (y**2 @ scale) - 2 * (y @ (scale * slope))
    change = cost_x[:, None] + cost_y[None, :] - 4 * (x * scale) @ y.T
    best = int(change.argmin())
    i, j = divmod(best, change.shape[1])
    return int(in_a[i]), int(in_b[j]), float(change[i, j])


def _distinct(pattern: np.ndarray, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One member per pattern of traits, at most `_CANDIDATES` of them."""
    first = np.unique(pattern[members], return_index=True)[1]
    if len(first) > _CANDIDATES:
        first = np.sort(rng.choice(first, _CANDIDATES, replace=False))
    return members[first]


def label_spread(index: pd.DataFrame, folds: pd.DataFrame, labels: tuple[str, ...]) -> pd.DataFrame:
    """How evenly the positives of every label lie in the folds.

    Args:
        index: `tables.INDEX`.
        folds: patient_id, fold.
        labels: columns of the index with 0, 1, NaN.

    Returns:
        One row per label: `label`, `total` series, `fold 0` ..., and `worst`, the largest deviation of a
        fold from an equal share, relative to that share (0.1 = 10 %; NaN without positives).
    """
    number = dict(zip(folds["patient_id"].astype(str), folds["fold"].astype(int), strict=True))
    of_series = np.array([number[str(patient)] for patient in index["patient_id"]], int)
    k = int(max(number.values())) + 1
    rows = []
    for label in labels:
        in_fold = np.bincount(of_series[(index[label] == 1).to_numpy()], minlength=k)
        share = in_fold.sum() / k
        worst = float(np.abs(in_fold - share).max() / share) if share else float("nan")
        named = {f"fold {f}": int(n) for f, n in enumerate(in_fold)}
        rows.append({"label": label, "total": int(in_fold.sum()), **named, "worst": worst})
    return pd.DataFrame(rows)
