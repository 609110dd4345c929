"""The stacker corrects log odds that it was given, and keeps working where there is little to learn from."""

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.labels import LOCATIONS
from aneurysm.data.tables import LOCATION_KEYS
from aneurysm.stages.stacker import Boosting, Calibration, StackerModule, load_booster, scan_rows

BOOSTING = Boosting(20, 1, 0.05, 5.0, 10.0, 0.8)


def readings(scans: int = 80, candidates: int = 3, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Candidates whose best p says something about the scan, and labels (n, 14)."""
    rng = np.random.default_rng(seed)
    present = (np.arange(scans) % 2).astype(float)
    rows = []
    for scan in range(scans):
        for k in range(candidates):
            sure = 1.5 * present[scan] if k == 0 else -1.0
            rows.append(
                {
                    "series_uid": f"s{scan:03d}",
                    "p": 1 / (1 + np.exp(-3 * (sure + rng.normal()))),
                    "score": 1 / (1 + np.exp(-(sure + rng.normal()))),
                    "order_parameter": rng.random(),
                    "physics_residual": rng.normal(),
                    "flow_coherence": rng.random(),
                    **{f"{key}_logit": rng.normal() for key in LOCATION_KEYS},
                }
            )
    labels = np.zeros((scans, 14))
    labels[:, -1] = present
    labels[present == 1, 0] = 1.0
    return pd.DataFrame(rows), labels


def rows_of(table: pd.DataFrame, uids: list[str]):
    return scan_rows(pd.DataFrame(table[table.series_uid.isin(uids)]), {uid: "CTA" for uid in uids})


def test_probabilities_are_calibrated_and_survive_saving():
    table, labels = readings(400)
    uids = sorted(table.series_uid.unique())
    module = StackerModule(BOOSTING)
    # Neighbours have different labels: take both kinds on both sides.
    order = np.argsort(np.arange(400) % 4 >= 2, kind="stable")
    uids = [uids[i] for i in order]
    train, held_out = rows_of(table, uids[:200]), rows_of(table, uids[200:])
    module.fit(train, labels[order][:200])
    p, truth = module.probabilities(held_out)[:, -1], labels[order][200:, -1]
    brier = ((p - truth) ** 2).mean()
    raw = 1 / (1 + np.exp(-held_out.present_margin))
    assert brier < ((raw - truth) ** 2).mean() and brier < 0.2
    assert abs(p.mean() - truth.mean()) < 0.08

    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    again = StackerModule(BOOSTING)
    again.on_load_checkpoint(checkpoint)
    np.testing.assert_array_equal(again.probabilities(held_out), module.probabilities(held_out))
    shipped = load_booster(module.present.save_raw("ubj"))
    assert Calibration.of(shipped) == Calibration.of(module.present) != Calibration()


def test_the_margin_is_the_mean_of_both_stages_at_the_best_candidate():
    table, _ = readings(1, candidates=2)
    table.loc[:, "p"], table.loc[:, "score"] = [0.9, 0.5], [0.5, 0.6]
    assert scan_rows(table, {"s000": "CTA"}).present_margin[0] == pytest.approx(np.log(9) / 2, rel=1e-5)
    nothing = scan_rows(table.iloc[:0], {"s000": "CTA"})
    assert nothing.present_margin[0] < -6 and nothing.location.shape == (1, len(LOCATIONS), 7)


def test_one_class_hands_the_margins_through():
    table, labels = readings(10)
    rows = rows_of(table, sorted(table.series_uid.unique()))
    module = StackerModule(BOOSTING)
    module.fit(rows, np.zeros_like(labels))
    assert module.present is None and module.location is None
    np.testing.assert_allclose(
        module.probabilities(rows)[:, -1], 1 / (1 + np.exp(-rows.present_margin)), rtol=1e-6
    )


def test_a_handful_of_scans_never_turns_the_order_round():
    margin, y = np.array([-2.0, -1.0, 1.0, 2.0], np.float32), np.array([1, 1, 0, 0])
    assert Calibration.fit(margin, y) == Calibration()
