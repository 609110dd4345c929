"""What all runs of an experiment share: the data set, the prepared scans, the frozen folds."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from aneurysm.build import build
from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.folds import load_or_make_folds
from aneurysm.data.preparation.memory import GIB
from aneurysm.data.preparation.prepare import prepare_all
from aneurysm.data.tables import LOCATION_KEYS
from aneurysm.runs.folders import StageRun, stage_run
from aneurysm.runs.settings import run_record
from aneurysm.stages.processes import from_first
from aneurysm.stages.stored import limit_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Experiment:
    """Data and folds of one experiment."""

    cfg: DictConfig
    folder: Path
    index: pd.DataFrame  # tables.INDEX, the series that could be prepared
    prepared: dict[str, Path]  # series -> cached case
    fold_of: dict[str, int]  # series -> fold in which it is held out
    fingerprint: str  # of the labels, the patients and the folds

    @property
    def folds(self) -> list[int]:
        """All folds, 0 .. k-1."""
        return list(range(int(self.cfg.folds)))

    @property
    def chosen_folds(self) -> list[int]:
        """The folds this command trains."""
        return self.folds if self.cfg.fold is None else [int(self.cfg.fold)]

    def held_out(self, fold: int) -> list[str]:
        """Series of the patients that fold `fold` never trains on."""
        return [uid for uid in self.index.series_uid if self.fold_of[uid] == fold]

    def training(self, fold: int) -> list[str]:
        """Series of all other patients."""
        return [uid for uid in self.index.series_uid if self.fold_of[uid] != fold]

    def paths(self, uids: Sequence[str]) -> list[Path]:
        """Prepared files of these series."""
        return [self.prepared[uid] for uid in uids]

    def run(self, stage: str, fold: int) -> StageRun:
        """Where a fold of a stage lives."""
        return stage_run(self.cfg, stage, fold, self.fingerprint)

    def begin(self, stage: str, fold: int, force: bool) -> StageRun:
        """Open a run for writing."""
        run = self.run(stage, fold)
        run.begin(run_record(self.cfg, stage, self.fingerprint), force)
        return run


def open_experiment(cfg: DictConfig) -> Experiment:
    """Read or make the data set, prepare what is not prepared yet, and freeze or check the folds.

    Raises:
        UserError: there is nothing to train on, or the settings contradict each other.
    """
    if int(cfg.folds) < 2:
        raise UserError(f"folds={cfg.folds}: cross-validation needs at least 2 folds.")
    if cfg.fold is not None and not 0 <= int(cfg.fold) < int(cfg.folds):
        raise UserError(
            f"fold={cfg.fold} does not exist: with folds={cfg.folds} they are 0 to {int(cfg.folds) - 1}."
        )
    if cfg.failed not in ("retry", "skip"):
        raise UserError(f"failed={cfg.failed}: it is retry or skip.")
    limit_memory(cfg.memory_gb)
    folder = Path(cfg.paths.outputs) / cfg.experiment_name
    index, prepared, fold_of = from_first(lambda: _read_data(cfg, folder))
    return Experiment(cfg, folder, index, prepared, fold_of, _fingerprint(index, fold_of))


def _read_data(cfg: DictConfig, folder: Path) -> tuple[pd.DataFrame, dict[str, Path], dict[str, int]]:
    """Index, prepared case of every series, and fold in which it is held out."""
    source = build(cfg.data)
    index = source.index()
    preparation = build(cfg.prepare)
    prepared = prepare_all(
        source,
        preparation,
        Path(cfg.paths.outputs) / "prepared",
        jobs=int(cfg.parallel.jobs or cfg.data.get("jobs", 2)),
        backend=str(cfg.parallel.backend),
        memory_bytes=None if cfg.memory_gb is None else int(cfg.memory_gb * GIB),
    )
    index = index[index.series_uid.isin(prepared.keys())].reset_index(drop=True)
    if index.empty:
        raise UserError(f"No series of {source.root} could be prepared; the reasons are in outputs/prepared.")
    try:
        file = folder / f"folds-{cfg.folds}-seed{cfg.fold_seed}.csv"
        folds = load_or_make_folds(file, index, int(cfg.folds), int(cfg.fold_seed))
    except ValueError as error:
        raise UserError(str(error)) from error
    fold_of_patient = dict(zip(folds.patient_id, folds.fold, strict=True))
    fold_of = {r.series_uid: int(fold_of_patient[r.patient_id]) for r in index.itertuples()}
    log.info(
        "%d series of %d patients (%d with, %d without an aneurysm), %d folds",
        len(index),
        index.patient_id.nunique(),
        int((index.present == 1).sum()),
        int((index.present == 0).sum()),
        cfg.folds,
    )
    _keep_labels(index, folder / f"labels-{_fingerprint(index, fold_of)}.csv")
    return index, prepared, fold_of


def _keep_labels(index: pd.DataFrame, file: Path) -> None:
    """What was known of every series, beside the folds: predictions can be scored later without the data."""
    if not file.is_file():  # named by its content
        with replacing(file) as part:
            index[["series_uid", "patient_id", "modality", *LOCATION_KEYS, "present"]].to_csv(
                part, index=False
            )


def _fingerprint(index: pd.DataFrame, fold_of: dict[str, int]) -> str:
    """Changes when a series, a label, a patient or a fold changes."""
    columns = ["series_uid", "patient_id", "modality", *LOCATION_KEYS, "present"]
    table = pd.DataFrame(index[columns]).sort_values("series_uid")
    content = table.to_csv(index=False) + str(sorted(fold_of.items()))
    return hashlib.sha256(content.encode()).hexdigest()[:8]
