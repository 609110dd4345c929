"""Views are the right way round, to scale, and show what matters in each modality."""

import numpy as np
import pytest
from matplotlib.image import AxesImage
from matplotlib.text import Text

from aneurysm.data.scan import Lesion
from aneurysm.report.projections import candidate_crops, mip_panel, vessel_graph_figure
from aneurysm.report.style import png
from aneurysm.report.views import VIEWS, on_screen

# Where a step in the world must go on the viewer's screen: (view, RAS direction, right, up).
DIRECTIONS = [
    ("Axial", (1, 0, 0), -1, 0),
    ("Axial", (0, 1, 0), 0, 1),
    ("Coronal", (1, 0, 0), -1, 0),
    ("Coronal", (0, 0, 1), 0, 1),
    ("Sagittal", (0, 1, 0), -1, 0),
    ("Sagittal", (0, 0, 1), 0, 1),
]


def axes_of(figure, view: str):
    return figure.axes[list(VIEWS).index(view)]


@pytest.mark.parametrize(("view", "step", "right", "up"), DIRECTIONS)
def test_radiological_orientation_of_scan_and_graph(volume, grid, chain, view, step, right, up):
    start = grid.centre_mm
    end = start + 5 * np.array(step, dtype=float)
    axes = axes_of(mip_panel(volume, grid), view)
    moved = axes.transData.transform([on_screen(grid.to_index(mm), grid, view) for mm in (start, end)])
    assert np.sign(np.round(moved[1] - moved[0], 6)).tolist() == [right, up]
    pair = {"Axial": (0, 1), "Coronal": (0, 2), "Sagittal": (1, 2)}[view]
    graph = axes_of(vessel_graph_figure(chain, np.zeros(24)), view)
    moved = graph.transData.transform([(mm[pair[0]], mm[pair[1]]) for mm in (start, end)])
    assert np.sign(np.round(moved[1] - moved[0], 6)).tolist() == [right, up]


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_bright_voxel_appears_under_its_mark(grid, view):
    image = np.zeros(grid.shape, np.float32)
    image[20, 5, 40] = 100
    axes = axes_of(mip_panel(image, grid), view)
    picture = next(child for child in axes.get_children() if isinstance(child, AxesImage))
    row, column = np.unravel_index(np.argmax(picture.get_array()), picture.get_array().shape)
    left, right, bottom, top = picture.get_extent()
    rows, columns = picture.get_array().shape
    x = left + (column + 0.5) * (right - left) / columns
    y = bottom + (row + 0.5) * (top - bottom) / rows
    np.testing.assert_allclose((x, y), on_screen(np.array([20, 5, 40]), grid, view), atol=1e-6)


def test_true_proportions_and_letters(volume, grid):
    figure = mip_panel(volume, grid, candidates=[(grid.centre_mm, 0.7)])
    for view, axes in zip(VIEWS, figure.axes, strict=True):
        assert axes.get_aspect() == 1.0
        shown = [text.get_text() for text in axes.texts]
        assert set(VIEWS[view][3]) <= set(shown) and "1  p 0.70" in shown
    assert any("mm" in text.get_text() for text in figure.axes[0].texts)


def grey_at(figure, view: str, row: int, column: int) -> float:
    axes = axes_of(figure, view)
    picture = next(child for child in axes.get_children() if isinstance(child, AxesImage))
    return float(picture.get_array()[row, column])


def test_t2_shows_dark_vessels_by_minimum(grid):
    image = np.full(grid.shape, 100.0, np.float32)
    image[:, 20, 25] = 5
    vessel = np.zeros(grid.shape, np.uint8)
    vessel[:, 20, 25] = 1
    figure = mip_panel(image, grid, vessel, modality="T2")
    assert grey_at(figure, "Coronal", 10, 25) == 0 and grey_at(figure, "Coronal", 10, 28) == 1


def test_bone_in_front_does_not_hide_vessels_in_cta(grid):
    image = np.zeros(grid.shape, np.float32)
    image[:, 2, :] = 1500  # a plate of bone in front of everything
    image[:, 20, 25] = 300
    vessel = (image == 300).astype(np.uint8)
    figure = mip_panel(image, grid, vessel, modality="CTA")
    assert grey_at(figure, "Coronal", 10, 25) == 1.0
    assert grey_at(figure, "Coronal", 10, 45) < 0.35
    hidden = mip_panel(image, grid, None, modality="CTA")
    assert grey_at(hidden, "Coronal", 10, 45) == 1.0


@pytest.mark.parametrize("modality", ["CTA", "MRA", "T1", "T2"])
def test_every_modality_renders_with_and_without_a_mask(volume, grid, modality):
    lesion = Lesion(grid.centre_mm, None, 3)
    for vessel in (None, np.zeros(grid.shape, np.uint8), (volume > 10).astype(np.uint8)):
        assert png(mip_panel(volume, grid, vessel, [(grid.centre_mm, 0.5)], [lesion], modality), dpi=30)


def test_many_marks_do_not_overlap(volume, grid):
    rng = np.random.default_rng(0)
    marks = [(grid.centre_mm + rng.normal(0, 3, 3), 0.5) for _ in range(8)]
    figure = mip_panel(volume, grid, candidates=marks)
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts if " p " in text.get_text()]
        assert len(boxes) == 8
        overlaps = [a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
        assert not any(overlaps)


def test_crops_are_centred_and_survive_the_edge_of_the_scan(volume, grid):
    corner = grid.to_mm(np.array([0, 0, 0]))
    figure = candidate_crops(volume, grid, [(grid.centre_mm, 0.9), (corner, 0.2)], [3.0, np.nan], volume > 10)
    assert len(figure.axes) == 6 and png(figure, dpi=30)
    axes = figure.axes[1]
    x, y = on_screen(grid.to_index(grid.centre_mm), grid, "Coronal")
    assert np.mean(axes.get_xlim()) == pytest.approx(x) and np.mean(axes.get_ylim()) == pytest.approx(y)
    with pytest.raises(ValueError, match="no candidate"):
        candidate_crops(volume, grid, [])


def test_graph_edges_are_coloured_by_score(chain):
    score = np.linspace(0, 1, 24)
    figure = vessel_graph_figure(chain, score, [(chain.position[5], 0.4)])
    lines = figure.axes[0].collections[0]
    np.testing.assert_allclose(lines.get_array(), np.sort(score[chain.edges].mean(axis=1)))
    with pytest.raises(ValueError, match="24 nodes but 3 scores"):
        vessel_graph_figure(chain, np.zeros(3))


def test_an_empty_graph_still_makes_a_picture(chain):
    nothing = type(chain)(np.zeros((0, 3)), np.zeros((0, 2), np.int64))
    assert png(vessel_graph_figure(nothing, np.zeros(0)), dpi=30)
