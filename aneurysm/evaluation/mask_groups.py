"""Figures of the lumen masks by modality: of the vessel stage and of the segmenter, which makes the graph."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from aneurysm.data.labels import MODALITIES

FIGURES = (
    "recall", "precision", "dice", "cldice", "betti0_error", "betti1_error", "hd95_mm",
    "recall_below_0_75mm", "recall_0_75_to_1_25mm", "recall_1_25_to_2mm", "recall_from_2mm",
)  # fmt: skip


def mask_groups(stages: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Means per stage and modality, "all" first.

    Args:
        stages: rows of `tables.OVERLAP`, or a part of its columns, by the name of the stage.

    Returns:
        stage, modality, scans (with annotated vessels), the means of FIGURES, aneurysms, in_mask_centre and
        in_mask_half (shares of the aneurysms, NaN without any).
    """
    records = []
    for stage, table in stages.items():
        known = table["modality"] if "modality" in table else pd.Series("", index=table.index)
        for modality in ("all", *(m for m in MODALITIES if m in set(known))):
            part = table if modality == "all" else table[known == modality]
            records.append({"stage": stage, "modality": modality, **_figures(pd.DataFrame(part))})
    return pd.DataFrame(records)


def aneurysm_shares(table: pd.DataFrame) -> tuple[int, float, float]:
    """Aneurysms of these scans, and the shares in the mask: with the centre, and by at least a half."""
    if "aneurysms" not in table or not (total := int(table["aneurysms"].to_numpy().sum())):
        return 0, float("nan"), float("nan")
    centre, half = (table[name].to_numpy().sum() / total for name in ("aneurysms_centre", "aneurysms_half"))
    return total, float(centre), float(half)


def undefined(table: pd.DataFrame) -> list[str]:
    """Sentences that name the scans without a surface distance although their vessels are annotated."""
    if "hd95_mm" not in table or "recall" not in table:
        return []
    empty = table.loc[table["recall"].notna() & table["hd95_mm"].isna(), "series_uid"].tolist()
    if not empty:
        return []
    return [f"{len(empty)} lumen masks are empty: not in the mean HD95, the first is {empty[0]}."]


def _figures(table: pd.DataFrame) -> dict[str, float]:
    def mean(name: str) -> float:
        values = table[name].to_numpy(np.float64) if name in table else np.zeros(0)
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else float("nan")

    total, centre, half = aneurysm_shares(table)
    return {
        "scans": int(table["recall"].notna().to_numpy().sum()) if "recall" in table else 0,
        **{name: mean(name) for name in FIGURES},
        "aneurysms": total,
        "in_mask_centre": centre,
        "in_mask_half": half,
    }
