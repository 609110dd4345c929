"""Patients: an arterial tree, perhaps with aneurysms, an age and a sex."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from aneurysm.data.labels import LOCATIONS
from aneurysm.data.phantom.sacs import Sac, overlap, sample_sac, sample_site
from aneurysm.data.phantom.tree import ArterialTree, Segment, sample_tree

__all__ = ["ArterialTree", "Patient", "Sac", "Segment", "sample_patient", "sample_tree"]

# How often each location is affected in the RSNA 2025 training set (counts, submission order).
LOCATION_COUNTS: Final = (81, 101, 343, 287, 225, 304, 376, 47, 58, 89, 105, 114, 117)
# Largest extent, log-normal: clinical medians run from 5 (screening) to 6.4 mm (treated, IntrA).
EXTENT_MEDIAN_MM: Final = 5.6
EXTENT_LOG_SD: Final = 0.42
EXTENT_RANGE_MM: Final = (2.5, 15.0)
TWO_SACS: Final = 0.15  # share of the patients with aneurysms
_TRIES: Final = 16


@dataclass(frozen=True, eq=False)
class Patient:
    """Everything that is known about a simulated patient, in RAS mm around the circle of Willis."""

    tree: ArterialTree
    sacs: tuple[Sac, ...]
    age: float  # whole years
    sex: str  # "M" or "F"

    @property
    def present(self) -> bool:
        """Whether there is any aneurysm."""
        return bool(self.sacs)

    @property
    def locations(self) -> np.ndarray:
        """(13,) float32, 1 where an aneurysm sits."""
        flags = np.zeros(len(LOCATIONS), np.float32)
        flags[[sac.location for sac in self.sacs]] = 1
        return flags


def risk(age: float, sex: str) -> float:
    """Probability of an aneurysm: 0.5 on average, higher in women and with age."""
    logit = 0.03 * (age - 57) + (0.35 if sex == "F" else -0.4)
    return float(1 / (1 + np.exp(-logit)))


def sample_patient(rng: np.random.Generator, *, fov_mm: float = 66.0, luck: float | None = None) -> Patient:
    """Draw a patient.

    Args:
        fov_mm: edge of the cube that a scan will show; all sacs fit into one such cube near the circle.
        luck: 0..1, takes the place of the draw against the risk, so that a caller can balance a small set.
    """
    if fov_mm < 30:
        raise ValueError(f"A field of view of {fov_mm:g} mm does not hold the circle of Willis; 30 mm do.")
    sex = "F" if rng.random() < 0.54 else "M"
    age = float(np.clip(np.round(rng.normal(57, 14)), 20, 89))
    draw = float(rng.random())
    affected = (draw if luck is None else luck) < risk(age, sex)
    tree = sample_tree(rng, tortuosity=0.6 + 0.4 * age / 57)
    sacs: list[Sac] = []
    if affected:
        wanted = 2 if rng.random() < TWO_SACS else 1
        while len(sacs) < wanted:
            sacs.append(_grow(tree, sacs, fov_mm, rng))
    return Patient(tree, tuple(sacs), age, sex)


def _grow(tree: ArterialTree, others: list[Sac], fov_mm: float, rng: np.random.Generator) -> Sac:
    """Draw one sac that fits the field of view and touches nothing but its parent artery."""
    weights = np.array(LOCATION_COUNTS, np.float64)
    for sac in others:
        weights[sac.location] = 0  # a second sac takes another artery, so that its label says something
    weights /= weights.sum()
    extent = _extent(rng)
    location = int(rng.choice(len(weights), p=weights))
    for attempt in range(1, 100):
        best, least = None, np.inf
        for _ in range(_TRIES):
            site = sample_site(tree, location, rng)
            if site is None:
                break
            sac = sample_sac(site, extent, rng)
            if not _fits([*others, sac], fov_mm):
                continue
            depth = overlap(sac, site, tree)
            if depth < least:
                best, least = sac, depth
            if depth <= 0:
                break
        # A small contact with a neighbouring artery happens; a dome that swallows one does not.
        if best is not None and least < 0.8:
            return best
        # No room for a sac of this size: a smaller one, and after three tries another artery.
        extent = max(extent * 0.9, EXTENT_RANGE_MM[0])
        if attempt % 3 == 0:
            location = int(rng.choice(len(weights), p=weights))
    raise RuntimeError(
        f"No artery has room for a sac of {extent:.1f} mm in a field of view of {fov_mm:g} mm."
    )


def _extent(rng: np.random.Generator) -> float:
    """Largest extent in mm: truncated log-normal."""
    low, high = EXTENT_RANGE_MM
    while True:
        extent = float(np.exp(rng.normal(np.log(EXTENT_MEDIAN_MM), EXTENT_LOG_SD)))
        if low <= extent <= high:
            return extent


def _fits(sacs: list[Sac], fov_mm: float) -> bool:
    """Whether one cube near the circle holds all sacs and they keep apart."""
    low = np.min([sac.centre_mm - sac.reach_mm for sac in sacs], axis=0)
    high = np.max([sac.centre_mm + sac.reach_mm for sac in sacs], axis=0)
    limit = fov_mm / 2 + 4
    if (high - low > fov_mm - 4).any() or (low < -limit).any() or (high > limit).any():
        return False
    new = sacs[-1]
    gaps = [np.linalg.norm(sac.centre_mm - new.centre_mm) - sac.reach_mm - new.reach_mm for sac in sacs[:-1]]
    return all(gap > 1.0 for gap in gaps)
