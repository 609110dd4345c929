"""An experiment of 60 synthetic series with known answers."""

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.labels import LOCATIONS
from aneurysm.data.scan import Lesion
from aneurysm.data.tables import LOCATION_KEYS


@pytest.fixture
def experiment() -> dict:
    """Tables and lesions as `evaluate_scans` takes them, plus the per-scan vessel figures."""
    rng = np.random.default_rng(11)
    index, scans, expert, candidates, lesions = [], [], [], [], {}
    for i in range(60):
        uid, patient = f"1.2.{i}", f"p{i // 2}"  # two series per patient
        positive = i % 3 == 0
        place = int(rng.integers(0, 12)) if positive else -1  # nobody has the last location
        truth = np.zeros(13)
        if positive:
            truth[place] = 1
            radius = float(rng.uniform(1, 5))
            lesions[uid] = [Lesion(rng.uniform(-40, 40, 3), radius, place)]
        index.append(
            {"series_uid": uid, "patient_id": patient, "modality": ("CTA", "MRA")[i % 2], "age": 60.0}
            | {"sex": "F", "site": "phantom", "present": float(positive)}
            | dict(zip(LOCATION_KEYS, truth, strict=True))
        )
        p = np.clip(0.4 * np.append(truth, positive) + 0.5 * rng.random(14), 0, 1)
        keys = [f"p_{key}" for key in (*LOCATION_KEYS, "present")]
        scans.append(
            {"series_uid": uid, "patient_id": patient, "fold": i % 5} | dict(zip(keys, p, strict=True))
        )
        for k in range(4):
            at = lesions[uid][0].centre_mm + 1.0 if positive and k == 0 else rng.uniform(-40, 40, 3)
            where = dict(zip(("x_mm", "y_mm", "z_mm"), at, strict=True))
            score = 0.9 - 0.2 * k
            row = {"series_uid": uid, "candidate": k, "fold": i % 5, "score": score, **where}
            candidates.append(row | {"node": k, "radius_mm": 1.5})
            for seed in range(2):
                base = 0.45 if positive and k == 0 else 0.0
                expert.append(
                    row
                    | {"seed": seed, "p": base + 0.5 * rng.random(), "order_parameter": 0.5}
                    | {f"{key}_logit": 0.0 for key in LOCATION_KEYS}
                    | {"physics_residual": np.nan, "flow_coherence": np.nan, "volume_mm3": 30.0}
                )
    vessel = pd.DataFrame({"series_uid": [f"1.2.{i}" for i in range(8)], "recall": 0.97, "dice": 0.9})
    assert len(LOCATIONS) == 13
    return {
        "index": pd.DataFrame(index),
        "scans": pd.DataFrame(scans),
        "expert": pd.DataFrame(expert),
        "lesions": lesions,
        "candidates": pd.DataFrame(candidates),
        "vessel": vessel,
    }
