"""Which patients choose the lumen rule: grouped, balanced, the same every time, and never fitted on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.errors import UserError
from aneurysm.data.preparation.prepared import PreparedCase, save_prepared
from aneurysm.data.scan import Grid
from aneurysm.experiment import Experiment
from aneurysm.training.masks import chosen_rules, mean_figures, rule_split

GRID = Grid((16, 16, 16), np.eye(4)[[2, 1, 0, 3]])
MODALITIES = ("CTA", "CTA", "CTA", "MRA", "MRA", "T2")


def case(uid: str, patient: str, modality: str, annotated: bool = True) -> PreparedCase:
    vessel = np.zeros(GRID.shape, np.uint8)
    vessel[:, 6:10, 6:10] = 1
    return PreparedCase(
        uid, patient, modality, np.zeros(GRID.shape, np.float32), GRID, vessel if annotated else None, None,
        (), None, None, None, np.full(13, np.nan, np.float32), GRID, 0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """60 patients in the mix above, every third with two series, every sixth (T2) without vessel mask."""
    folder, files = tmp_path_factory.mktemp("prepared"), {}
    for p in range(60):
        modality = MODALITIES[p % 6]
        for s in range(2 if p % 3 == 0 else 1):
            uid = f"{p:02d}.{s}"
            files[uid] = folder / f"{uid}.blosc2"
            save_prepared(case(uid, f"patient {p:02d}", modality, annotated=p % 12 != 11), files[uid])
    return files


def experiment(files: dict[str, Path], fold_seed: int = 0, seed: int = 0) -> Any:
    uids = sorted(files)
    patients = [f"patient {uid[:2]}" for uid in uids]
    index = pd.DataFrame(
        {"series_uid": uids, "patient_id": patients, "modality": [MODALITIES[int(u[:2]) % 6] for u in uids]}
    )
    fold_of = {uid: int(uid[:2]) // 6 % 2 for uid in uids}
    cfg: Any = SimpleNamespace(fold_seed=fold_seed, seed=seed)
    return Experiment(cfg, Path("unused"), index, files, fold_of, "0")


def test_the_split_is_by_patient_and_keeps_the_mix_of_modalities(files):
    one = experiment(files)
    fitted, judged = rule_split(one, 0, 0.25)
    patient = dict(zip(one.index.series_uid, one.index.patient_id, strict=True))
    assert not {patient[u] for u in fitted} & {patient[u] for u in judged}
    assert set(fitted) | set(judged) <= set(one.training(0)) and not set(judged) & set(one.held_out(0))
    modality = dict(zip(one.index.series_uid, one.index.modality, strict=True))
    patients = {patient[u]: modality[u] for u in judged}
    # 30 training patients of which 5 T2 ones have no mask: a quarter of 15 CTA, 10 MRA and 0 T2.
    counts = pd.Series(patients).value_counts().to_dict()
    assert len(patients) == 6 and counts["CTA"] in (3, 4) and counts["MRA"] in (2, 3)


def test_patients_without_a_vessel_mask_stay_in_the_fit(files):
    one = experiment(files)
    fitted, judged = rule_split(one, 0, 0.5)
    unannotated = {u for u in one.training(0) if int(u[:2]) % 12 == 11}
    assert unannotated and unannotated <= set(fitted) and not unannotated & set(judged)


def test_the_split_is_dealt_by_fold_seed_and_not_by_seed(files):
    first = rule_split(experiment(files), 0, 0.25)
    assert rule_split(experiment(files, seed=7), 0, 0.25) == first
    assert rule_split(experiment(files, fold_seed=1), 0, 0.25) != first


def test_no_share_judges_on_what_is_fitted(files):
    one = experiment(files)
    fitted, judged = rule_split(one, 0, 0.0)
    assert fitted == one.training(0) and set(judged) < set(fitted)


def test_one_patient_at_least_and_never_all(files):
    few = {uid: path for uid, path in files.items() if uid[:2] in ("00", "01", "06", "07")}
    _, judged = rule_split(experiment(few), 0, 0.01)
    assert len({uid[:2] for uid in judged}) == 1
    with pytest.raises(UserError, match="takes 2 out of the fit"):
        rule_split(experiment(few), 0, 0.9)
    with pytest.raises(UserError, match="at least 0 and below 1"):
        rule_split(experiment(few), 0, 1.0)
    nothing = {uid: path for uid, path in files.items() if int(uid[:2]) % 12 == 11}
    assert rule_split(experiment(nothing), 0, 0.2)[1] == []


def test_chosen_rules_tell_what_they_promise(caplog):
    s: Any = SimpleNamespace(recall_floor=0.9, precision=0.5, rule_confidence=0.5, per_modality=True)
    cases = [case(str(k), str(k), "MRA") for k in range(3)]

    def probability(one: PreparedCase) -> np.ndarray:
        assert one.vessel is not None
        return np.where(one.vessel > 0, np.float32(0.8), np.float32(0.1))

    rules, figures = chosen_rules(cases, probability, s)
    assert figures["rule_recall"] == figures["rule_dice"] == 1 and figures["rule_scans"] == 3
    assert 0.1 < figures["threshold"] <= 0.8 and figures["threshold/MRA"] == rules.of("MRA").threshold
    assert "no lumen threshold" not in caplog.text
    chosen_rules(cases, lambda one: np.full(GRID.shape, np.float32(0.3)), s)
    assert "no lumen threshold reaches a mean recall of 0.900" in caplog.text
    s.recall_floor = 1.5
    with pytest.raises(UserError, match="recall_floor"):
        chosen_rules(cases, probability, s)


def test_means_leave_out_what_is_unknown_and_count_aneurysms_together():
    table = pd.DataFrame(
        {
            "series_uid": ["a", "b", "c"],
            "modality": ["CTA", "CTA", "MRA"],
            "dice": [0.8, np.nan, 0.6],
            "hd95_mm": [np.nan] * 3,
            "aneurysms": [3, 1, 0],
            "aneurysms_centre": [3, 0, 0],
            "aneurysms_half": [2, 0, 0],
        }
    )
    figures = mean_figures(table)
    assert figures["dice"] == pytest.approx(0.7) and "hd95_mm" not in figures
    assert (figures["dice/CTA"], figures["dice/MRA"]) == (0.8, 0.6)
    assert figures["aneurysm_in_mask_centre"] == 0.75 and figures["aneurysm_in_mask_half"] == 0.5
    assert figures["aneurysm_in_mask_half/CTA"] == 0.5 and "aneurysm_in_mask_half/MRA" not in figures
