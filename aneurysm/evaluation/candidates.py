"""Whether the candidates contain the aneurysms: the ceiling of everything that follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aneurysm.data.scan import Lesion
from aneurysm.evaluation.froc import within_reach


@dataclass(frozen=True, eq=False)
class CandidateRecall:
    """At which rank the candidates of a scan first hit each lesion."""

    scans: tuple[str, ...]
    per_scan: np.ndarray  # (n,) number of candidates of each scan
    lesion_scan: np.ndarray  # (l,) number of the scan of each lesion
    rank: np.ndarray  # (l,) 1 for the best-scored candidate of the scan, infinite when missed

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

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """(b, n) draw counts -> (b, 1) recall of all candidates."""
        drawn = weights[:, self.lesion_scan].astype(np.float64)
        total = drawn.sum(axis=1)
        hit = (drawn * np.isfinite(self.rank)).sum(axis=1)
        return np.divide(hit, total, out=np.full(len(weights), np.nan), where=total > 0)[:, None]


def candidate_recall(
    candidates: pd.DataFrame,
    lesions: Mapping[str, Sequence[Lesion]],
    scans: Sequence[str],
    reach_mm: float = 5.0,
) -> CandidateRecall:
    """Rank of the first candidate that hits each lesion.

    Args:
        candidates: series_uid, x_mm, y_mm, z_mm (RAS) and score, one row per candidate.
        lesions: lesions of each positive scan; a scan without an entry has none.
        scans: every scan that counts.
        reach_mm: a candidate hits within max(reach_mm, radius of the lesion) of the centre.
    """
    ordered = candidates.sort_values("score", ascending=False, kind="stable")
    positions = {
        str(uid): group[["x_mm", "y_mm", "z_mm"]].to_numpy(dtype=np.float64)
        for uid, group in ordered.groupby("series_uid")
    }
    per_scan, lesion_scan, rank = [], [], []
    for number, uid in enumerate(scans):
        points = positions.get(uid, np.zeros((0, 3)))
        per_scan.append(len(points))
        for lesion in lesions.get(uid, ()):
            hits = np.flatnonzero(within_reach(lesion, points, reach_mm)[0])
            lesion_scan.append(number)
            rank.append(hits[0] + 1 if hits.size else np.inf)
    return CandidateRecall(
        tuple(scans),
        np.asarray(per_scan, dtype=np.int64),
        np.asarray(lesion_scan, dtype=np.int64),
        np.asarray(rank, dtype=np.float64),
    )
