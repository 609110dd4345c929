"""`python -m aneurysm.flow`: which arm tells aneurysms best, and which flow feature does so by itself."""

import numpy as np
import pandas as pd
import pytest

from aneurysm.flow import FEATURES, Judged, arms_table, features_table


def judged(arm: str, seed: int, skill: float) -> Judged:
    """400 candidates of 80 patients in two folds, one in five an aneurysm; `skill` moves p, in its noise."""
    rng = np.random.default_rng([seed, len(arm)])
    n = 400
    truth = (np.arange(n) % 5 == 0).astype(float)
    flow = {name: rng.standard_normal(n) for name in FEATURES}
    flow["flow_backflow"] += 2.0 * truth
    flow["flow_coherence"] -= 2.0 * truth
    if arm == "none":
        flow = dict.fromkeys(FEATURES, np.full(n, np.nan))
    table = pd.DataFrame(
        {
            "series_uid": [f"s{i // 5}" for i in range(n)],
            "patient_id": [f"p{i // 5}" for i in range(n)],
            "fold": (np.arange(n) // 5) % 2,
            # Folds are not calibrated to each other: their scores must not be pooled.
            "p": skill * truth + rng.standard_normal(n) + 100 * ((np.arange(n) // 5) % 2),
            "is_aneurysm": truth,
            **flow,
        }
    )
    return Judged(arm, seed, f"{arm}-{seed}", table)


@pytest.fixture(scope="module")
def runs() -> list[Judged]:
    arms = {"navier_stokes": 2.0, "none": 1.0, "placebo": 1.0}
    return [judged(arm, seed, skill) for arm, skill in arms.items() for seed in (0, 1)]


def test_arms_and_their_differences_have_intervals(runs):
    table = arms_table(runs).set_index("arm")
    assert table.index.tolist() == [
        "navier_stokes", "none", "placebo", "navier_stokes - none", "navier_stokes - placebo",
    ]  # fmt: skip
    # Two normals that lie d apart have an AUC of Phi(d / sqrt 2).
    assert table.auc["navier_stokes"] == pytest.approx(0.921, abs=0.03)
    assert table.auc["none"] == pytest.approx(0.760, abs=0.04)
    assert (table.low < table.auc).all() and (table.auc < table.high).all()
    assert table.low["navier_stokes - none"] > 0
    assert table.seeds["placebo"] == 2 and table.spread_over_seeds["placebo"] > 0


def test_features_are_judged_alone_and_with_their_direction(runs):
    table = features_table(runs).set_index(["arm", "feature"])
    assert set(table.index.get_level_values(0)) == {"navier_stokes", "placebo"}  # the third arm has no flow
    own = table.loc["navier_stokes"]
    assert own.low["flow_backflow"] > 0.85 and own.high["flow_coherence"] < 0.15
    assert own.low["physics_residual"] < 0.5 < own.high["physics_residual"]
    assert (own.known == 1).all()


def test_one_arm_alone_is_measured_without_differences(runs):
    assert arms_table([run for run in runs if run.arm == "none"]).arm.tolist() == ["none"]
