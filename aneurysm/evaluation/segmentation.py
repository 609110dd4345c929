"""Overlap of a predicted and a true vessel mask of one scan."""

from dataclasses import dataclass

import numpy as np

from aneurysm.vessels.skeleton import inside_distance, skeletonise


@dataclass(frozen=True)
class Overlap:
    """Voxel counts turned into shares, each 0..1, or NaN where the share is undefined."""

    recall: float  # of true vessel voxels found; NaN when the truth is empty
    precision: float  # of predicted voxels that are vessel; NaN when nothing was predicted
    dice: float  # NaN when both masks are empty
    cldice: float = float("nan")  # centre-line Dice; NaN unless asked for


def overlap(prediction: np.ndarray, truth: np.ndarray, centrelines: bool = False) -> Overlap:
    """Recall, precision, Dice and, if asked, centre-line Dice of a binary mask.

    clDice is the harmonic mean of the share of the predicted centre line inside the true mask and the
    share of the true centre line inside the predicted mask (Shit et al., CVPR 2021, equations 1 to 3).

    Args:
        prediction: (d, h, w), non-zero is vessel.
        truth: (d, h, w), non-zero is vessel.
        centrelines: also compute clDice; thinning takes seconds on a large scan.

    Raises:
        ValueError: the masks differ in shape.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"Prediction {prediction.shape} and truth {truth.shape} differ in shape. "
            "Resample one onto the grid of the other."
        )
    predicted, true = prediction.astype(bool), truth.astype(bool)
    both = int((predicted & true).sum())
    n_predicted, n_true = int(predicted.sum()), int(true.sum())
    return Overlap(
        recall=_share(both, n_true),
        precision=_share(both, n_predicted),
        dice=_share(2 * both, n_predicted + n_true),
        cldice=centreline_dice(predicted, true, _line(predicted), _line(true))
        if centrelines
        else float("nan"),
    )


def centreline_dice(
    predicted: np.ndarray, true: np.ndarray, predicted_line: np.ndarray, true_line: np.ndarray
) -> float:
    """clDice of two masks (d, h, w) bool with their centrelines; NaN when both are empty."""
    if not predicted.any() and not true.any():
        return float("nan")
    if not predicted.any() or not true.any():
        return 0.0
    precision = _share(int((predicted_line & true).sum()), int(predicted_line.sum()))
    sensitivity = _share(int((true_line & predicted).sum()), int(true_line.sum()))
    if precision + sensitivity == 0:
        return 0.0
    return 2 * precision * sensitivity / (precision + sensitivity)


def _line(mask: np.ndarray) -> np.ndarray:
    """Centreline in voxels as if they were cubes; the common Lee thinning deletes some straight tubes."""
    return skeletonise(mask, inside_distance(mask, np.ones(3)), 1.0)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
