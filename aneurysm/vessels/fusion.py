"""One scale for what the graph net says of a node and what the heat map shows at a place.

The two are no common scale: a node score comes from a net trained with weighted positives, a height from
another one. A logistic regression with four numbers, fitted to training scans whose scores are themselves
out-of-fold, turns both into the probability that there is an aneurysm (Platt 1999).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

UNFITTED_PEAK = 0.1  # what a peak's height counts against node scores before anything is fitted
FLOOR = 0.02  # height where there is no peak
_LEAST = 1e-4  # of a probability, so that its log odds stay finite
_RIDGE = 1e-2  # on the slopes; few scans have an aneurysm off the graph


@dataclass(frozen=True)
class Fusion:
    """log odds = intercept + node * logit(node score) + height * logit(height) + bare * [no node here]."""

    intercept: float
    node: float
    height: float
    bare: float

    def __call__(self, node_score: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Probability of an aneurysm at each place, (n,).

        Args:
            node_score: (n,) 0..1, NaN where a place has no node.
            height: (n,) 0..1 of the peak at the place, FLOOR where there is none.
        """
        return expit(_design(node_score, height) @ np.array(self.values()))

    def values(self) -> tuple[float, float, float, float]:
        """(intercept, node, height, bare)."""
        return self.intercept, self.node, self.height, self.bare

    @classmethod
    def fit(cls, node_score: np.ndarray, height: np.ndarray, hit: np.ndarray) -> "Fusion | None":
        """Fit to places of training scans; None when they hold no aneurysm, or nothing else.

        Slopes are never negative: a higher score or a higher peak cannot speak against an aneurysm.

        Args:
            node_score: (n,) 0..1, NaN where a place has no node.
            height: (n,) 0..1.
            hit: (n,) 1 at an aneurysm, 0 elsewhere, NaN where it is unclear.
        """
        known = np.isfinite(hit)
        design, truth = _design(node_score, height)[known], hit[known]
        if not truth.any() or truth.all():
            return None

        def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
            p = expit(design @ b)
            safe = np.clip(p, 1e-12, 1 - 1e-12)
            nats = -(truth * np.log(safe) + (1 - truth) * np.log(1 - safe)).sum()
            ridge = _RIDGE * np.array([0.0, 1.0, 1.0, 1.0])
            return nats + (ridge * b * b).sum(), design.T @ (p - truth) + 2 * ridge * b

        free = (None, None)
        found = minimize(
            loss, np.array([-2.0, 0.5, 0.0, 0.0]), jac=True, method="L-BFGS-B",
            bounds=[free, (0.0, None), (0.0, None), free],
        )  # fmt: skip
        return cls(*(float(b) for b in found.x))

    @classmethod
    def mean(cls, parts: "Sequence[Fusion | None]") -> "Fusion | None":
        """Of the folds that could be fitted, number by number."""
        fitted = [part.values() for part in parts if part is not None]
        return cls(*(float(v) for v in np.mean(fitted, axis=0))) if fitted else None

    def figures(self) -> dict[str, float]:
        """As the figures of a run."""
        return {f"fusion_{name}": value for name, value in vars(self).items()}

    @classmethod
    def from_figures(cls, figures: Mapping[str, float]) -> "Fusion | None":
        """From what `figures` gave; None when it is not in there."""
        names = ("intercept", "node", "height", "bare")
        if not all(f"fusion_{name}" in figures for name in names):
            return None
        return cls(*(float(figures[f"fusion_{name}"]) for name in names))


def _design(node_score: np.ndarray, height: np.ndarray) -> np.ndarray:
    bare = ~np.isfinite(node_score)
    node = np.where(bare, 0.0, logit(np.clip(np.where(bare, 0.5, node_score), _LEAST, 1 - _LEAST)))
    peak = logit(np.clip(height, FLOOR, 1 - FLOOR))
    return np.stack([np.ones(len(node)), node, peak, bare.astype(float)], axis=1)
