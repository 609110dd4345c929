"""Which scans to show in a report, and how: hits, misses and false alarms at one operating point."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aneurysm.data.scan import Grid, Lesion
from aneurysm.evaluation.froc import FALSE_ALARM, HIT, Froc
from aneurysm.evaluation.summary import Evaluation
from aneurysm.report.html import Picture
from aneurysm.report.projections import mip_panel

MISSED = "missed"
TITLES = {HIT: "Found", MISSED: "Missed", FALSE_ALARM: "False alarm"}
GROUP = "Example scans"


@dataclass(frozen=True)
class Example:
    """A scan worth looking at."""

    series_uid: str
    kind: str  # "hit", "missed" or "false alarm"
    p: float  # of the mark that makes the example; NaN when the lesion got no mark
    caption: str

    @property
    def title(self) -> str:
        """Heading of its picture."""
        return f"{TITLES[self.kind]}: series {self.series_uid}"


def choose_examples(evaluation: Evaluation, per_kind: int = 2) -> list[Example]:
    """Scans to show: the surest hits, lesions missed, and the surest false alarms, each scan once.

    The operating point is 1 false alarm per scan. Empty without a FROC curve of the expert.
    """
    curve = _curve(evaluation)
    if curve is None:
        return []
    threshold = curve.threshold_at(1.0)
    lesions = list(zip(curve.lesions["series_uid"], curve.lesions["p"], strict=True))
    marks = zip(curve.marks["series_uid"], curve.marks["p"], curve.marks["outcome"], strict=True)
    found = sorted((pair for pair in lesions if pair[1] >= threshold), key=lambda pair: -pair[1])
    missed = [pair for pair in lesions if not pair[1] >= threshold]
    missed.sort(key=lambda pair: np.nan_to_num(pair[1]))  # those without any mark first
    alarms = [(uid, p) for uid, p, outcome in marks if outcome == FALSE_ALARM and p >= threshold]
    kinds = (
        (HIT, found, "Found: the aneurysm was marked with p = {p:.2f}."),
        (MISSED, missed, "Missed: {why}."),
        (FALSE_ALARM, alarms, "False alarm: p = {p:.2f} where no aneurysm is known."),
    )
    used: set[str] = set()
    examples = []
    for kind, pairs, caption in kinds:
        taken = 0
        for uid, p in pairs:
            if taken == per_kind or uid in used:
                continue
            used.add(uid)
            taken += 1
            low = f"marked with p = {p:.2f}, below the threshold"
            why = "no mark near the aneurysm" if np.isnan(p) else low
            examples.append(Example(str(uid), kind, float(p), caption.format(p=p, why=why)))
    return examples


def example_picture(
    example: Example,
    evaluation: Evaluation,
    image: np.ndarray,
    grid: Grid,
    modality: str,
    vessel: np.ndarray | None = None,
    lesions: Sequence[Lesion] = (),
    most: int = 5,
) -> Picture:
    """Projections of an example with its best marks and its known lesions.

    Args:
        example: from `choose_examples`.
        evaluation: the one it was chosen from.
        image: (d, h, w) canonical, any intensity unit.
        grid: of the image and the mask.
        modality: CTA, MRA, T1 or T2.
        vessel: (d, h, w), non-zero is vessel.
        lesions: known aneurysms, drawn dashed.
        most: marks shown, best first.
    """
    curve = _curve(evaluation)
    marks = []
    if curve is not None:
        mine = curve.marks.loc[curve.marks["series_uid"] == example.series_uid, ["x_mm", "y_mm", "z_mm", "p"]]
        marks = [(row[:3], float(row[3])) for row in mine.to_numpy(dtype=np.float64)[:most]]
    figure = mip_panel(image, grid, vessel, marks, lesions, modality)
    caption = f"{example.caption} {modality}; orange: the best marks with p; dashed green: known aneurysms."
    return Picture(example.title, figure, caption, GROUP)


def _curve(evaluation: Evaluation) -> Froc | None:
    return evaluation.froc.get("expert") or evaluation.froc.get("smart_net")
