"""From lumen probability to a lumen mask: arteries are one connected tree, false alarms are crumbs.

A threshold low enough to keep the thin branches also lets through specks of fat, marrow and cortex. What
tells them apart is where they are: a branch hangs on a vessel that the network is sure of. So voxels above
a low threshold count only in pieces that hold enough voxels above a high one (hysteresis, Canny 1986).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from skimage import measure

from aneurysm.data.scan import Grid
from aneurysm.vessels.hysteresis import CORE_MM3, CORES, LEVELS, RuleCounts
from aneurysm.vessels.voxels import check_on_grid

FAILURES = (
    0.1  # share of scans, those found worst, that are left out where the floor is out of reach with them
)
FEWEST = 3  # scans of a modality below which it has no rule of its own
_RESAMPLES = 500


@dataclass(frozen=True)
class LumenRule:
    """Which voxels are lumen.

    threshold: lowest probability of a lumen voxel.
    core: probability from which a voxel is sure to be lumen.
    """

    threshold: float
    core: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or not 0 < self.core < 1:
            raise ValueError(f"Lumen thresholds lie between 0 and 1, got {self.threshold} and {self.core}.")

    def __call__(self, probability: np.ndarray, grid: Grid) -> np.ndarray:
        """The mask, (d, h, w) bool, of a probability volume on `grid`; empty where nothing is sure.

        Raises:
            ValueError: the volume does not lie on the grid.
        """
        check_on_grid(probability, grid)
        return _pieces_with_core(probability, self.threshold, max(self.core, self.threshold), grid.voxel_mm3)


@dataclass(frozen=True)
class LumenRules:
    """The rule of all scans, and those of modalities that have their own.

    Networks are sure of bright CTA lumen and doubtful of dark T2 lumen: one threshold for both gives a mask
    too thick for the one or with too many holes for the other.
    """

    common: LumenRule
    by_modality: Mapping[str, LumenRule] = field(default_factory=dict)

    def of(self, modality: str) -> LumenRule:
        """The rule for a scan of this modality."""
        return self.by_modality.get(modality, self.common)

    def to_figures(self) -> dict[str, float]:
        """As flat numbers: threshold, core, and threshold/CTA, core/CTA ... of modalities of their own."""
        figures = asdict(self.common)
        for modality, rule in self.by_modality.items():
            figures |= {f"{name}/{modality}": value for name, value in asdict(rule).items()}
        return figures

    @classmethod
    def from_figures(cls, figures: Mapping[str, float]) -> "LumenRules":
        """Back from `to_figures`; other figures are passed over.

        Raises:
            KeyError: a number is missing.
        """
        names = [name.split("/", 1)[1] for name in figures if name.startswith("threshold/")]
        own = {m: LumenRule(float(figures[f"threshold/{m}"]), float(figures[f"core/{m}"])) for m in names}
        return cls(LumenRule(float(figures["threshold"]), float(figures["core"])), own)

    @classmethod
    def mean(cls, rules: "Sequence[LumenRules]") -> "LumenRules":
        """Of several folds: means of thresholds and of cores; a modality's own where any fold has one."""
        names = sorted({m for rule in rules for m in rule.by_modality})
        return cls(
            _mean_rule([rule.common for rule in rules]),
            {m: _mean_rule([rule.of(m) for rule in rules]) for m in names},
        )


@dataclass(frozen=True)
class Choice:
    """A rule and what it was chosen on.

    recall, precision, dice: means over the scans it was chosen on, failures included; NaN without lumen.
    scans: how many those are.
    left_out: how many failures did not take part.
    met: whether the floor was met at the precision asked for.
    """

    rule: LumenRule
    recall: float
    precision: float
    dice: float
    scans: int
    left_out: int
    met: bool


def choose_rule(
    scans: Sequence[RuleCounts], floor: float, precision: float = 0.0, confidence: float = 0.5
) -> Choice:
    """The rule with the best mean Dice among those whose mean recall reaches a floor.

    With a few scans their mean recall is noisy, and the best Dice lies just where that noise was kind. With
    `confidence` above one half the floor must be met by the lower bound of the mean: the value that this
    share of the bootstrap resamples of the scans exceeds (percentile bootstrap, Efron and Tibshirani 1993).

    A rule is allowed only where `precision` of its marks, over all scans, are lumen: a net that knows too
    little would call the whole head a vessel, and the graph of such a mask is as useless as it is slow. Where
    no allowed rule reaches the floor, the tenth of the scans found worst is left out (no threshold brings
    back a vessel that the net has not seen, and one such scan would cover all others with false voxels), and
    where that does not help either, the allowed rule with the highest recall is taken.

    Args:
        scans: `count_rules` of each, best of patients that the net was not fitted on.
        floor: mean recall per scan, 0..1.
        precision: 0..1, of all marks together.
        confidence: 0.5..1.

    Raises:
        ValueError: a setting out of range.
    """
    if not 0 < floor <= 1 or not 0 <= precision < 1 or not 0.5 <= confidence < 1:
        raise ValueError(
            "A rule is chosen for a recall in 0..1, a precision in 0..1 and a confidence in 0.5..1, got "
            f"{floor}, {precision} and {confidence}."
        )
    known = [scan for scan in scans if scan.lumen]
    if not known:
        return Choice(LumenRule(0.5, 0.5), np.nan, np.nan, np.nan, 0, 0, False)
    # By recall of the plainest rule: one half for threshold and core.
    known.sort(key=lambda scan: int(scan.hits[CORES.index(128), 128]) / scan.lumen)
    failures = int(len(known) * FAILURES)
    for left_out in dict.fromkeys((0, failures)):
        part = known[left_out:]
        allowed = _precise(part, precision)
        reached = allowed & (_lower_bound([scan.recall for scan in part], confidence) >= floor)
        if reached.any():
            dice = np.mean([scan.dice for scan in part], axis=0)
            best = np.where(reached, dice, -np.inf)
            return _choice(known, int(best.argmax()), left_out, met=True)
    allowed = _precise(known, precision)
    recall = np.mean([scan.recall for scan in known], axis=0)
    if not allowed.any():
        return _choice(known, _purest(known), 0, met=False)
    dice = np.mean([scan.dice for scan in known], axis=0)
    best = np.where(allowed, recall + 1e-6 * dice, -np.inf)  # of equal recalls, the better Dice
    return _choice(known, int(best.argmax()), 0, met=False)


def choose_rules(
    scans: Mapping[str, Sequence[RuleCounts]],
    floor: float,
    precision: float = 0.0,
    confidence: float = 0.5,
    per_modality: bool = False,
) -> tuple[LumenRules, Choice]:
    """The rule of all scans and, if asked, one of each modality with at least `FEWEST` scans.

    Args:
        scans: counts of the scans of each modality; the rest as in `choose_rule`.

    Returns:
        The rules, and how the common one was chosen.
    """
    every = [one for modality in sorted(scans) for one in scans[modality]]
    choice = choose_rule(every, floor, precision, confidence)
    own = {
        modality: choose_rule(some, floor, precision, confidence).rule
        for modality, some in sorted(scans.items())
        if per_modality and sum(one.lumen > 0 for one in some) >= FEWEST
    }
    return LumenRules(choice.rule, own), choice


def _choice(scans: Sequence[RuleCounts], place: int, left_out: int, met: bool) -> Choice:
    core, level = np.unravel_index(place, scans[0].hits.shape)
    hits = np.array([scan.hits[core, level] for scan in scans])
    marked = np.array([scan.marked[core, level] for scan in scans])
    return Choice(
        LumenRule(float(level / LEVELS), CORES[core] / LEVELS),
        recall=float(np.mean([scan.recall[core, level] for scan in scans])),
        precision=float(np.mean(hits[marked > 0] / marked[marked > 0])) if marked.any() else np.nan,
        dice=float(np.mean([scan.dice[core, level] for scan in scans])),
        scans=len(scans),
        left_out=left_out,
        met=met,
    )


def _precise(scans: Sequence[RuleCounts], precision: float) -> np.ndarray:
    """(C, LEVELS + 1) bool: rules that mark something, of which enough is lumen."""
    hits = np.sum([scan.hits for scan in scans], axis=0)
    marked = np.sum([scan.marked for scan in scans], axis=0)
    level = np.arange(LEVELS + 1)  # a threshold above its core would be the rule of another core
    usable = (level < LEVELS) & (level <= np.array(CORES)[:, None])
    return usable & (marked > 0) & (hits >= precision * marked)


def _purest(scans: Sequence[RuleCounts]) -> int:
    """Where nothing is precise: the most precise of the rules that find a tenth of the lumen."""
    hits = np.sum([scan.hits for scan in scans], axis=0)
    marked = np.sum([scan.marked for scan in scans], axis=0)
    usable = _precise(scans, 0.0)
    found = usable & (hits >= 0.1 * sum(scan.lumen for scan in scans))
    if not usable.any():  # nothing is ever marked
        return int(np.ravel_multi_index((CORES.index(128), 128), hits.shape))
    share = hits / np.maximum(marked, 1)
    return int(np.where(found if found.any() else usable, share, -np.inf).argmax())


def _lower_bound(recalls: Sequence[np.ndarray], confidence: float) -> np.ndarray:
    """What the mean of the scans' recalls exceeds in a share of the bootstrap resamples."""
    stacked = np.stack(recalls)  # (n, C, LEVELS + 1)
    if confidence == 0.5:
        return stacked.mean(0)
    n = len(stacked)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
    means = np.tensordot(times, stacked, axes=1)
    return np.quantile(means, 1 - confidence, axis=0)


def _mean_rule(rules: Sequence[LumenRule]) -> LumenRule:
    return LumenRule(
        float(np.mean([rule.threshold for rule in rules])), float(np.mean([rule.core for rule in rules]))
    )


def _pieces_with_core(probability: np.ndarray, low: float, high: float, voxel_mm3: float) -> np.ndarray:
    mask = probability >= low
    pieces = np.asarray(measure.label(mask, connectivity=3))
    keep = np.bincount(pieces[probability >= high], minlength=int(pieces.max()) + 1) * voxel_mm3 >= CORE_MM3
    keep[0] = False
    return keep[pieces]
