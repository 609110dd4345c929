"""Figures and tables that a stage adds to the log of a fold, all of held-out patients.

Each function draws at most `log.figures` scans, crops or candidates of a kind; `logger.figures=0` draws none.
Figures are numbered, not named by scan: a panel of W&B then shows the same kind of figure for every fold.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Lesion
from aneurysm.data.tables import LOCATION_KEYS
from aneurysm.evaluation.calibration import calibration
from aneurysm.evaluation.candidates import candidate_recall
from aneurysm.evaluation.froc import froc
from aneurysm.evaluation.rsna_score import rsna_score
from aneurysm.experiment import Experiment
from aneurysm.nets.masking import blocks_to_voxels
from aneurysm.report.figures import calibration_figure, candidate_figure, froc_figure, roc_figure
from aneurysm.report.projections import mip_panel
from aneurysm.report.samples import (
    JudgedCrop,
    ReconstructedCrop,
    agreement_figure,
    judged_crops_figure,
    reconstruction_figure,
)
from aneurysm.runs.record import RunLog
from aneurysm.stages.findings import Finding
from aneurysm.stages.patches import aneurysm_patch, network_patch
from aneurysm.stages.pretrain import PretrainData, PretrainModule
from aneurysm.stages.stored import opened, remembered
from aneurysm.stages.volumes import aneurysm_target, vessel_target
from aneurysm.training.masks import spread


def pretrain_pictures(log: RunLog, module: PretrainModule, data: PretrainData, spacing_mm: float) -> None:
    """Reconstructions of the held-out crops in which there is most to see."""
    crops = torch.cat(list(data.val_dataloader()))
    best = crops.flatten(1).std(dim=1).argsort(descending=True)[: log.figures]
    crops = crops[best].to(module.device)
    generator = torch.Generator().manual_seed(module.seed)
    active = module.masking(None, tuple(crops.shape), 1.0, generator).to(crops.device)
    with torch.no_grad():
        made = module.net(crops, active).reconstruction
    seen = blocks_to_voxels(active, module.masking.block, crops.shape[2:])
    image, visible, painted = (a[:, 0].cpu().numpy() for a in (crops, seen, made))
    spacing = np.full(3, spacing_mm)
    shown = [ReconstructedCrop(image[i], visible[i], painted[i], spacing) for i in range(len(image))]
    log.figure("reconstructions", reconstruction_figure(shown), "Held-out crops, hidden blocks painted in.")


def mask_pictures(
    log: RunLog,
    experiment: Experiment,
    overlap: pd.DataFrame,
    masks: Mapping[str, Callable[[PreparedCase], np.ndarray]],
) -> None:
    """Predicted against annotated masks, from the best scan to the worst, and the overlap of every scan.

    Args:
        overlap: series_uid, dice and whatever else is known of each held-out scan.
        masks: name (vessel, sac) -> predicted mask of a scan, (d, h, w) bool.
    """
    log.table("overlap", overlap)
    ordered = overlap.sort_values("dice", ascending=False, na_position="last")
    annotated = ordered[ordered.dice.notna()]
    uids = spread(list((annotated if len(annotated) else ordered).series_uid), log.figures)
    for number, uid in enumerate(uids, 1):
        case = remembered(experiment.prepared[uid])
        row = overlap[overlap.series_uid == uid].iloc[0]
        for name, predict in masks.items():
            truth = vessel_target(case) if name == "vessel" else aneurysm_target(case)
            if name == "sac" and (truth is None or not truth.any()):
                continue  # nothing there to compare with
            predicted = predict(case)
            if truth is None:
                figure, said = (
                    mip_panel(case.image, case.grid, predicted, modality=case.modality),
                    "not annotated",
                )
            else:
                figure = agreement_figure(case.image, case.grid, predicted, truth, case.modality)
                said = f"Dice {row.dice:.2f}" if name == "vessel" else f"recall {row.sac_recall:.2f}"
            log.figure(f"{name}_{number}", figure, f"{uid}, {case.modality}, {name} mask: {said}.")


def candidate_pictures(
    log: RunLog,
    experiment: Experiment,
    held_out: Sequence[str],
    table: pd.DataFrame,
    mask: Callable[[PreparedCase], np.ndarray],
) -> None:
    """Candidates on their scans, FROC and recall of the candidates, and their table."""
    log.table("candidates", table)
    lesions, known = _known_lesions(experiment, held_out)
    marks = table.rename(columns={"score": "p"})
    if known:
        log.figure("candidate_froc", froc_figure({"smart_net": froc(marks, lesions, known)}))
        log.figure("candidate_recall", candidate_figure(candidate_recall(table, lesions, known)))
    others = [uid for uid in held_out if not lesions.get(uid)]
    with_lesion = [uid for uid in held_out if lesions.get(uid)]
    for number, uid in enumerate((spread(with_lesion, log.figures) + others)[: log.figures], 1):
        case = remembered(experiment.prepared[uid])
        figure = mip_panel(case.image, case.grid, mask(case), _marks(marks, uid), case.lesions, case.modality)
        said = "dashed: known aneurysms" if case.lesions else "no known aneurysm"
        log.figure(f"candidates_{number}", figure, f"{uid}, {case.modality}: the best candidates; {said}.")


def expert_pictures(
    log: RunLog,
    experiment: Experiment,
    held_out: Sequence[str],
    found: Sequence[Finding],
    table: pd.DataFrame,
    masks: Callable[[list[Finding]], Sequence[np.ndarray]],
) -> None:
    """FROC of the expert, its surest right and wrong answers with their masks, and all its answers.

    Args:
        held_out: scans of the fold.
        found: their candidates, in the order of `table`.
        table: rows of the expert's predictions.
        masks: makes the sac probability of the crops of some of them; all would not fit into memory.
    """
    labels = np.array([f.is_aneurysm for f in found], dtype=np.float64)
    chosen = ["series_uid", "candidate", "x_mm", "y_mm", "z_mm", "score", "p", "order_parameter"]
    chosen += ["physics_residual", "volume_mm3"]
    answers = pd.DataFrame(table[chosen]).assign(is_aneurysm=labels)
    log.table("predictions", answers.sort_values("p", ascending=False))
    lesions, known = _known_lesions(experiment, held_out)
    if known and len(table):
        curve = {"expert": froc(table, lesions, known), "smart_net": froc(_as_marks(found), lesions, known)}
        log.figure(
            "froc", froc_figure(curve), "Candidates as the Smart Net ordered them, and as the expert does."
        )
    p = table.p.to_numpy(np.float64)
    wrong = np.abs(p - labels)
    order = [int(i) for i in np.argsort(wrong) if np.isfinite(wrong[i])]
    right = [i for i in order if wrong[i] < 0.5]
    groups = {
        # Aneurysms first: that a place without one has none is easily said.
        "Surest and right": [*[i for i in right if labels[i] == 1], *[i for i in right if labels[i] == 0]],
        "Surest and wrong": [i for i in reversed(order) if wrong[i] >= 0.5],
    }
    crops = {}
    for name, members in groups.items():
        shown = members[: log.figures]
        drawn = masks([found[i] for i in shown])
        crops[name] = [_judged(found[i], p[i], mask) for i, mask in zip(shown, drawn, strict=True)]
    if any(crops.values()):
        log.figure("judged_candidates", judged_crops_figure(crops))


def stacker_pictures(log: RunLog, table: pd.DataFrame, truth: np.ndarray) -> None:
    """ROC and calibration of the scan probabilities, and their table with the labels.

    Args:
        table: series_uid and the 14 probabilities of every held-out scan.
        truth: (n, 14) 0, 1 or NaN, in the same order.
    """
    columns = [f"p_{key}" for key in (*LOCATION_KEYS, "present")]
    log.table("scans", table.assign(present=truth[:, -1]).sort_values("p_present", ascending=False))
    probability = table[columns].to_numpy(np.float64)
    log.figure("roc", roc_figure(truth, probability, rsna_score(truth, probability)))
    reliability = calibration(truth[:, -1], probability[:, -1])
    log.figure("calibration", calibration_figure({"Aneurysm present": reliability}))


def _known_lesions(
    experiment: Experiment, uids: Sequence[str]
) -> tuple[dict[str, tuple[Lesion, ...]], list[str]]:
    """Lesions of each positive scan, and the scans whose lesions are all known."""
    cases = {uid: opened(experiment.prepared[uid]) for uid in uids}
    known = [uid for uid, case in cases.items() if case.lesions or case.present is False]
    return {uid: tuple(cases[uid].lesions) for uid in known if cases[uid].lesions}, known


def _marks(marks: pd.DataFrame, uid: str, most: int = 5) -> list[tuple[np.ndarray, float]]:
    mine = marks.loc[marks.series_uid == uid, ["x_mm", "y_mm", "z_mm", "p"]].sort_values("p", ascending=False)
    return [(row[:3], float(row[3])) for row in mine.to_numpy(np.float64)[:most]]


def _as_marks(found: Sequence[Finding]) -> pd.DataFrame:
    rows = [(f.case.series_uid, *f.centre_mm, f.candidate.score) for f in found]
    return pd.DataFrame(rows, columns=["series_uid", "x_mm", "y_mm", "z_mm", "p"])


def _judged(one: Finding, p: float, mask: np.ndarray) -> JudgedCrop:
    size = mask.shape[0]
    start = np.round(one.case.grid.to_index(one.centre_mm)).astype(int) - size // 2  # as the expert's crop
    is_one = "aneurysm" if one.is_aneurysm == 1 else "no aneurysm"
    name = f"...{one.case.series_uid[-12:]} candidate {one.number + 1}"
    return JudgedCrop(
        network_patch(one.case, start, size), mask, aneurysm_patch(one.case, start, size),
        one.case.grid.spacing, f"p {p:.2f}, {is_one}, {name}",
    )  # fmt: skip
