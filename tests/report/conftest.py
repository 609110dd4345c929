"""A small evaluated experiment and one phantom-like scan, both synthetic."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.scan import Grid, Lesion
from aneurysm.data.tables import LOCATION_KEYS
from aneurysm.evaluation.summary import Evaluation, evaluate_scans


@dataclass(frozen=True)
class Chain:
    """A vessel graph without branches."""

    position: np.ndarray
    edges: np.ndarray


@pytest.fixture(scope="session")
def grid() -> Grid:
    """Anisotropic and off centre, so that mixed-up axes show."""
    affine = np.array([[0, 0, 0.8, -20], [0, 1.0, 0, -15], [2.0, 0, 0, -30], [0, 0, 0, 1.0]])
    return Grid((24, 40, 50), affine)


@pytest.fixture(scope="session")
def volume(grid: Grid) -> np.ndarray:
    """Noise around 0 with a bright tube along superior."""
    image = np.random.default_rng(0).normal(0, 1, grid.shape).astype(np.float32)
    image[:, 18:22, 23:27] += 20
    return image


@pytest.fixture(scope="session")
def chain(grid: Grid) -> Chain:
    """The centre line of that tube."""
    position = grid.to_mm(np.stack([np.arange(24), np.full(24, 20), np.full(24, 25)], axis=1))
    return Chain(position, np.stack([np.arange(23), np.arange(1, 24)], axis=1))


def expert_rows(uid: str, places: np.ndarray, p: np.ndarray) -> pd.DataFrame:
    """EXPERT rows of one scan; location 5 is the most likely everywhere."""
    n = len(p)
    fixed = {f"{key}_logit": 3.0 if i == 5 else 0.0 for i, key in enumerate(LOCATION_KEYS)}
    physics = {"order_parameter": 0.8, "physics_residual": -1.5, "flow_coherence": np.nan, "volume_mm3": 65.0}
    return pd.DataFrame(
        {"series_uid": uid, "candidate": np.arange(n), "fold": 0, "seed": 0, "score": 0.5, "p": p}
        | dict(zip(("x_mm", "y_mm", "z_mm"), places.T, strict=True))
        | fixed
        | physics
    )


@pytest.fixture(scope="session")
def evaluation() -> Evaluation:
    """40 series, 16 positive; nobody has the last location."""
    rng = np.random.default_rng(1)
    index, scans, expert, lesions = [], [], [], {}
    for i in range(40):
        uid, positive = f"1.2.{i}", i % 5 < 2
        truth = np.zeros(13)
        places = rng.uniform(-40, 40, (4, 3))
        p = rng.uniform(0, 0.6, 4)
        if positive:
            place = i % 12
            truth[place] = 1
            lesions[uid] = [Lesion(places[0] + 1, 2.5, place)]
            p[0] += 0.35 * (i % 3 > 0)
            places[0] += 90.0 * (i % 10 == 0)  # some are missed
        labels = dict(zip(LOCATION_KEYS, truth, strict=True)) | {"present": float(positive)}
        who = {"series_uid": uid, "patient_id": f"p{i}"}
        index.append(who | {"modality": "MRA", "age": 50.0, "sex": "M", "site": "x"} | labels)
        q = np.clip(0.5 * np.append(truth, positive) + 0.5 * rng.random(14), 0, 1)
        keys = [f"p_{key}" for key in (*LOCATION_KEYS, "present")]
        scans.append(who | {"fold": 0} | dict(zip(keys, q, strict=True)))
        expert.append(expert_rows(uid, places, p))
    table = pd.concat(expert, ignore_index=True)
    candidates = table.assign(node=0, radius_mm=1.0)
    vessel = pd.DataFrame({"series_uid": ["1.2.0", "1.2.1"], "recall": [0.9, 1.0], "dice": [0.8, 0.9]})
    return evaluate_scans(
        pd.DataFrame(index), pd.DataFrame(scans), table, lesions, candidates, vessel, resamples=40
    )


@pytest.fixture(scope="session")
def candidate_table():
    """The function that makes EXPERT rows of one scan."""
    return expert_rows
