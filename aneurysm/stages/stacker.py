"""Stage 5, stacker: gradient-boosted trees turn the expert's out-of-fold readings into 14 probabilities.

Per scan the trees see `[p, order parameter, physics residual]` of the leading candidates. They start from
log odds (as base margin), so with few scans they correct them rather than replace them: the mean of the
expert's and the Smart Net's, calibrated by logistic regression (Platt 1999), as models of several folds are
sure of themselves in different degrees.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xgboost
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aneurysm.data.labels import LOCATIONS, MODALITIES
from aneurysm.data.tables import LOCATION_KEYS
from aneurysm.stages.step import StepOutput, log_step

LEADING = 2  # candidates per scan that the trees see one by one
NOTHING = 1e-3  # probability of an aneurysm where not even a candidate was found
PRESENT_FEATURES = (
    *(f"{name}_{k}" for k in range(LEADING) for name in ("p", "order", "residual", "coherence", "score")),
    "expected",  # sum of p over candidates
    *MODALITIES,
)
LOCATION_FEATURES = ("p_here", "p_best", "share", "order", "residual", "coherence", "location")


@dataclass(frozen=True)
class Boosting:
    """Settings of the trees, in XGBoost's names."""

    rounds: int
    max_depth: int
    learning_rate: float
    min_child_weight: float
    reg_lambda: float
    subsample: float
    seed: int = 0

    def fit(
        self, x: np.ndarray, y: np.ndarray, margin: np.ndarray, monotone: tuple[int, ...]
    ) -> xgboost.Booster | None:
        """Boosted trees for a binary label, or None when only one class is there.

        The calibration of the margin travels with the trees, as their attributes.

        Args:
            x: (n, f) float32, NaN where unknown.
            y: (n,) 0 or 1.
            margin: (n,) log odds to start from.
            monotone: +1 for features in which the probability may only rise.
        """
        if len(y) == 0 or len(np.unique(y)) < 2:
            return None
        parameters = {
            "objective": "binary:logistic",
            "max_depth": self.max_depth,
            "learning_rate": self.learning_rate,
            "min_child_weight": self.min_child_weight,
            "reg_lambda": self.reg_lambda,
            "subsample": self.subsample,
            "monotone_constraints": str(monotone),
            "seed": self.seed,
            "nthread": 1,
        }
        calibration = Calibration.fit(margin, y)
        data = xgboost.DMatrix(x, label=y, base_margin=calibration(margin))
        booster = xgboost.train(parameters, data, num_boost_round=self.rounds)
        booster.set_attr(slope=repr(calibration.slope), intercept=repr(calibration.intercept))
        return booster


@dataclass(frozen=True)
class Calibration:
    """Log odds to log odds that are right on average: slope * x + intercept."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, margin: np.ndarray) -> np.ndarray:
        return (self.slope * margin + self.intercept).astype(np.float32)

    @classmethod
    def fit(cls, margin: np.ndarray, y: np.ndarray) -> "Calibration":
        """By logistic regression; it never turns the order round, whatever a handful of scans says.

        Args:
            margin: (n,) log odds.
            y: (n,) 0 or 1, both of them present.
        """
        found = LogisticRegression().fit(margin[:, None], y)
        slope = float(found.coef_[0, 0])
        return cls(slope, float(found.intercept_[0])) if slope > 0 else cls()

    @classmethod
    def of(cls, booster: xgboost.Booster) -> "Calibration":
        """That of fitted trees."""
        return cls(float(booster.attr("slope") or 1.0), float(booster.attr("intercept") or 0.0))


@dataclass(frozen=True)
class ScanRows:
    """What the trees see: one row per scan, and one row per scan and location."""

    series_uid: list[str]
    present: np.ndarray  # (n, PRESENT_FEATURES) float32
    present_margin: np.ndarray  # (n,) log odds
    location: np.ndarray  # (n, 13, LOCATION_FEATURES) float32
    location_margin: np.ndarray  # (n, 13) log odds


def scan_rows(expert: pd.DataFrame, modality: dict[str, str]) -> ScanRows:
    """Features of every scan from its candidates.

    Args:
        expert: rows of the expert table; a scan without candidates has none.
        modality: of every scan, by series; its order is the order of the rows.
    """
    groups = dict(iter(expert.groupby("series_uid")))
    present, location, margins, location_margins = [], [], [], []
    for uid, kind in modality.items():
        rows: Any = groups.get(uid, expert.iloc[:0])
        rows = rows.sort_values("p", ascending=False)
        p = rows.p.to_numpy(np.float64)
        features: list[float] = []
        for k in range(LEADING):
            names = ("p", "order_parameter", "physics_residual", "flow_coherence", "score")
            features += [float(rows[name].iloc[k]) if k < len(rows) else np.nan for name in names]
        features.append(float(p.sum()))
        features += [float(kind == m) for m in MODALITIES]
        present.append(features)
        both = [(_log_odds(a) + _log_odds(b)) / 2 for a, b in zip(p, rows["score"], strict=True)]
        margins.append(max(both, default=_log_odds(NOTHING)))
        logits = rows[[f"{key}_logit" for key in LOCATION_KEYS]].to_numpy(np.float64)
        share = np.exp(logits - logits.max(1, keepdims=True)) if len(rows) else np.zeros((0, len(LOCATIONS)))
        share = share / share.sum(1, keepdims=True) if len(rows) else share
        here = p[:, None] * share  # (candidates, 13)
        for k in range(len(LOCATIONS)):
            best = int(here[:, k].argmax()) if len(rows) else -1
            location_margins.append(_log_odds(here[best, k] if len(rows) else NOTHING / 13))
            if best < 0:
                location.append([NOTHING / 13, NOTHING, np.nan, np.nan, np.nan, np.nan, float(k)])
            else:
                row = rows.iloc[best]
                readings = (row.order_parameter, row.physics_residual, row.flow_coherence)
                location.append([here[best, k], p.max(), share[best, k], *map(float, readings), float(k)])
    count = len(modality)
    return ScanRows(
        list(modality),
        np.asarray(present, np.float32).reshape(count, len(PRESENT_FEATURES)),
        np.asarray(margins, np.float32),
        np.asarray(location, np.float32).reshape(count, len(LOCATIONS), len(LOCATION_FEATURES)),
        np.asarray(location_margins, np.float32).reshape(count, len(LOCATIONS)),
    )


class StackerModule(LightningModule):
    """Fits the two sets of trees in one step over the whole table; boosting rounds replace optimiser steps.

    A set is None when its labels hold one class only; the margins are then handed through.
    """

    def __init__(self, boosting: Boosting) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.boosting = boosting
        self.present: xgboost.Booster | None = None
        self.location: xgboost.Booster | None = None

    def fit(self, rows: ScanRows, labels: np.ndarray) -> None:
        """Grow the trees on labels (n, 14) in submission order; NaN where unknown."""
        known = np.isfinite(labels[:, -1])
        monotone = tuple(int(name == "p_0") for name in PRESENT_FEATURES)
        self.present = self.boosting.fit(
            rows.present[known], labels[known, -1], rows.present_margin[known], monotone
        )
        flat, margin = rows.location.reshape(-1, len(LOCATION_FEATURES)), rows.location_margin.reshape(-1)
        truth = labels[:, :-1].reshape(-1)
        known = np.isfinite(truth)
        monotone = tuple(int(name == "p_here") for name in LOCATION_FEATURES)
        self.location = self.boosting.fit(flat[known], truth[known], margin[known], monotone)

    def training_step(self, batch: tuple[ScanRows, np.ndarray], index: int) -> None:
        rows, labels = batch
        self.fit(rows, labels)
        loss = _log_loss(self.probabilities(rows)[:, -1], labels[:, -1])
        log_step(self, StepOutput(loss), "train", len(labels))

    def validation_step(self, batch: tuple[ScanRows, np.ndarray], index: int) -> None:
        rows, labels = batch
        loss = _log_loss(self.probabilities(rows)[:, -1], labels[:, -1])
        log_step(self, StepOutput(loss), "val", len(labels))

    def probabilities(self, rows: ScanRows) -> np.ndarray:
        """(n, 14) probabilities in submission order."""
        present = _predict(self.present, rows.present, rows.present_margin)
        flat = rows.location.reshape(-1, len(LOCATION_FEATURES))
        location = _predict(self.location, flat, rows.location_margin.reshape(-1))
        return np.concatenate([location.reshape(-1, len(LOCATIONS)), present[:, None]], axis=1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["boosters"] = {
            name: None
            if booster is None
            else torch.frombuffer(bytearray(booster.save_raw("ubj")), dtype=torch.uint8)
            for name, booster in (("present", self.present), ("location", self.location))
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, raw in checkpoint["boosters"].items():
            setattr(self, name, None if raw is None else load_booster(raw.numpy().tobytes()))

    def configure_optimizers(self) -> None:
        return None


class StackerData(LightningDataModule):
    """The whole table as one batch."""

    def __init__(
        self, train: tuple[ScanRows, np.ndarray], held_out: tuple[ScanRows, np.ndarray] | None
    ) -> None:
        super().__init__()
        self.train, self.held_out = train, held_out

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Whole(self.train), batch_size=None, collate_fn=_unchanged)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Whole(self.held_out), batch_size=None, collate_fn=_unchanged)


def _unchanged(table: Any) -> Any:
    """The loader would make tensors of the arrays, and a boolean tensor picks other rows than an array."""
    return table


class _Whole(IterableDataset):
    def __init__(self, table: tuple[ScanRows, np.ndarray] | None) -> None:
        self.table = table

    def __iter__(self) -> Iterator[tuple[ScanRows, np.ndarray]]:
        if self.table is not None:
            yield self.table


def load_booster(raw: bytes) -> xgboost.Booster:
    """A booster from its `.ubj` bytes."""
    return xgboost.Booster({"nthread": 1}, model_file=bytearray(raw))


def _predict(booster: xgboost.Booster | None, x: np.ndarray, margin: np.ndarray) -> np.ndarray:
    if booster is None:
        return 1 / (1 + np.exp(-margin))
    return booster.predict(xgboost.DMatrix(x, base_margin=Calibration.of(booster)(margin)))


def _log_odds(p: float) -> float:
    p = min(max(float(p), 1e-4), 1 - 1e-4)
    return float(np.log(p / (1 - p)))


def _log_loss(p: np.ndarray, y: np.ndarray) -> Tensor:
    known = np.isfinite(y)
    if not known.any():
        return torch.zeros(())
    p, y = np.clip(p[known], 1e-6, 1 - 1e-6), y[known]
    return torch.tensor(float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()))
