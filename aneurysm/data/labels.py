"""The names that every table, loss and report shares: modalities, arterial locations, vessel labels."""

from typing import Final

import numpy as np

MODALITIES: Final = ("CTA", "MRA", "T1", "T2")

# RSNA 2025 submission order: 13 arterial locations, then the scan-level label.
LOCATIONS: Final = (
    "Left Infraclinoid Internal Carotid Artery",
    "Right Infraclinoid Internal Carotid Artery",
    "Left Supraclinoid Internal Carotid Artery",
    "Right Supraclinoid Internal Carotid Artery",
    "Left Middle Cerebral Artery",
    "Right Middle Cerebral Artery",
    "Anterior Communicating Artery",
    "Left Anterior Cerebral Artery",
    "Right Anterior Cerebral Artery",
    "Left Posterior Communicating Artery",
    "Right Posterior Communicating Artery",
    "Basilar Tip",
    "Other Posterior Circulation",
)
PRESENT: Final = "Aneurysm Present"
LABEL_COLUMNS: Final = (*LOCATIONS, PRESENT)

# `_cowseg.nii` numbers the same 13 arteries differently: location i (above) has vessel label VESSEL_LABEL[i].
VESSEL_LABEL: Final = (6, 5, 8, 7, 10, 9, 13, 12, 11, 4, 3, 2, 1)
# Our own extension of the RSNA scheme, for trees whose arteries have no names (IntrA).
UNNAMED_VESSEL: Final = 14


def _mirror() -> tuple[int, ...]:
    def other(name: str) -> str:
        if name.startswith("Left "):
            return "Right " + name.removeprefix("Left ")
        return "Left " + name.removeprefix("Right ") if name.startswith("Right ") else name

    return tuple(LOCATIONS.index(other(name)) for name in LOCATIONS)


# After a left-right flip of the image, location i has become location MIRRORED_LOCATION[i].
MIRRORED_LOCATION: Final = _mirror()


def mirrored_vessel_labels(labels: np.ndarray) -> np.ndarray:
    """Swap left and right vessel labels (any shape, uint8), as a left-right flip of the image demands."""
    table = np.arange(256, dtype=labels.dtype)
    for index, label in enumerate(VESSEL_LABEL):
        table[label] = VESSEL_LABEL[MIRRORED_LOCATION[index]]
    return table[labels]
