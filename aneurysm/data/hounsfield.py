"""Whether the stored values of a CT still need their rescale intercept.

Some exports apply the intercept and leave it in the header, others drop it. Soft tissue tells: it fills most
of a head, and lies within 0 to 100 HU whatever the scanner.
"""

import numpy as np

_TISSUE_HU = (-20, 140)  # water, brain, muscle, with noise
_AIR_STORED = -100  # below it no stored value is left where air is stored as 0
_PADDING_STORED = -1900  # outside the scanner's round field of view
_USUAL_INTERCEPT = -1024.0


def is_hounsfield_already(stored: np.ndarray, intercept: float) -> bool:
    """Whether stored values (any shape) are HU, so that `intercept` must not be applied again.

    That takes negative stored values, and that soft tissue appears among the stored values but not after
    the intercept. Without such evidence the header is believed.
    """
    if intercept > -900:
        return False
    sample = stored[stored > _PADDING_STORED]
    if not (sample < _AIR_STORED).any():
        return False
    without, after = _tissue(sample, 0), _tissue(sample, intercept)
    return without > 5 * after


def intercept_is_lost(stored: np.ndarray) -> bool:
    """Whether stored values without any intercept in the header are HU + 1024.

    They then have no negative value and most of what is not air is soft tissue + 1024.
    """
    if stored.min() < 0:
        return False
    body = stored[stored > 500]
    return body.size > 0.05 * stored.size and _tissue(body, _USUAL_INTERCEPT) > 0.4 * body.size


def _tissue(sample: np.ndarray, intercept: float) -> int:
    low, high = _TISSUE_HU
    return int(np.count_nonzero((sample >= low - intercept) & (sample <= high - intercept)))
