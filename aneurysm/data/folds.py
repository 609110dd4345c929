"""Patient-grouped, multilabel-stratified folds that are made once and checked at every use."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

from aneurysm.data.files import replacing
from aneurysm.data.fold_balance import exchange_patients, label_spread
from aneurysm.data.labels import LOCATIONS, MODALITIES
from aneurysm.data.tables import LOCATION_KEYS, Table

log = logging.getLogger(__name__)

FOLDS = Table("folds", {"patient_id": "str", "fold": "int64"})

LABELS = ("present", *LOCATION_KEYS)

_AGE_BINS = 4  # quartiles
_SITES = 30  # the largest; the others count as one
_LABEL_WEIGHT = 4.0  # of a label against a modality, site, sex or age bin


def make_folds(index: pd.DataFrame, k: int, seed: int) -> pd.DataFrame:
    """Deal patients into k folds alike in aneurysms, locations, modalities, sites, age and sex.

    All series of a patient go to one fold. Patients are dealt by iterative stratification (Sechidis et al.,
    ECML 2011, on patients instead of series) and then exchanged while that evens the folds out. What cannot
    be balanced, labels with fewer patients than folds, is logged by name.

    Args:
        index: `tables.INDEX`; unknown labels count as absent.
        k: folds, 2 or more.

    Returns:
        patient_id, fold (0..k-1), sorted by patient.

    Raises:
        ValueError: fewer patients than folds.
    """
    if k < 2:
        raise ValueError(f"Cross-validation needs at least 2 folds, got {k}.")
    per_series = _series_traits(index)
    counts = pd.DataFrame(per_series.groupby(index["patient_id"].astype(str).to_numpy(), sort=True).sum())
    traits = (counts > 0).astype(int)
    if len(traits) < k:
        raise ValueError(
            f"{len(traits)} patients cannot be dealt into {k} folds. "
            f"Use at most {len(traits)} folds, or more data."
        )
    positives = int(traits["present"].to_numpy().sum())
    if positives < k:
        log.warning(
            "%d patients with an aneurysm for %d folds: some folds have none and cannot be scored",
            positives,
            k,
        )
    rare = {key: n for key in LOCATION_KEYS if 0 < (n := int(traits[key].to_numpy().sum())) < k}
    if rare:
        listed = ", ".join(f"{LOCATIONS[LOCATION_KEYS.index(key)]} ({n})" for key, n in rare.items())
        log.warning(
            "locations with fewer patients than %d folds, some folds cannot score them: %s", k, listed
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels rarer than k are normal here
        dealer = MultilabelStratifiedKFold(n_splits=k, shuffle=True, random_state=seed)
        split = list(dealer.split(np.zeros(len(traits)), traits.to_numpy(int)))
    fold = np.full(len(traits), -1)
    for number, (_, held_out) in enumerate(split):
        fold[held_out] = number
    # Stratification by rare labels can leave a fold of a tiny data set empty.
    for number in range(k):
        if not (fold == number).any():
            largest = np.bincount(fold, minlength=k).argmax()
            fold[np.flatnonzero(fold == largest)[-1]] = number
    weights = np.where(counts.columns.isin(LABELS), _LABEL_WEIGHT, 1.0)
    fold = exchange_patients(counts.to_numpy(float), weights, fold, k, seed)
    folds = FOLDS.conform(pd.DataFrame({"patient_id": traits.index, "fold": fold}))
    spread = label_spread(index, folds, LABELS).dropna()
    if len(spread):
        worst = spread.loc[spread["worst"].idxmax()]
        log.info("%d folds: worst deviation of a label count %.1f %% (%s, %d series)",
                 k, 100 * worst["worst"], worst["label"], worst["total"])  # fmt: skip
    return folds


def check_folds(folds: pd.DataFrame, index: pd.DataFrame) -> None:
    """Make sure that every patient of the index is in exactly one fold.

    Patients of `folds` that the index lacks are fine: a part of the data uses the folds of the whole.

    Raises:
        ValueError: a patient in two folds (leakage), a patient without fold, or an empty fold.
    """
    folds = FOLDS.conform(folds)
    several = folds.drop_duplicates()["patient_id"]
    if leaking := sorted(set(several[several.duplicated()])):
        raise ValueError(
            f"Leakage: {len(leaking)} patients are in more than one fold, first {leaking[0]!r}. "
            "Delete the fold file so that it is made again, or keep one fold per patient."
        )
    without = sorted(set(index["patient_id"].astype(str)) - set(folds["patient_id"]))
    if without:
        raise ValueError(
            f"{len(without)} of {index['patient_id'].nunique()} patients have no fold, first {without[0]!r}. "
            "The data have grown since the folds were frozen: use another experiment name, or delete the "
            "fold file and every run that was trained with it."
        )
    numbers = sorted(folds["fold"].unique())
    if numbers != list(range(len(numbers))) or len(numbers) < 2:
        raise ValueError(f"Folds must be numbered 0, 1, ... without a gap, found {numbers}.")


def load_or_make_folds(path: Path | str, index: pd.DataFrame, k: int, seed: int) -> pd.DataFrame:
    """The frozen folds of an experiment; made and written at the first call, checked at every call.

    Args:
        path: `.csv` or `.parquet`.

    Raises:
        ValueError: the file does not fit the index or has another number of folds than k.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: folds are kept as .csv or .parquet.")
    if not path.is_file():
        folds = make_folds(index, k, seed)
        with replacing(path) as part:
            if path.suffix == ".csv":
                folds.to_csv(part, index=False)
            else:
                folds.to_parquet(part, index=False)
    # Read back even when just made: what later calls see is what this one returns.
    read = pd.read_csv(path, dtype={"patient_id": str}) if path.suffix == ".csv" else pd.read_parquet(path)
    try:
        folds = FOLDS.conform(read)
        check_folds(folds, index)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found = len(set(folds["fold"]))
    if found != k:
        raise ValueError(
            f"{path} holds {found} folds but {k} were asked for. "
            f"Ask for {found}, or use another experiment name."
        )
    return folds


def _series_traits(index: pd.DataFrame) -> pd.DataFrame:
    """One row of 0/1 traits per series."""
    present = index["present"].fillna(0) > 0
    columns = {
        "present": present,
        **{key: index[key].fillna(0) > 0 for key in LOCATION_KEYS},
        "series": pd.Series(True, index=index.index),
        **{f"modality {name}": index["modality"] == name for name in MODALITIES},
        # Balanced one by one, the two may still leave all T2 scans with an aneurysm in one fold.
        **{f"{name} with": (index["modality"] == name) & present for name in MODALITIES},
        **{f"sex {name}": index["sex"] == name for name in ("M", "F")},
    }
    known = index["age"].dropna()
    if len(set(known)) > _AGE_BINS:
        edges = np.quantile(known, np.linspace(0, 1, _AGE_BINS + 1)[1:-1])
        bins = np.digitize(index["age"], edges)
        for i in range(_AGE_BINS):
            columns[f"age {i}"] = (bins == i) & index["age"].notna()
    sites = index["site"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    if len(sites) > 1:
        large = list(sites.index[:_SITES])
        for name in large:
            columns[f"site {name}"] = index["site"] == name
        if len(sites) > _SITES:
            columns["other site"] = ~index["site"].isin(large)
    return pd.DataFrame(columns).astype(int)
