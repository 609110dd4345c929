"""Whether the candidates contain the aneurysms: the ceiling of everything that follows.

A candidate hits an aneurysm when it is within 5 mm of its centre or inside its sac. Where the true sac mask
is known it decides what is inside, else a sphere of the lesion's radius.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from aneurysm.data.scan import Lesion
from aneurysm.evaluation.froc import within_reach
from aneurysm.evaluation.intervals import Interval, bootstrap
from aneurysm.evaluation.lesion_kinds import BIFURCATION, SIDE_WALL, UNKNOWN, LesionFacts

MOST_KEPT = 10  # candidates per scan at the end of the curve
BUDGET = 5  # candidates per scan that an expert looks at; the recall there is the headline
# Diameter of the sphere with the sac's volume, mm.
SIZES = (
    (0.0, 3.0, "below 3 mm"),
    (3.0, 5.0, "3 to 5 mm"),
    (5.0, 7.0, "5 to 7 mm"),
    (7.0, np.inf, "7 mm and more"),
)
KINDS = (SIDE_WALL, BIFURCATION)


@dataclass(frozen=True, eq=False)
class CandidateRecall:
    """At which rank the candidates of a scan first hit each lesion."""

    scans: tuple[str, ...]
    per_scan: np.ndarray  # (n,) number of candidates of each scan
    lesion_scan: np.ndarray  # (l,) number of the scan of each lesion
    rank: np.ndarray  # (l,) 1 for the best-scored candidate of the scan, infinite when missed
    diameter_mm: np.ndarray  # (l,) NaN where only a point is known
    kind: np.ndarray  # (l,) str, as in `lesion_kinds`

    @property
    def recall(self) -> float:
        """Share of lesions hit by any candidate, NaN without lesions."""
        return float(np.isfinite(self.rank).mean()) if self.rank.size else float("nan")

    @property
    def mean_per_scan(self) -> float:
        """Candidates per scan, NaN without scans."""
        return float(self.per_scan.mean()) if self.per_scan.size else float("nan")

    def recall_when_keeping(self, best: int) -> float:
        """Share of lesions hit when only the `best` highest-scored candidates of each scan are kept."""
        return float((self.rank <= best).mean()) if self.rank.size else float("nan")

    def curve(self) -> pd.DataFrame:
        """kept (1, 2, ... candidates per scan) against recall."""
        kept = np.arange(1, max(int(self.per_scan.max(initial=0)), 1) + 1)
        return pd.DataFrame({"kept": kept, "recall": [self.recall_when_keeping(int(k)) for k in kept]})

    def curve_with_intervals(
        self, patients: Sequence[str], most: int = MOST_KEPT, resamples: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """kept (1 .. `most`), recall and the bounds low and high of its 95 % interval over patients.

        Args:
            patients: the patient of each scan.
            most: end of the curve; beyond the longest list of candidates it is level.
            resamples: bootstrap draws.
            seed: of the bootstrap.
        """
        kept = np.arange(1, most + 1)
        intervals = bootstrap(lambda w: self.resampled_when_keeping(w, kept), patients, resamples, seed)
        return pd.DataFrame(
            {
                "kept": kept,
                "recall": [self.recall_when_keeping(int(k)) for k in kept],
                "low": [i.low for i in intervals],
                "high": [i.high for i in intervals],
            }
        )

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """(b, n) draw counts -> (b, 1) recall of all candidates."""
        return self.resampled_when_keeping(weights, np.array([np.finfo(float).max]))

    def resampled_when_keeping(self, weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """(b, n) draw counts -> (b, k) recall with the best of `kept` (k,) candidates per scan."""
        drawn = weights[:, self.lesion_scan].astype(np.float64)
        total = drawn.sum(axis=1)[:, None]
        hit = drawn @ (self.rank[:, None] <= np.asarray(kept)).astype(np.float64)
        return np.divide(hit, total, out=np.full(hit.shape, np.nan), where=total > 0)

    def of_lesions(self, chosen: np.ndarray) -> "CandidateRecall":
        """The same scans with some of the lesions only; `chosen` is (l,) bool."""
        names = ("lesion_scan", "rank", "diameter_mm", "kind")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def groups(self) -> list[tuple[str, "CandidateRecall"]]:
        """Lesions by size and by kind, as far as these are known; groups without lesions are left out."""
        parts = [(name, (self.diameter_mm >= low) & (self.diameter_mm < high)) for low, high, name in SIZES]
        parts += [(kind, self.kind == kind) for kind in KINDS]
        return [(name, self.of_lesions(chosen)) for name, chosen in parts if chosen.any()]

    def table(self, patients: Sequence[str], kept: Sequence[int] = (1, 3, BUDGET, MOST_KEPT)) -> pd.DataFrame:
        """lesions (all, by size, by kind), n, recall_<k> for each k of `kept`, and the interval of BUDGET."""
        rows, budget = [], np.array([BUDGET])
        for name, part in [("all", self), *self.groups()]:
            draw = partial(part.resampled_when_keeping, kept=budget)
            interval: Interval = bootstrap(draw, patients)[0]
            rows.append(
                {"lesions": name, "n": len(part.rank)}
                | {f"recall_{k}": part.recall_when_keeping(k) for k in kept}
                | {f"low_{BUDGET}": interval.low, f"high_{BUDGET}": interval.high}
            )
        return pd.DataFrame(rows)


def candidate_recall(
    candidates: pd.DataFrame,
    lesions: Mapping[str, Sequence[Lesion]],
    scans: Sequence[str],
    reach_mm: float = 5.0,
    facts: Mapping[str, Sequence[LesionFacts]] | None = None,
) -> CandidateRecall:
    """Rank of the first candidate that hits each lesion.

    Args:
        candidates: series_uid, x_mm, y_mm, z_mm (RAS) and score, one row per candidate.
        lesions: lesions of each positive scan; a scan without an entry has none.
        scans: every scan that counts.
        reach_mm: a candidate hits within reach_mm of the centre, or inside the sac.
        facts: true sacs and kinds of a scan's lesions, in their order; a lesion without a known sac is a
            sphere of its radius.

    Raises:
        ValueError: a scan has another number of facts than of lesions.
    """
    ordered = candidates.sort_values("score", ascending=False, kind="stable")
    positions = {
        str(uid): group[["x_mm", "y_mm", "z_mm"]].to_numpy(dtype=np.float64)
        for uid, group in ordered.groupby("series_uid")
    }
    per_scan, lesion_scan, rank, diameter, kinds = [], [], [], [], []
    for number, uid in enumerate(scans):
        points = positions.get(uid, np.zeros((0, 3)))
        per_scan.append(len(points))
        own = lesions.get(uid, ())
        known = (facts or {}).get(uid, (LesionFacts(None, UNKNOWN),) * len(own))
        if len(known) != len(own):
            raise ValueError(f"{uid} has {len(own)} lesions but facts of {len(known)}. Give one per lesion.")
        for lesion, fact in zip(own, known, strict=True):
            hit, distance = within_reach(lesion, points, reach_mm)
            if fact.sac is not None:
                hit = (distance <= reach_mm) | fact.sac.holds(points)
            hits = np.flatnonzero(hit)
            lesion_scan.append(number)
            rank.append(hits[0] + 1 if hits.size else np.inf)
            diameter.append(np.nan if lesion.radius_mm is None else 2 * lesion.radius_mm)
            kinds.append(fact.kind)
    return CandidateRecall(
        tuple(scans),
        np.asarray(per_scan, dtype=np.int64),
        np.asarray(lesion_scan, dtype=np.int64),
        np.asarray(rank, dtype=np.float64),
        np.asarray(diameter, dtype=np.float64),
        np.asarray(kinds, dtype=str),
    )
