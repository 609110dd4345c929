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
    lesions = curve.lesions.sort_values("p", ascending=False, kind="stable")
    above = lesions["p"] >= threshold
    alarms = curve.marks[(curve.marks["outcome"] == FALSE_ALARM) & (curve.marks["p"] >= threshold)]
    kinds = (
        (HIT, lesions[above], "Found: the aneurysm was marked with p = {p:.2f}."),
        (MISSED, lesions[~above].sort_values("p", na_position="first"), "Missed: {why}."),
        (FALSE_ALARM, alarms, "False alarm: p = {p:.2f} where no aneurysm is known."),
    )
    used: set[str] = set()
    examples = []
    for kind, table, caption in kinds:
        taken = 0
        for uid, p in zip(table["series_uid"], table["p"], strict=True):
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
        mine = curve.marks[curve.marks["series_uid"] == example.series_uid].head(most)
        marks = [(np.array([m.x_mm, m.y_mm, m.z_mm]), float(m.p)) for m in mine.itertuples()]
    figure = mip_panel(image, grid, vessel, marks, lesions, modality)
    caption = f"{example.caption} {modality}; orange: the best marks with p; dashed green: known aneurysms."
    return Picture(example.title, figure, caption, GROUP)


def _curve(evaluation: Evaluation) -> Froc | None:
    return evaluation.froc.get("expert") or evaluation.froc.get("smart_net")
