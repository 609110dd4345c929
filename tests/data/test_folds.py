"""Folds never share a patient, are balanced, frozen, and refuse data that they do not cover."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aneurysm.data.folds import check_folds, load_or_make_folds, make_folds
from aneurysm.data.labels import MODALITIES
from aneurysm.data.tables import INDEX, LOCATION_KEYS


def index_of(patients: int, seed: int = 0, positive: float = 0.4) -> pd.DataFrame:
    """About 1.5 series per patient; patient ids with leading zeros, unknown labels and ages among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        sick = rng.random() < positive
        place = rng.integers(13)
        for series in range(rng.integers(1, 3)):
            unknown = rng.random() < 0.1
            rows.append(
                {
                    "series_uid": f"{patient}.{series}",
                    "patient_id": f"{patient:05d}",
                    "modality": rng.choice(MODALITIES),
                    "age": np.nan if rng.random() < 0.2 else rng.uniform(20, 90),
                    "sex": rng.choice(["M", "F", ""]),
                    "site": "x",
                    "present": np.nan if unknown else float(sick),
                    **{
                        k: np.nan if unknown else float(sick and i == place)
                        for i, k in enumerate(LOCATION_KEYS)
                    },
                }
            )
    return INDEX.conform(pd.DataFrame(rows))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(6, 60), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_every_patient_is_in_exactly_one_fold(k, patients, seed, positive):
    index = index_of(patients, seed, positive)
    folds = make_folds(index, k, seed)
    assert folds["patient_id"].is_unique and set(folds["patient_id"]) == set(index["patient_id"])
    assert sorted(folds["fold"].unique()) == list(range(k))
    check_folds(folds, index)


def test_balance_and_reproducibility():
    index = index_of(400)
    folds = make_folds(index, 5, 1)
    sizes = folds["fold"].value_counts()
    assert sizes.max() - sizes.min() <= 8
    joined = index.merge(folds, on="patient_id")
    rate = joined.groupby("fold")["present"].mean()
    assert rate.max() - rate.min() < 0.06
    age = joined.groupby("fold")["age"].median()
    assert age.max() - age.min() < 12
    for modality in MODALITIES:
        share = (joined["modality"] == modality).groupby(joined["fold"]).mean()
        assert share.max() - share.min() < 0.08
    pd.testing.assert_frame_equal(folds, make_folds(index.sample(frac=1, random_state=3), 5, 1))
    assert (folds["fold"] != make_folds(index, 5, 2)["fold"]).any()


def test_few_positives_warn_and_few_patients_fail(caplog):
    index = index_of(10, positive=0.0)
    index.loc[0, "present"] = 1
    make_folds(index, 5, 0)
    assert "1 patients with an aneurysm for 5 folds" in caplog.text
    with pytest.raises(ValueError, match="3 patients cannot be dealt into 5 folds"):
        make_folds(index_of(3), 5, 0)
    with pytest.raises(ValueError, match="at least 2"):
        make_folds(index, 1, 0)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_folds_are_frozen(tmp_path, suffix):
    index = index_of(30)
    path = tmp_path / f"deep/folds.{suffix}"
    first = load_or_make_folds(path, index, 3, seed=0)
    stamp = path.read_bytes()
    pd.testing.assert_frame_equal(load_or_make_folds(path, index, 3, seed=99), first)
    assert path.read_bytes() == stamp
    # A part of the data uses the folds of the whole.
    pd.testing.assert_frame_equal(load_or_make_folds(path, index[:8], 3, seed=0), first)
    with pytest.raises(ValueError, match=r"holds 3 folds but 4 were asked for"):
        load_or_make_folds(path, index, 4, seed=0)
    with pytest.raises(ValueError, match=r"folds\.\w+: 10 of 40 patients have no fold, first '00030'"):
        load_or_make_folds(path, index_of(40), 3, seed=0)


def test_leakage_is_refused(tmp_path):
    index = index_of(12)
    folds = make_folds(index, 3, 0)
    leak = folds.iloc[:1].assign(fold=(folds.iloc[0]["fold"] + 1) % 3)
    with pytest.raises(ValueError, match="Leakage: 1 patients are in more than one fold, first '00000'"):
        check_folds(pd.concat([folds, leak]), index)
    pd.concat([folds, leak]).to_csv(tmp_path / "folds.csv", index=False)
    with pytest.raises(ValueError, match=r"folds\.csv: Leakage"):
        load_or_make_folds(tmp_path / "folds.csv", index, 3, 0)
    with pytest.raises(ValueError, match="without a gap"):
        check_folds(folds.assign(fold=folds["fold"] * 2), index)
    with pytest.raises(ValueError, match="lacks"):
        check_folds(folds.drop(columns="fold"), index)
    with pytest.raises(ValueError, match="csv or"):
        load_or_make_folds(tmp_path / "folds.json", index, 3, 0)
