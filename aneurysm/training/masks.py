"""What the two segmentation stages share: patches, the rule that makes a mask, and its overlap."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from aneurysm.build import build
from aneurysm.data.errors import UserError
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.tables import OVERLAP
from aneurysm.evaluation.vessels import vessel_figures
from aneurysm.experiment import Experiment
from aneurysm.losses.present import beside_of
from aneurysm.runs.folders import StageRun
from aneurysm.stages.processes import from_first, gathered, rank, shared
from aneurysm.stages.roi import within
from aneurysm.stages.stored import opened
from aneurysm.stages.volumes import vessel_target
from aneurysm.stages.windows import Box
from aneurysm.vessels.hysteresis import RuleCounts, count_rules
from aneurysm.vessels.lumen_rule import Choice, LumenRules, choose_rules

log = logging.getLogger(__name__)

OVERLAP_FILE = "overlap.csv"
BY_MODALITY = ("recall", "precision", "dice", "aneurysm_in_mask_half")  # of a fold; all are in the report


def patch_settings(cfg: Any, s: Any, loss: nn.Module) -> dict[str, Any]:
    """Settings of the patches that a segmentation stage trains on, for this loss."""
    return {
        "patch": s.patch,
        "batch": s.batch,
        "steps": s.steps,
        "sampling": build(s.sampling),
        "seed": cfg.seed,
        "workers": cfg.trainer.workers,
        "augmentation": build(s.augmentation),
        "beside": beside_of(loss),
    }


def rule_split(experiment: Experiment, fold: int, share: float) -> tuple[list[str], list[str]]:
    """Series of the training folds to fit a net on, and those to choose its lumen rule on.

    The second are all series of some patients whose vessels are annotated, a `share` of them, in the mix of
    modalities of the whole; they are dealt by `fold_seed`, like the folds, so that repeats over `seed` and
    all nets of a fold share them. With a share of 0 the rule is chosen on series that the net is fitted on,
    where it finds more than it will elsewhere: what the rule then promises is too good.

    Raises:
        UserError: the share is out of range, or leaves nothing to fit on.
    """
    training = experiment.training(fold)
    if not 0 <= share < 1:
        raise UserError(f"validation_share={share}: it is at least 0 and below 1.")
    annotated = {uid for uid in training if "vessel" in opened(experiment.prepared[uid]).masks}
    if share == 0:
        return training, [uid for uid in training if uid in annotated]
    rows = experiment.index.set_index("series_uid").loc[training]
    groups: dict[str, dict[str, None]] = {}  # patients with a vessel mask by their modalities, in order
    for patient, of_patient in rows.groupby("patient_id", sort=True):
        if annotated & set(of_patient.index):
            groups.setdefault(" ".join(sorted(set(of_patient.modality))), {})[str(patient)] = None
    if not groups:
        return training, []
    kept = _dealt(groups, share, (int(experiment.cfg.fold_seed), fold))
    held = {uid for uid in training if str(rows.patient_id[uid]) in kept}
    if annotated <= held:
        raise UserError(
            f"fold {fold}: of {sum(map(len, groups.values()))} training patients with a vessel mask, "
            f"validation_share={share} takes {len(kept)} out of the fit. Choose another share, or 0: the "
            "lumen rule is then chosen on the scans that the net is fitted on."
        )
    return [uid for uid in training if uid not in held], [uid for uid in training if uid in held & annotated]


def _dealt(groups: dict[str, dict[str, None]], share: float, seed: tuple[int, int]) -> set[str]:
    """A share of all patients, one at least, taken from every group as evenly as whole patients allow."""
    rng = np.random.default_rng(seed)
    total = max(1, round(share * sum(map(len, groups.values()))))
    quota = {name: int(share * len(patients)) for name, patients in sorted(groups.items())}
    rest = sorted(quota, key=lambda name: quota[name] - share * len(groups[name]))
    for name in rest[: total - sum(quota.values())]:
        quota[name] += 1
    kept: set[str] = set()
    for name, count in quota.items():
        patients = list(groups[name])
        kept |= {patients[i] for i in rng.permutation(len(patients))[:count]}
    return kept


def chosen_rules(
    cases: Sequence[PreparedCase], probability: Callable[[PreparedCase], np.ndarray], s: Any
) -> tuple[LumenRules, dict[str, float]]:
    """The rules that a segmentation stage is set to, chosen on these annotated scans, and their figures."""
    counts: dict[str, list[RuleCounts]] = {}
    for modality, one in gathered([_counted(case, probability) for case in shared(list(cases))]):
        counts.setdefault(modality, []).append(one)
    floor = float(s.recall_floor)

    def choose() -> tuple[LumenRules, Choice]:
        try:
            return choose_rules(
                counts, floor, float(s.precision), float(s.rule_confidence), bool(s.per_modality)
            )
        except ValueError as error:
            raise UserError(f"recall_floor, precision or rule_confidence: {error}") from error

    rules, choice = from_first(choose)
    if not choice.met and rank() == 0:
        log.warning(
            "no lumen threshold reaches a mean recall of %.3f at a precision of %.2f on %d scans: "
            "the one used has %.3f. Train longer, or lower recall_floor or precision.",
            floor, float(s.precision), choice.scans, choice.recall,
        )  # fmt: skip
    return rules, {
        **rules.to_figures(),
        "rule_recall": choice.recall,
        "rule_dice": choice.dice,
        "rule_scans": choice.scans,
        "rule_left_out": choice.left_out,
    }


def _counted(case: PreparedCase, probability: Callable[[PreparedCase], np.ndarray]) -> tuple[str, RuleCounts]:
    target = vessel_target(case)
    assert target is not None  # only annotated scans are asked for
    return case.modality, count_rules(probability(case), target, case.grid)


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly taken."""
    return (
        [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]
        if items
        else []
    )


def overlap_row(case: PreparedCase, predicted: np.ndarray, box: Box | None) -> dict[str, Any]:
    """What the lumen mask of a held-out scan is worth: a row of `tables.OVERLAP`, NaN where nobody knows.

    Lumen counts where the net looked, inside `box`; aneurysms count wherever they are.
    """
    truth = vessel_target(within(case, box))
    figures = vessel_figures(predicted, truth, case.grid, case.lesions, case.aneurysm)
    return {"series_uid": case.series_uid, "modality": case.modality, **figures.row()}


def write_overlap(run: StageRun, rows: list[dict[str, Any]]) -> tuple[pd.DataFrame, dict[str, float]]:
    """Keep the rows of all processes as overlap.csv; returns them and their means."""
    table = pd.DataFrame(gathered(rows))
    if rank() == 0:
        OVERLAP.write(table, run.folder / OVERLAP_FILE)
    return table, mean_figures(table)


def read_overlap(run: StageRun) -> pd.DataFrame:
    """What `write_overlap` kept."""
    return OVERLAP.conform(pd.read_csv(run.read_product(OVERLAP_FILE)))


def mean_figures(table: pd.DataFrame) -> dict[str, float]:
    """Means over the scans where anything is known; some of each modality too, as `dice/CTA`.

    Aneurysms are counted over all scans: the share of them that is in the masks, and their number.
    """
    figures = _means(table)
    for modality, part in table.groupby("modality", sort=True):
        own = _means(pd.DataFrame(part))
        figures |= {f"{name}/{modality}": own[name] for name in BY_MODALITY if name in own}
    return figures


def _means(table: pd.DataFrame) -> dict[str, float]:
    counted = [f"aneurysms{part}" for part in ("", "_centre", "_half")]
    values = table.drop(columns=["series_uid", "modality", *counted]).astype(float).mean()
    figures = {str(name): float(value) for name, value in values.items() if np.isfinite(value)}
    total, centre, half = (int(table[name].to_numpy().sum()) for name in counted)
    if total:
        figures |= {
            "aneurysms": total,
            "aneurysm_in_mask_centre": centre / total,
            "aneurysm_in_mask_half": half / total,
        }
    return figures
