"""Figures of lumen masks by stage and modality, and as headline rows."""

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.tables import OVERLAP
from aneurysm.evaluation.intervals import bootstrap
from aneurysm.evaluation.mask_groups import mask_groups, undefined
from aneurysm.evaluation.rows import vessel_rows


def table() -> pd.DataFrame:
    rows = []
    for uid, modality, recall, hd95, found in (
        ("a", "T2", 0.9, 1.0, (2, 2, 1)), ("b", "CTA", 0.8, 3.0, (1, 0, 0)),
        ("c", "CTA", 1.0, np.nan, (0, 0, 0)), ("d", "CTA", np.nan, np.nan, (1, 1, 1)),
    ):  # fmt: skip
        row = dict.fromkeys(OVERLAP.columns, 0.5) | {"series_uid": uid, "modality": modality}
        row |= {"recall": recall, "hd95_mm": hd95}
        row |= dict(zip(("aneurysms", "aneurysms_centre", "aneurysms_half"), found, strict=True))
        rows.append(row)
    return OVERLAP.conform(pd.DataFrame(rows).drop(columns="sac_recall"))


def test_means_by_modality_and_aneurysms_counted_together():
    groups = mask_groups({"vessel net": table(), "Smart Net": table().iloc[:1]})
    assert list(zip(groups.stage, groups.modality, groups.scans, strict=True)) == [
        ("vessel net", "all", 3), ("vessel net", "CTA", 2), ("vessel net", "T2", 1),
        ("Smart Net", "all", 1), ("Smart Net", "T2", 1),
    ]  # fmt: skip
    cta = groups.iloc[1]
    assert cta.recall == pytest.approx(0.9) and cta.hd95_mm == 3.0
    assert (cta.aneurysms, cta.in_mask_centre, cta.in_mask_half) == (2, 0.5, 0.5)
    assert groups.iloc[0].in_mask_centre == 0.75 and groups.iloc[0].in_mask_half == 0.5
    assert mask_groups({}).empty


def test_a_table_of_an_older_run_has_fewer_figures():
    old = pd.DataFrame({"series_uid": ["a", "b"], "recall": [0.9, 0.7], "dice": [0.8, 0.6]})
    groups = mask_groups({"vessel net": old})
    assert list(groups.modality) == ["all"] and groups.recall[0] == pytest.approx(0.8)
    assert np.isnan(groups.hd95_mm[0]) and np.isnan(groups.in_mask_half[0])


def test_headline_rows_have_intervals_and_counts():
    index = pd.DataFrame({"series_uid": list("abcd"), "patient_id": list("abcd")})
    rows = vessel_rows(table(), index, lambda statistic, patients: bootstrap(statistic, patients, 200))
    named = {row.figure: row for row in rows}
    half = named["Aneurysm-in-mask recall, half of the sac"]
    assert (half.value, half.n) == (0.5, 4)
    assert half.interval is not None and 0 <= half.interval.low <= 0.5 <= half.interval.high <= 1
    assert named["Aneurysm-in-mask recall, centre"].value == 0.75
    assert named["Vessel HD95 (mm)"].value == 2.0 and named["Vessel HD95 (mm)"].n == 2


def test_scans_without_a_surface_distance_are_named():
    assert undefined(table()) == ["1 lumen masks are empty: not in the mean HD95, the first is c."]
    assert undefined(table().iloc[:2]) == []
