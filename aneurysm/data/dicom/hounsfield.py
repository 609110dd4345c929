"""Whether the stored values of a CT still need their rescale intercept.

Some exports apply the intercept and leave it in the header, others drop it. Soft tissue tells: it fills most
of a head, and lies within 0 to 100 HU whatever the scanner.
"""

import numpy as np

_TISSUE_HU = (-20, 140)  # water, brain, muscle, with noise
_AIR_STORED = -100  # below it no stored value is left where air is stored as 0
_PADDING_STORED = -1900  # outside the scanner's round field of view
_BODY_STORED = 500  # above it lies bone in HU, but everything except air and lung in HU + 1024
_USUAL_INTERCEPT = -1024.0


def is_hounsfield_already(stored: np.ndarray, intercept: float) -> bool:
    """Whether stored values (any shape) are HU, so that `intercept` must not be applied again.

    Where air is stored as 0, clearly negative values can only be padding, which is one constant. When they
    are one constant, it may still be air that was masked: then what is brighter than 500 must not be
    mostly soft tissue + 1024. Without such evidence the header is believed.
    """
    if intercept > -900:
        return False
    sample = stored[stored > _PADDING_STORED]
    negative = sample[sample < _AIR_STORED]
    if negative.size < 0.01 * sample.size:
        return False
    if np.count_nonzero(negative != np.median(negative)) > 0.01 * sample.size:
        return True
    return _tissue(sample, 0) > 0 and not _is_tissue(sample, intercept)


def intercept_is_lost(stored: np.ndarray) -> bool:
    """Whether stored values without any intercept in the header are HU + 1024.

    They then have no negative value, and what is brighter than 500 is mostly soft tissue + 1024.
    """
    return bool(stored.min() >= 0) and _is_tissue(stored, _USUAL_INTERCEPT)


def _is_tissue(sample: np.ndarray, intercept: float) -> bool:
    """Whether most of the bright values are soft tissue, stored without their intercept."""
    body = sample[sample > _BODY_STORED]
    return body.size > 0.05 * sample.size and _tissue(body, intercept) > 0.4 * body.size


def _tissue(sample: np.ndarray, intercept: float) -> int:
    low, high = _TISSUE_HU
    return int(np.count_nonzero((sample >= low - intercept) & (sample <= high - intercept)))
