"""Free-response ROC: lesions found against false alarms per scan.

Rules of LUNA16 for lesions given as points: a mark hits a lesion within reach of its centre; lesions and
marks are paired one to one by falling score; a second mark on a found lesion is neither hit nor false
alarm; false alarms are averaged over ALL scans, those without lesions included.

Notation: m events (hits and false alarms), l lesions, n scans, b resamples, k false-alarm rates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from aneurysm.data.scan import Lesion

CPM_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false alarms per scan, LUNA16
HIT, FALSE_ALARM, DUPLICATE = "hit", "false alarm", "duplicate"


def within_reach(lesion: Lesion, points_mm: np.ndarray, reach_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether points (n, 3) in RAS mm hit a lesion, and their distance to its centre in mm, both (n,)."""
    distance = np.linalg.norm(points_mm - np.asarray(lesion.centre_mm, dtype=np.float64), axis=1)
    radius = lesion.radius_mm if lesion.radius_mm is not None and np.isfinite(lesion.radius_mm) else 0.0
    return distance <= max(reach_mm, radius), distance


@dataclass(frozen=True, eq=False)
class Froc:
    """The matched marks of n scans and the curve they draw."""

    scans: tuple[str, ...]  # series UIDs that count
    marks: pd.DataFrame  # series_uid, x_mm, y_mm, z_mm, p, outcome, lesion (-1 none); by falling p
    lesions: pd.DataFrame  # series_uid, lesion, x_mm, y_mm, z_mm, radius_mm, location, p (NaN when missed)
    reach_mm: float

    @cached_property
    def negative(self) -> np.ndarray:
        """(n,) bool: scans without lesions."""
        return ~np.isin(np.asarray(self.scans, dtype=str), self.lesions["series_uid"].to_numpy(dtype=str))

    @cached_property
    def curve(self) -> pd.DataFrame:
        """threshold, sensitivity, fp_per_scan, fp_per_negative_scan; starts at (0, 0)."""
        sensitivity, rate, negative_rate = self._curves(np.ones((1, len(self.scans))))
        return pd.DataFrame(
            {
                "threshold": np.concatenate([[np.inf], self._events[0][self._last_of_ties]]),
                "sensitivity": sensitivity[0],
                "fp_per_scan": rate[0],
                "fp_per_negative_scan": negative_rate[0],
            }
        )

    def sensitivity_at(self, rate: float) -> float:
        """Share of lesions found at a number of false alarms per scan, NaN without lesions."""
        return float(self.resampled(np.ones((1, len(self.scans))), (rate,))[0, 0])

    def fp_on_negatives_at(self, rate: float) -> float:
        """False alarms per scan without lesions, at the threshold that gives `rate` over all scans."""
        return float(self.resampled(np.ones((1, len(self.scans))), (rate,))[0, 1])

    @property
    def cpm(self) -> float:
        """Mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false alarms per scan."""
        return float(self.resampled(np.ones((1, len(self.scans))), CPM_RATES)[0, : len(CPM_RATES)].mean())

    def threshold_at(self, rate: float) -> float:
        """Lowest threshold with at most `rate` false alarms per scan; infinite when none has."""
        return float(self.curve.loc[self.curve["fp_per_scan"] <= rate + 1e-12, "threshold"].min())

    def resampled(self, weights: np.ndarray, rates: Sequence[float]) -> np.ndarray:
        """Sensitivity and false alarms on negatives in many resamples.

        Args:
            weights: (b, n) how often each scan was drawn.
            rates: k false alarms per scan.

        Returns:
            (b, 2k): sensitivity at each rate, then false alarms per negative scan at each rate. Beyond
            the end of the curve its last value holds.
        """
        sensitivity, x, negatives = self._curves(weights)
        columns = [_at(x, sensitivity, rate) for rate in rates]
        columns += [_at(x, negatives, rate) for rate in rates]
        return np.stack(columns, axis=1)

    @cached_property
    def _events(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Score, scan number and hit of each event (m,), by falling score."""
        outcome = self.marks["outcome"].to_numpy()
        counted = outcome != DUPLICATE
        score = self.marks["p"].to_numpy(dtype=np.float64)[counted]
        return score, self._number(self.marks["series_uid"])[counted], (outcome == HIT)[counted]

    def _number(self, uids: Iterable[str]) -> np.ndarray:
        number = {uid: i for i, uid in enumerate(self.scans)}
        return np.array([number[uid] for uid in uids], dtype=np.int64)

    @cached_property
    def _last_of_ties(self) -> np.ndarray:
        score = self._events[0]
        return np.flatnonzero(np.append(score[1:] != score[:-1], True)[: len(score)])

    def _curves(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        _, scan, hit = self._events
        lesion_scan = self._number(self.lesions["series_uid"])
        drawn = weights[:, scan].astype(np.float64)  # (b, m)

        def share(events: np.ndarray, whole: np.ndarray) -> np.ndarray:
            summed = np.cumsum(drawn * events, axis=1)[:, self._last_of_ties]
            summed = np.concatenate([np.zeros((len(weights), 1)), summed], axis=1)
            safe = np.where(whole > 0, whole, np.nan)[:, None]
            return summed / safe

        return (
            share(hit, weights[:, lesion_scan].sum(axis=1)),
            share(~hit, weights.sum(axis=1)),
            share(~hit & self.negative[scan], weights[:, self.negative].sum(axis=1)),
        )


def froc(
    marks: pd.DataFrame,
    lesions: Mapping[str, Sequence[Lesion]],
    scans: Sequence[str],
    reach_mm: float = 5.0,
) -> Froc:
    """Match the marks of all scans with their lesions and draw the curve.

    Args:
        marks: one row per mark with series_uid, x_mm, y_mm, z_mm (RAS) and p; marks on scans that are
            not in `scans` are ignored.
        lesions: lesions of each positive scan; a scan without an entry is negative.
        scans: every scan that counts. Leave out scans whose lesion positions are unknown.
        reach_mm: a mark hits within max(reach_mm, radius of the lesion) of the centre.

    Raises:
        ValueError: a column is missing, a score or a position is NaN, or a scan is listed twice.
    """
    needed = ["series_uid", "x_mm", "y_mm", "z_mm", "p"]
    missing = [column for column in needed if column not in marks.columns]
    if missing:
        raise ValueError(f"Marks for a FROC curve need the columns {needed}; {missing} are missing.")
    if len(set(scans)) != len(scans):
        raise ValueError("A scan is listed twice; false alarms per scan would be too low.")
    counted = marks.loc[marks["series_uid"].isin(list(scans)), needed]
    if not np.isfinite(counted[needed[1:]].to_numpy(dtype=np.float64)).all():
        bad = counted[~np.isfinite(counted[needed[1:]]).all(axis=1)]["series_uid"].iloc[0]
        raise ValueError(f"{bad}: a mark has a NaN score or position. Drop it before the FROC curve.")
    counted = counted.sort_values("p", ascending=False, kind="stable").reset_index(drop=True)

    outcome = np.full(len(counted), FALSE_ALARM, dtype=object)
    lesion_of = np.full(len(counted), -1, dtype=np.int64)
    rows: list[dict] = []
    groups = counted.groupby("series_uid", sort=False).indices
    for uid in scans:
        found = lesions.get(uid, ())
        place = groups.get(uid, np.zeros(0, dtype=np.int64))
        points = counted.loc[place, ["x_mm", "y_mm", "z_mm"]].to_numpy(dtype=np.float64)
        outcome[place], lesion_of[place] = _match(points, found, reach_mm)
        hits = {int(lesion_of[i]): float(counted.at[i, "p"]) for i in place if outcome[i] == HIT}
        rows += [_lesion_row(uid, k, lesion, hits.get(k, np.nan)) for k, lesion in enumerate(found)]
    columns = ["series_uid", "lesion", "x_mm", "y_mm", "z_mm", "radius_mm", "location", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return Froc(tuple(scans), counted.assign(outcome=outcome, lesion=lesion_of), table, reach_mm)


def _match(points: np.ndarray, lesions: Sequence[Lesion], reach_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Outcome and lesion of the marks (m, 3) of one scan, by falling score; the nearest free lesion wins."""
    outcome = np.full(len(points), FALSE_ALARM, dtype=object)
    lesion_of = np.full(len(points), -1, dtype=np.int64)
    if len(points) == 0 or len(lesions) == 0:
        return outcome, lesion_of
    pairs = [within_reach(lesion, points, reach_mm) for lesion in lesions]
    near = np.stack([hit for hit, _ in pairs], axis=1)  # (m, l)
    distance = np.stack([away for _, away in pairs], axis=1)
    free = np.ones(len(lesions), dtype=bool)
    for mark in range(len(points)):
        within = np.flatnonzero(near[mark])
        if within.size == 0:
            continue
        open_ = within[free[within]]
        chosen = open_ if open_.size else within
        lesion_of[mark] = chosen[np.argmin(distance[mark, chosen])]
        outcome[mark] = HIT if open_.size else DUPLICATE
        free[lesion_of[mark]] = False
    return outcome, lesion_of


def _lesion_row(uid: str, number: int, lesion: Lesion, p: float) -> dict:
    x, y, z = (float(v) for v in lesion.centre_mm)
    radius = np.nan if lesion.radius_mm is None else float(lesion.radius_mm)
    location = -1 if lesion.location is None else int(lesion.location)
    return {
        "series_uid": uid, "lesion": number, "x_mm": x, "y_mm": y, "z_mm": z,
        "radius_mm": radius, "location": location, "p": p,
    }  # fmt: skip


def _at(x: np.ndarray, y: np.ndarray, rate: float) -> np.ndarray:
    """Value of each curve (b, m) at a rate: linear between points, the upper end of a vertical step."""
    rows = np.arange(len(x))
    left = np.maximum((x <= rate + 1e-12).sum(axis=1) - 1, 0)
    right = np.minimum(left + 1, x.shape[1] - 1)
    gap = x[rows, right] - x[rows, left]
    share = np.divide(rate - x[rows, left], gap, out=np.zeros(len(x)), where=gap > 0)
    return y[rows, left] + np.clip(share, 0, 1) * (y[rows, right] - y[rows, left])
