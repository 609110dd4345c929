"""Pictures of what a network made of a few held-out samples: reconstructions, masks, judged candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from aneurysm.data.scan import Grid
from aneurysm.report.projections import orthogonal_projections
from aneurysm.report.style import GREEN, NIGHT_INK, ORANGE, PURPLE, SKY, new_figure
from aneurysm.report.views import VIEWS, letters, outline, scale_bar, show_slice, tint

# Where prediction and annotation agree, what was missed, what is not annotated.
AGREEMENT = {"annotated and found": SKY, "missed": ORANGE, "not annotated": PURPLE}


@dataclass(frozen=True, eq=False)
class ReconstructedCrop:
    """One crop of a masked reconstruction."""

    image: np.ndarray  # (d, h, w) as the network knows it
    visible: np.ndarray  # (d, h, w) bool
    reconstruction: np.ndarray  # (d, h, w), hidden voxels painted in
    spacing: np.ndarray  # (d, h, w) mm


def reconstruction_figure(crops: Sequence[ReconstructedCrop]) -> Figure:
    """One row per crop: the slice itself, what the network saw, what it made of it, and where it is wrong.

    The slice is the axial one with the most contrast among those that have hidden voxels.

    Raises:
        ValueError: no crop was given.
    """
    if not crops:
        raise ValueError("There is no crop to show.")
    figure = new_figure(10.8, 2.75 * len(crops) + 0.1, dark=True)
    panels = figure.subplots(len(crops), 4, squeeze=False)
    for number, (row, crop) in enumerate(zip(panels, crops, strict=True)):
        shown = int(np.argmax(crop.image.std(axis=(1, 2)) * (~crop.visible).any(axis=(1, 2))))
        grid = Grid(crop.image.shape, np.diag([*crop.spacing, 1.0]))
        image, seen, made = (a[shown] for a in (crop.image, crop.visible, crop.reconstruction))
        low, high = (float(v) for v in np.percentile(crop.image, (0.5, 99.8)))
        first = number == 0
        show_slice(row[0], image, grid, "Held-out crop" if first else "", low, high, "Axial")
        show_slice(
            row[1],
            np.where(seen, image, np.nan),
            grid,
            "What the network saw" if first else "",
            low,
            high,
            "Axial",
        )
        show_slice(row[2], made, grid, "Reconstruction" if first else "", low, high, "Axial")
        error = np.abs(made - image)
        show_slice(row[3], error, grid, "Error, same scale" if first else "", 0.0, high - low, "Axial")
        scale_bar(row[0], float(crop.spacing[2] * crop.image.shape[2]))
        hidden = float(np.mean((crop.reconstruction - crop.image)[~crop.visible] ** 2))
        row[2].set_xlabel(f"mean squared error of hidden voxels {hidden:.2f}", color=NIGHT_INK, fontsize=8.5)
    return figure


def agreement_figure(
    volume: np.ndarray, grid: Grid, predicted: np.ndarray, truth: np.ndarray, modality: str = "MRA"
) -> Figure:
    """Three projections of a scan, tinted by where a predicted mask and the annotated one agree.

    Args:
        volume: (d, h, w) canonical, any intensity unit.
        grid: of the volume.
        predicted: (d, h, w), non-zero is in the mask.
        truth: (d, h, w), the annotation.
        modality: CTA, MRA, T1 or T2.
    """
    figure, panels, _ = orthogonal_projections(volume, grid, (predicted != 0) | (truth != 0), modality)
    for axes, name in zip(panels, VIEWS, strict=True):
        axis = VIEWS[name][0]
        ours, theirs = (predicted != 0).any(axis=axis), (truth != 0).any(axis=axis)
        parts = (ours & theirs, theirs & ~ours, ours & ~theirs)
        for part, colour in zip(parts, AGREEMENT.values(), strict=True):
            tint(axes, part, grid, name, colour, 0.45)
        letters(axes, name)
    scale_bar(panels[0], float((grid.spacing * grid.shape).max()))
    figure.legend(
        handles=[Patch(color=colour, label=name, alpha=0.7) for name, colour in AGREEMENT.items()],
        loc="outside lower center", ncols=3, fontsize=9, frameon=False, labelcolor=NIGHT_INK,
    )  # fmt: skip
    return figure


@dataclass(frozen=True, eq=False)
class JudgedCrop:
    """A candidate, what was said about it and what is known."""

    image: np.ndarray  # (d, h, w), vessels bright
    mask: np.ndarray  # (d, h, w) predicted probability of the sac, 0..1
    truth: np.ndarray | None  # (d, h, w) bool, None unknown
    spacing: np.ndarray  # (d, h, w) mm
    title: str


def judged_crops_figure(groups: Mapping[str, Sequence[JudgedCrop]]) -> Figure:
    """Groups of candidates side by side, one row each: axial, coronal and sagittal slice with both masks.

    Slices go through the middle of the sac: the annotated one, else the predicted one, else of the crop.

    Raises:
        ValueError: every group is empty.
    """
    groups = {name: crops for name, crops in groups.items() if crops}
    if not groups:
        raise ValueError("There is no candidate to show.")
    rows = max(len(crops) for crops in groups.values())
    figure = new_figure(6.3 * len(groups), 2.25 * rows + 0.75, dark=True)
    parts = figure.subfigures(1, len(groups), squeeze=False, wspace=0.03)[0]
    for part, (name, crops) in zip(parts, groups.items(), strict=True):
        part.set_facecolor("none")
        part.suptitle(name, color=NIGHT_INK, fontsize=11.5, x=0.02, ha="left")
        panels = part.subplots(rows, 3, squeeze=False)
        for axes in panels[len(crops) :].ravel():
            axes.set_visible(False)
        for row, crop in zip(panels, crops, strict=False):
            _judged_row(row, crop)
    figure.legend(
        handles=[Patch(color=SKY, label="mask of the network"), Patch(color=GREEN, label="annotated")],
        loc="outside lower center", ncols=2, fontsize=9, frameon=False, labelcolor=NIGHT_INK,
    )  # fmt: skip
    return figure


def _judged_row(row: Sequence[Axes], crop: JudgedCrop) -> None:
    grid = Grid(crop.image.shape, np.diag([*crop.spacing, 1.0]))
    predicted = crop.mask >= 0.5
    through = crop.truth if crop.truth is not None and crop.truth.any() else predicted
    middle = np.argwhere(through).mean(axis=0) if through.any() else (np.array(crop.image.shape) - 1) / 2
    low, high = (float(v) for v in np.percentile(crop.image, (1, 99.8)))
    for axes, (name, (axis, _, _, _)) in zip(row, VIEWS.items(), strict=True):
        at = round(float(middle[axis]))
        show_slice(axes, np.take(crop.image, at, axis=axis), grid, "", low, high, name)
        outline(axes, np.take(predicted, at, axis=axis), grid, name)
        if crop.truth is not None:
            outline(axes, np.take(crop.truth, at, axis=axis), grid, name, GREEN)
        letters(axes, name)
    title = row[0].set_title(crop.title, color=NIGHT_INK, fontsize=9, loc="left")
    title.set_in_layout(False)  # it may be as wide as the row; it must not push the views apart
    scale_bar(row[0], float(crop.spacing[2] * crop.image.shape[2]))
