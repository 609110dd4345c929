"""What a view of a scan is made of: orientation, letters, tint, numbered marks, scale bar.

Radiological convention: the patient's right is on the viewer's left, anterior is up on axial views and
left on sagittal ones, superior is up. Screen axes are mm along the voxel axes, so an oblique scan is
shown in its own planes.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

from aneurysm.data.scan import Grid
from aneurysm.report.style import NIGHT, NIGHT_INK, ORANGE, PANEL, PANEL_LINE, SKY

# Per view: array axis looked along, axis across (growing leftwards), axis up, letters left right top bottom.
# What remains of a (d, h, w) array is (up, across) in every view.
VIEWS = {
    "Axial": (0, 2, 1, "RLAP"),
    "Coronal": (1, 2, 0, "RLSI"),
    "Sagittal": (2, 1, 0, "APSI"),
}
MARGIN = 0.26  # beside a view with marks, share of its width
Mark = tuple[Sequence[float] | np.ndarray, float]  # position in RAS mm, probability


def on_screen(index: np.ndarray, grid: Grid, view: str) -> tuple[float, float]:
    """Voxel index (d, h, w) -> mm across and up in a view."""
    _, across, up, _ = VIEWS[view]
    spacing = grid.spacing
    return float(index[across] * spacing[across]), float(index[up] * spacing[up])


def _extent(grid: Grid, view: str) -> tuple[float, float, float, float]:
    _, across, up, _ = VIEWS[view]
    spacing, shape = grid.spacing, grid.shape
    return (
        -0.5 * spacing[across], (shape[across] - 0.5) * spacing[across],
        -0.5 * spacing[up], (shape[up] - 0.5) * spacing[up],
    )  # fmt: skip


def show_slice(
    axes: Axes, image: np.ndarray, grid: Grid, title: str, low: float, high: float, view: str | None = None
) -> None:
    """A slice or projection (up, across) in grey, upright; name the `view` if the title is not it."""
    view = view or title
    extent = _extent(grid, view)
    smooth = "bilinear" if np.isfinite(image).all() else "nearest"
    axes.imshow(
        image, origin="lower", extent=extent, cmap="gray", vmin=low, vmax=max(high, low + 1e-6),
        interpolation=smooth, aspect="equal",
    )  # fmt: skip
    axes.set_xlim(extent[1], extent[0])  # right of the patient, or anterior, to the viewer's left
    frame(axes, title)


def frame(axes: Axes, title: str) -> None:
    """A dark frame without ticks."""
    axes.set_facecolor(PANEL)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(PANEL_LINE)
    axes.set_title(title, color=NIGHT_INK, fontsize=10.5, loc="left")


def letters(axes: Axes, view: str) -> None:
    """Orientation letters at the four sides of what the axes show now."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    inset = 0.02
    places = ((inset, 0.5, "left", "center"), (1 - inset, 0.5, "right", "center"))
    places += ((0.5, 1 - inset, "center", "top"), (0.5, inset, "center", "bottom"))
    for letter, (x, y, across, up) in zip(VIEWS[view][3], places, strict=True):
        axes.text(
            x0 + x * (x1 - x0), y0 + y * (y1 - y0), letter, ha=across, va=up, color=NIGHT_INK, fontsize=11,
            fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground=NIGHT)],
        )  # fmt: skip


def tint(
    axes: Axes, mask: np.ndarray, grid: Grid, view: str, colour: str = SKY, strength: float = 0.28
) -> None:
    """Colour the true pixels of a projected mask (up, across)."""
    pixels = np.zeros((*mask.shape, 4))
    pixels[..., :3] = to_rgb(colour)
    pixels[..., 3] = strength * mask
    axes.imshow(pixels, origin="lower", extent=_extent(grid, view), interpolation="nearest", aspect="equal")
    left, right, *_ = _extent(grid, view)
    axes.set_xlim(right, left)


def outline(axes: Axes, mask: np.ndarray, grid: Grid, view: str, colour: str = SKY) -> None:
    """Draw the contour of a sliced mask (up, across)."""
    if mask.any():
        _, across, up, _ = VIEWS[view]
        x = np.arange(grid.shape[across]) * grid.spacing[across]
        y = np.arange(grid.shape[up]) * grid.spacing[up]
        axes.contour(x, y, mask, levels=[0.5], colors=[colour], linewidths=0.9, alpha=0.9)


def ring(centre: tuple[float, float], radius: float, colour: str, style: str) -> Circle:
    """An open circle, centre and radius in mm, that stands out from any grey."""
    ring = Circle(centre, radius, fill=False, edgecolor=colour, linewidth=1.5, linestyle=style)
    ring.set_path_effects([withStroke(linewidth=2.6, foreground=NIGHT, alpha=0.7)])
    return ring


def call_out(
    axes: Axes, points: Sequence[tuple[float, float]], marks: Sequence[Mark], mm_per_inch: float
) -> None:
    """Circles with number and probability, the words in margins beside the view where nothing is hidden.

    Args:
        axes: limits as the view is to be seen; widened by the margins.
        points: the marks on screen, mm.
        marks: their probabilities.
        mm_per_inch: scale of the figure, so that words keep a line's distance.
    """
    if not points:
        return
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    radius, gap = 0.08 * mm_per_inch, 0.175 * mm_per_inch
    margin = MARGIN * (x1 - x0)
    axes.set_xlim(x0 - margin, x1 + margin)
    sides: dict[bool, list[int]] = {True: [], False: []}
    for number, (x, _) in enumerate(points):
        sides[(x - x0) / (x1 - x0) < 0.5].append(number)
    for on_left, numbers in sides.items():
        numbers.sort(key=lambda n: points[n][1])
        heights = _spread([points[n][1] for n in numbers], gap, y0 + gap / 2, y1 - gap / 2)
        for n, height in zip(numbers, heights, strict=True):
            axes.add_patch(ring(points[n], radius, ORANGE, "-"))
            axes.annotate(
                f"{n + 1}  p {marks[n][1]:.2f}", xy=points[n], xycoords="data",
                xytext=(x0 - 0.95 * margin if on_left else x1 + 0.95 * margin, height), textcoords="data",
                ha="left" if on_left else "right", va="center", color=ORANGE, fontsize=9, fontweight="bold",
                path_effects=[withStroke(linewidth=2.5, foreground=NIGHT)],
                arrowprops={"arrowstyle": "-", "color": ORANGE, "linewidth": 0.8, "alpha": 0.7, "shrinkB": 5},
            )  # fmt: skip


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising heights moved apart to at least `gap`, kept within bounds as long as they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap if placed else low))
    ceiling = high
    for n in range(len(placed) - 1, -1, -1):
        placed[n] = min(placed[n], ceiling)
        ceiling = placed[n] - gap
    return placed


def scale_bar(axes: Axes, extent_mm: float) -> None:
    """A bar of a round number of mm in the lower corner, for a view about `extent_mm` wide."""
    length = next((mm for mm in (50, 20, 10, 5) if mm <= extent_mm / 3), 2)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    start, y = x0 + 0.04 * (x1 - x0), y0 + 0.035 * (y1 - y0)
    end = start + np.sign(x1 - x0) * length
    axes.plot([start, end], [y, y], color=NIGHT_INK, linewidth=2.5, solid_capstyle="butt")
    axes.text(
        (start + end) / 2, y + 0.015 * (y1 - y0), f"{length} mm", ha="center", va="bottom", color=NIGHT_INK,
        fontsize=8.5, path_effects=[withStroke(linewidth=2.5, foreground=NIGHT)],
    )  # fmt: skip
