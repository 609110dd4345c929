"""Rebuild graph, candidates and the expert's verdict from lumen masks with known errors."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from aneurysm.data.errors import UserError
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Lesion
from aneurysm.evaluation.candidates import candidate_recall
from aneurysm.evaluation.froc import froc
from aneurysm.evaluation.intervals import bootstrap
from aneurysm.evaluation.segmentation import overlap
from aneurysm.evaluation.vessels import aneurysms_inside
from aneurysm.sensitivity.errors import MaskError, altered
from aneurysm.stages import expert, smart_net
from aneurysm.stages.findings import list_findings
from aneurysm.stages.stored import opened, opened_probabilities
from aneurysm.stages.volumes import vessel_target
from aneurysm.training.finished import Finished, HeldOut
from aneurysm.vessels.repair import repair

log = logging.getLogger(__name__)

BASES = ("predicted", "truth")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one scan came to with one error in its mask."""

    series_uid: str
    patient_id: str
    lesions: tuple[Lesion, ...]
    known: bool  # whether all its aneurysms are
    recall: float  # of the mask, NaN where vessels are not annotated
    precision: float
    dice: float
    in_mask: int  # aneurysms with at least half of their voxels in the mask
    candidates: pd.DataFrame  # series_uid, x_mm, y_mm, z_mm, score of the Smart Net
    judged: pd.DataFrame  # with p of the expert and is_aneurysm


def chosen_scans(finished: Finished, base: str, count: int | None = None) -> list[HeldOut]:
    """The scans of a study: all that can serve, or some of them, evenly taken.

    Args:
        base: the masks that get the errors: "predicted" out-of-fold, or the annotated "truth".

    Raises:
        UserError: `base` is none of these, or no scan can serve.
    """
    if base not in BASES:
        raise UserError(f"--base {base}: it is {' or '.join(BASES)}.")
    scans = [s for s in finished.scans if base != "truth" or "vessel" in opened(s.case).masks]
    if count is not None and count < len(scans):
        scans = [scans[i] for i in np.linspace(0, len(scans) - 1, count).astype(int)]
    if not any(opened(scan.case).lesions for scan in scans):
        raise UserError("None of these scans has an aneurysm with a known place: nothing can be missed.")
    return scans


def study(
    finished: Finished,
    errors: Sequence[MaskError],
    base: str,
    seed: int,
    scans: Sequence[HeldOut],
) -> Iterator[dict[str, float | str]]:
    """One row of figures for every error, in their order.

    Every scan is judged by the models of the fold that had not seen it.

    Args:
        base: as in `chosen_scans`.
        seed: of the errors.
        scans: of `chosen_scans`.
    """
    for error in errors:
        outcomes = [_outcome(finished, scan, error, base, seed) for scan in scans]
        row = {"base": base, "kind": error.kind, "level": error.level, **_figures(outcomes, finished, seed)}
        log.info(
            "%s %g: mask recall %.3f, precision %.3f, candidate recall %.3f, expert AUC %.3f",
            error.kind, error.level, row["mask_recall"], row["mask_precision"], row["candidate_recall"],
            row["expert_auc"],
        )  # fmt: skip
        yield row


def _outcome(finished: Finished, scan: HeldOut, error: MaskError, base: str, seed: int) -> Outcome:
    case = opened(scan.case).load()
    probability = opened_probabilities(scan.probability).load()
    rule, settings = finished.rule(scan.fold, case.modality), finished.graph_settings
    predicted = rule(probability["vessel"], case.grid)
    truth = vessel_target(case)
    start = predicted
    if base == "truth":
        assert truth is not None  # `study` leaves the others out
        start = truth
    mask = error(start, probability["vessel"], case.grid, scan.series_uid, seed)
    seen = {**probability, "vessel": altered(probability["vessel"], predicted, mask, rule.threshold)}
    # As the pipeline mends its masks; a true mask has no faint pieces beside it.
    faint = seen["vessel"] >= rule.threshold if base == "predicted" else None
    mended = repair(mask, case.grid, settings.rules, seen["vessel"], faint)
    graph = smart_net.mask_graph(mended.voxels, seen, case.grid, settings)
    net = finished.graph_net(scan.fold, graph.node_features.shape[1], graph.edge_features.shape[1])
    scores = smart_net.node_scores(net, graph)
    peaks = smart_net.scan_peaks(seen, case.grid, settings)
    found = smart_net.candidates(graph, scores, peaks, case.grid, settings, finished.fusion(scan.fold))
    rows = smart_net.candidate_rows(scan.series_uid, found, scan.fold)
    judged = _judged(finished, scan, case, seen, graph, rows, rule.threshold)
    shares = None if truth is None else overlap(mask, truth)
    _, _, half = aneurysms_inside(mask, case.grid, case.lesions, case.aneurysm)
    unknown = float("nan")
    return Outcome(
        scan.series_uid,
        case.patient_id,
        case.lesions,
        bool(case.lesions) or case.present is False,
        unknown if shares is None else shares.recall,
        unknown if shares is None else shares.precision,
        unknown if shares is None else shares.dice,
        half,
        rows,
        judged,
    )


def _judged(
    finished: Finished, scan: HeldOut, case: PreparedCase, seen: dict[str, np.ndarray], graph: object,
    rows: pd.DataFrame, threshold: float,
) -> pd.DataFrame:  # fmt: skip
    if not len(rows):
        return pd.DataFrame(columns=["series_uid", "x_mm", "y_mm", "z_mm", "p", "is_aneurysm"])
    hit_mm = float(finished.cfg.expert.hit_mm)
    findings = list_findings(case, seen, graph, rows, threshold, hit_mm=hit_mm)  # type: ignore[arg-type]
    net = finished.expert_net(scan.fold, len(findings[0].graph_features))
    table, _ = expert.judge(net, findings, finished.crop, scan.fold, int(finished.cfg.seed))
    return table.assign(is_aneurysm=[one.is_aneurysm for one in findings])


def _figures(outcomes: Sequence[Outcome], finished: Finished, seed: int) -> dict[str, float]:
    hit_mm = float(finished.cfg.expert.hit_mm)
    known = [one for one in outcomes if one.known]
    lesions = {one.series_uid: one.lesions for one in known if one.lesions}
    uids = [one.series_uid for one in known]
    columns = ["series_uid", "x_mm", "y_mm", "z_mm", "score"]
    proposed = pd.concat([pd.DataFrame(one.candidates, columns=columns) for one in known])
    recall = candidate_recall(proposed, lesions, uids, hit_mm)
    patients = [one.patient_id for one in known]
    bounds = bootstrap(recall.resampled, patients, seed=seed)[0]
    judged = pd.concat([one.judged for one in known if len(one.judged)] or [known[0].judged])
    curve = froc(judged, lesions, uids, hit_mm)
    labels = judged.is_aneurysm.to_numpy(np.float64)
    p = judged.p.to_numpy(np.float64)
    missed = int(np.isinf(recall.rank).sum())
    total = len(recall.rank)
    return {
        "scans": len(outcomes),
        "mask_recall": _mean([one.recall for one in outcomes]),
        "mask_precision": _mean([one.precision for one in outcomes]),
        "mask_dice": _mean([one.dice for one in outcomes]),
        "aneurysms": total,
        "aneurysm_in_mask": sum(one.in_mask for one in known) / total,
        "candidates_per_scan": recall.mean_per_scan,
        "candidate_recall": recall.recall,
        "candidate_recall_low": bounds.low,
        "candidate_recall_high": bounds.high,
        "expert_auc": _auc(labels, p),
        "expert_auc_with_missed": _auc(
            np.concatenate([labels, np.ones(missed)]), np.concatenate([p, np.full(missed, -1.0)])
        ),
        "sensitivity_1fp": curve.sensitivity_at(1.0),
    }


def _mean(values: Sequence[float]) -> float:
    """Of those that are known; NaN where none is."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _auc(labels: np.ndarray, p: np.ndarray) -> float:
    """NaN where there is only one kind."""
    return float(roc_auc_score(labels, p)) if len(np.unique(labels)) == 2 else float("nan")
