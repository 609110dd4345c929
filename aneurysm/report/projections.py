"""Pictures of a scan and its vessel graph: three orthogonal projections, zoomed slices, graph views."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy import ndimage

from aneurysm.data.scan import Grid, Lesion
from aneurysm.report.style import GREEN, NIGHT_INK, ORANGE, new_figure
from aneurysm.report.views import (
    MARGIN,
    VIEWS,
    Mark,
    call_out,
    frame,
    letters,
    on_screen,
    outline,
    ring,
    scale_bar,
    show_slice,
    tint,
)

# What is projected around the vessels, mm: bone lies close beside arteries in CTA and bright marrow and
# veins in T1; in T2 the dark air is farther away, and bright fluid has to frame the vessels.
NEAR_MM = {"CTA": 1.5, "T1": 1.5, "T2": 6.0}


class GraphLike(Protocol):
    """What a vessel graph must have to be drawn."""

    position: np.ndarray  # (N, 3) RAS mm
    edges: np.ndarray  # (E, 2) node numbers


def mip_panel(
    volume: np.ndarray,
    grid: Grid,
    vessel: np.ndarray | None = None,
    candidates: Sequence[Mark] = (),
    lesions: Sequence[Lesion] | None = None,
    modality: str = "MRA",
) -> Figure:
    """Axial, coronal and sagittal intensity projections with vessels, candidates and known lesions.

    Bright vessels (CTA, MRA, T1 after contrast) are projected by maximum, dark ones (T2) by minimum. In
    all but MRA other tissue would cover the vessels: with a vessel mask only its surroundings are
    projected, before a faint mean of the whole scan; without one, T2 is projected inside the head only.

    Args:
        volume: (d, h, w) canonical, any intensity unit.
        grid: of the volume.
        vessel: (d, h, w), non-zero is vessel; tinted.
        candidates: (position in RAS mm, probability), numbered 1, 2, ... in the order given.
        lesions: known aneurysms, drawn as dashed circles.
        modality: CTA, MRA, T1 or T2.
    """
    figure, panels, scale = orthogonal_projections(volume, grid, vessel, modality, bool(len(candidates)))
    for axes, name in zip(panels, VIEWS, strict=True):
        if vessel is not None:
            tint(axes, (vessel != 0).any(axis=VIEWS[name][0]), grid, name)
        for lesion in lesions or ():
            centre = on_screen(grid.to_index(lesion.centre_mm), grid, name)
            axes.add_patch(ring(centre, max(lesion.radius_mm or 0.0, 2.5) + 1.5, GREEN, "--"))
        letters(axes, name)
        if axes is panels[0]:
            scale_bar(axes, float((grid.spacing * grid.shape).max()))
        places = [on_screen(grid.to_index(np.asarray(mm)), grid, name) for mm, _ in candidates]
        call_out(axes, places, candidates, scale)
    return figure


def orthogonal_projections(
    volume: np.ndarray, grid: Grid, vessel: np.ndarray | None, modality: str, marked: bool = False
) -> tuple[Figure, list[Axes], float]:
    """The grey of `mip_panel` alone: a figure, its three axes in the order of VIEWS, and mm per inch.

    Args:
        marked: leave room for numbered marks beside the views.
    """
    keep = _region(volume, grid, vessel, modality)
    dark = modality == "T2"
    size = grid.spacing * grid.shape
    widths = [size[across] for _, across, _, _ in VIEWS.values()]
    tallest = max(size[up] for _, _, up, _ in VIEWS.values())
    figure, scale = _three_views(sum(widths), tallest, marked)
    panels = list(figure.subplots(1, 3, width_ratios=widths))
    images = [_project(volume, keep, axis, dark) for axis, _, _, _ in VIEWS.values()]
    low, high = _window(images, volume, vessel if keep is not None and not dark else None)
    for axes, name, image in zip(panels, VIEWS, images, strict=True):
        grey = np.clip((image - low) / (high - low), 0, 1)
        if keep is not None:
            grey = np.where(np.isfinite(image), grey, _faint(volume.mean(axis=VIEWS[name][0])))
        show_slice(axes, grey, grid, name, 0.0, 1.0)
    return figure, panels, scale


def candidate_crops(
    volume: np.ndarray,
    grid: Grid,
    candidates: Sequence[Mark],
    radii_mm: Sequence[float] | np.ndarray | None = None,
    vessel: np.ndarray | None = None,
    half_mm: float = 15.0,
    most: int = 3,
) -> Figure:
    """Zoomed slices through the first candidates: one row each, axial, coronal and sagittal.

    Args:
        volume: (d, h, w) canonical.
        grid: of the volume.
        candidates: (position in RAS mm, probability), best first.
        radii_mm: radius of the predicted sac of each, drawn as a circle; NaN or 0 draws a cross hair only.
        vessel: (d, h, w), its outline is drawn.
        half_mm: half the width of the view, mm.
        most: rows at most.

    Raises:
        ValueError: no candidate was given.
    """
    if not candidates:
        raise ValueError("There is no candidate to zoom in on.")
    rows = list(candidates)[:most]
    figure = new_figure(11.3, 3.75 * len(rows) + 0.2, dark=True)
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for number, (mm, p) in enumerate(rows):
        centre = grid.to_index(np.asarray(mm))
        radius = float(radii_mm[number]) if radii_mm is not None else float("nan")
        half = np.ceil(half_mm / grid.spacing).astype(int)
        nearest = np.clip(np.rint(centre).astype(int), 0, np.array(grid.shape) - 1)
        box = tuple(slice(max(c - h, 0), c + h + 1) for c, h in zip(nearest, half, strict=True))
        low, high = (float(v) for v in np.percentile(volume[box], (1, 99.7)))
        for axes, (name, (axis, _, _, _)) in zip(panels[number], VIEWS.items(), strict=True):
            image = np.take(volume, nearest[axis], axis=axis)
            show_slice(axes, image, grid, name if number == 0 else "", low, high, name)
            if vessel is not None:
                outline(axes, np.take(vessel != 0, nearest[axis], axis=axis), grid, name)
            x, y = on_screen(centre, grid, name)
            axes.set(xlim=(x + half_mm, x - half_mm), ylim=(y - half_mm, y + half_mm))
            letters(axes, name)
            gap = radius + 1.5 if np.isfinite(radius) and radius > 0 else 3.0
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                line = ((x + dx * gap, x + dx * (gap + 3)), (y + dy * gap, y + dy * (gap + 3)))
                axes.plot(*line, color=ORANGE, linewidth=1.2)
            if np.isfinite(radius) and radius > 0:
                axes.add_patch(ring((x, y), radius, ORANGE, "-"))
        panels[number][0].set_ylabel(f"Candidate {number + 1},  p = {p:.2f}", color=NIGHT_INK, fontsize=10)
        scale_bar(panels[number][0], 2 * half_mm)
    return figure


def vessel_graph_figure(
    graph: GraphLike,
    score: np.ndarray,
    candidates: Sequence[Mark] = (),
) -> Figure:
    """The vessel graph seen from three sides, its edges coloured by anomaly score.

    Args:
        graph: positions (N, 3) in RAS mm and edges (E, 2).
        score: (N,) anomaly score of each node, 0..1.
        candidates: (position in RAS mm, probability), numbered in the order given.

    Raises:
        ValueError: the scores are not one per node.
    """
    position, edges = np.asarray(graph.position, dtype=np.float64), np.asarray(graph.edges, dtype=np.int64)
    score = np.asarray(score, dtype=np.float64).reshape(-1)
    if len(score) != len(position):
        raise ValueError(f"The graph has {len(position)} nodes but {len(score)} scores.")
    of_edge = score[edges].mean(axis=1) if len(edges) else np.zeros(0)
    order = np.argsort(of_edge)  # the suspicious parts on top
    # World axes (x right, y anterior, z superior) on screen, x growing to the viewer's left.
    sides = {"Axial": (0, 1), "Coronal": (0, 2), "Sagittal": (1, 2)}
    drawn = np.concatenate([position, np.array([mm for mm, _ in candidates]).reshape(-1, 3)])
    if len(drawn) == 0:
        drawn = np.array([[-20.0] * 3, [20.0] * 3])
    low, high = drawn.min(axis=0) - 6, drawn.max(axis=0) + 6
    size = high - low
    widths = [size[across] for across, _ in sides.values()]
    tallest = max(size[up] for _, up in sides.values())
    figure, scale = _three_views(sum(widths), tallest, bool(len(candidates)))
    lines = None
    panels = figure.subplots(1, 3, width_ratios=widths)
    for axes, (name, pair) in zip(panels, sides.items(), strict=True):
        lines = LineCollection(
            list(position[edges[order]][:, :, pair]), array=of_edge[order], cmap="inferno", clim=(-0.45, 1),
            linewidths=1.6 + 2.4 * np.clip(of_edge[order], 0, 1), capstyle="round",
        )  # fmt: skip
        axes.add_collection(lines)
        axes.set_aspect("equal")
        frame(axes, name)
        axes.set(xlim=(high[pair[0]], low[pair[0]]), ylim=(low[pair[1]], high[pair[1]]))
        letters(axes, name)
        if name == "Axial":
            scale_bar(axes, float(size.max()))
        places = [(float(mm[pair[0]]), float(mm[pair[1]])) for mm, _ in candidates]
        call_out(axes, places, candidates, scale)
    if lines is not None:
        bar = figure.colorbar(lines, ax=panels, shrink=0.75, pad=0.01, boundaries=np.linspace(0, 1, 101))
        bar.set_label("anomaly score of the graph (0 to 1)", color=NIGHT_INK, fontsize=9)
        bar.set_ticks([0, 0.5, 1])
        bar.ax.tick_params(colors=NIGHT_INK, labelsize=8.5)
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _three_views(across_mm: float, tallest_mm: float, marked: bool) -> tuple[Figure, float]:
    """A dark figure for three views side by side, and its scale in mm per inch."""
    across_mm *= 1 + 2 * MARGIN * marked
    height = float(np.clip(12.2 * tallest_mm / across_mm + 0.55, 2.5, 8))
    return new_figure(13, height, dark=True), max(across_mm / 12.2, tallest_mm / (height - 0.55))


def _region(volume: np.ndarray, grid: Grid, vessel: np.ndarray | None, modality: str) -> np.ndarray | None:
    """Voxels to project, None for all."""
    if modality not in NEAR_MM:
        return None
    reach = 2 * np.rint(NEAR_MM[modality] / grid.spacing).astype(int) + 1
    if vessel is not None and (vessel != 0).any():
        # A box filter costs the same for any reach; a distance map of a whole head takes a minute.
        return ndimage.maximum_filter((vessel != 0).view(np.uint8), size=tuple(reach)) > 0
    if modality == "T2":
        bright = volume > 0.25 * np.percentile(volume, 95) + 0.75 * np.percentile(volume, 1)
        head = ndimage.binary_fill_holes(ndimage.binary_closing(bright, iterations=2))
        inner = ndimage.minimum_filter(np.asarray(head).view(np.uint8), size=tuple(2 * reach - 1)) > 0
        return inner if inner.any() else None
    return None


def _project(volume: np.ndarray, keep: np.ndarray | None, axis: int, dark: bool) -> np.ndarray:
    """Maximum or minimum along an axis; a ray without a voxel to keep is infinite."""
    reduce, nothing = (np.min, np.inf) if dark else (np.max, -np.inf)
    return reduce(volume if keep is None else np.where(keep, volume, nothing), axis=axis)


def _window(images: list[np.ndarray], volume: np.ndarray, vessel: np.ndarray | None) -> tuple[float, float]:
    """Values shown black and white; with a vessel mask, bone brighter than blood does not set the white."""
    pixels = np.concatenate([image[np.isfinite(image)] for image in images])
    low, high = (float(v) for v in np.percentile(pixels, (1, 99.7)))
    if vessel is not None:
        high = float(np.percentile(volume[vessel != 0], 99))
    return low, max(high, low + 1e-6)


def _faint(mean: np.ndarray) -> np.ndarray:
    """A mean projection as a dim backdrop."""
    floor, ceiling = np.percentile(mean, (2, 99.5))
    return 0.3 * np.clip((mean - floor) / max(ceiling - floor, 1e-6), 0, 1)
