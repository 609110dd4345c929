"""Cases against each other: doubles, contradictory patients, and patients in several folds."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from aneurysm.check.findings import Collector, Facts

_LISTED = 3  # series in a message
_MANY_STUDIES = 5  # of one patient: more than follow-up, where they are most of the data set


def check_across(facts: Sequence[Facts], folds: Path | None = None) -> list[Collector]:
    """Compare all cases of a data set.

    Args:
        folds: a fold file (.csv or .parquet with patient_id and fold) to check against the patients.
    """
    found: list[Collector] = []
    fold_of: dict[str, set[int]] = {}
    if folds is not None:
        fold_of = _check_folds(folds, facts, found)
    _check_doubles(facts, fold_of, found)
    by_patient = _grouped(facts, "patient_id")
    for patient, cases in by_patient.items():
        counts = Counter(sex for case in cases for sex in set(case.sexes))
        if len(counts) < 2:
            continue
        text = f"Patient {patient!r} is {' and '.join(f'{sex} in {n} series' for sex, n in counts.items())}."
        rarest = min(counts.values())
        for case in cases:  # the rarer sex is the likely mistake; both where neither is rarer
            if any(counts[sex] == rarest for sex in case.sexes):
                _add(found, case, "sex-contradiction", text)
    for patient, cases in by_patient.items():
        studies = {case.study_uid for case in cases if case.study_uid}
        if len(studies) >= _MANY_STUDIES and len(cases) > len(facts) / 2:
            whole = Collector("")
            whole.add(
                "one-patient", f"{len(cases)} of {len(facts)} series have the patient identifier {patient!r}."
            )
            found.append(whole)
    for study, cases in _grouped(facts, "study_uid").items():
        patients = sorted({case.patient_id for case in cases if case.patient_id})
        if len(patients) > 1:
            text = f"Study {study} holds series of {len(patients)} patients: {', '.join(patients[:_LISTED])}."
            for case in cases:
                _add(found, case, "study-of-two-patients", text)
    return found


def _grouped(facts: Sequence[Facts], name: str) -> dict[str, list[Facts]]:
    groups: dict[str, list[Facts]] = defaultdict(list)
    for case in facts:
        if key := getattr(case, name):
            groups[key].append(case)
    return {key: cases for key, cases in groups.items() if len(cases) > 1 or name == "patient_id"}


def _add(found: list[Collector], case: Facts, code: str, message: str) -> None:
    found.append(Collector(case.series_uid, case.patient_id))
    found[-1].add(code, message)


def _check_doubles(facts: Sequence[Facts], fold_of: dict[str, set[int]], found: list[Collector]) -> None:
    for cases in _grouped(facts, "series_uid").values():
        _add(found, cases[0], "same-series-twice", f"{len(cases)} folders hold files of this series.")
    for cases in _grouped(facts, "pixels").values():
        if len({case.series_uid for case in cases}) == 1:
            continue
        in_folds = {fold for case in cases for fold in fold_of.get(case.patient_id, ())}
        for case in cases:
            others = [o for o in cases if o.series_uid != case.series_uid]
            listed = ", ".join(
                f"{o.series_uid} (patient {o.patient_id or 'unknown'})" for o in others[:_LISTED]
            )
            text = f"Voxel for voxel the same as {listed}."
            if len(in_folds) > 1:
                _add(found, case, "duplicate-across-folds", f"{text} They are in folds {sorted(in_folds)}.")
            else:
                _add(found, case, "duplicate-images", text)


def _check_folds(path: Path, facts: Sequence[Facts], found: list[Collector]) -> dict[str, set[int]]:
    """Patient -> folds, with findings for leakage, missing patients and a broken file."""
    whole = Collector("")
    found.append(whole)
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str)
        pairs = list(zip(table["patient_id"].astype(str), table["fold"].astype(int), strict=True))
    except KeyError as error:
        whole.add("bad-folds", f"{path} has no column {error}.")
        return {}
    except Exception as error:  # pandas raises many types on files that are no tables
        whole.add("bad-folds", f"{path}: {' '.join(str(error).split())[:160]}")
        return {}
    fold_of: dict[str, set[int]] = defaultdict(set)
    for patient, fold in pairs:
        fold_of[patient].add(fold)
    numbers = sorted({fold for _, fold in pairs})
    if numbers != list(range(len(numbers))) or len(numbers) < 2:
        whole.add(
            "bad-folds", f"{path}: folds are numbered {numbers[:10]}, expected 0, 1, ... without a gap."
        )
    cases = _grouped(facts, "patient_id")
    for patient, several in fold_of.items():
        if len(several) > 1:
            own = cases.get(patient) or [Facts("", patient)]
            text = f"{path.name} puts patient {patient!r} into folds {sorted(several)}."
            for case in own:
                _add(found, case, "patient-in-two-folds", text)
    for patient, own in cases.items():
        if patient not in fold_of:
            _add(found, own[0], "patient-without-fold", f"{path.name} has no row for patient {patient!r}.")
    return fold_of
