"""Charts name their axes, draw what they were given, and say what they could not draw."""

import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from aneurysm.data.labels import LOCATIONS
from aneurysm.evaluation.calibration import calibration
from aneurysm.evaluation.candidates import candidate_recall
from aneurysm.evaluation.froc import froc
from aneurysm.evaluation.rsna_score import rsna_score
from aneurysm.report.figures import (
    TrainingCurve,
    calibration_figure,
    candidate_figure,
    froc_figure,
    location_figure,
    loss_weight_figure,
    roc_figure,
    training_figure,
)
from aneurysm.report.style import png


def words(figure) -> str:
    return " | ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def legends(figure) -> list[str]:
    found = [axes.get_legend() for axes in figure.axes]
    return [text.get_text() for legend in found if legend for text in legend.get_texts()]


def test_every_chart_renders_with_named_axes_and_without_pyplot(evaluation):
    figures = [
        roc_figure(evaluation.truth, evaluation.probability, evaluation.rsna, evaluation.column_intervals),
        froc_figure(evaluation.froc),
        calibration_figure(evaluation.calibration),
        location_figure(evaluation.rsna, evaluation.column_intervals),
        candidate_figure(evaluation.candidates),
    ]
    for figure in figures:
        assert isinstance(figure.canvas, FigureCanvasAgg)
        assert all(axes.get_xlabel() for axes in figure.axes)
        assert png(figure, dpi=40).startswith(b"\x89PNG")
    assert matplotlib.pyplot.get_fignums() == []


def test_left_out_labels_are_named_with_the_reason(evaluation):
    assert "left out: no positive among 40 scans" in words(location_figure(evaluation.rsna))
    shown = legends(roc_figure(evaluation.truth, evaluation.probability, evaluation.rsna))
    assert len(shown) == 1 + 12 and not any(name.startswith("Other") for name in shown)


def test_the_froc_line_passes_through_the_operating_points(evaluation):
    axes = froc_figure(evaluation.froc).axes[0]
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    curve = evaluation.froc["expert"]
    np.testing.assert_allclose(dots.get_ydata(), [curve.sensitivity_at(x) for x in dots.get_xdata()])


def test_nothing_to_draw_is_said_in_words():
    truth, probability = np.full((4, 14), np.nan), np.full((4, 14), 0.5)
    none = rsna_score(truth, probability)
    assert "no scan has a known label" in words(roc_figure(truth, probability, none))
    assert words(location_figure(none)).count("left out") == 14
    marks = pd.DataFrame({"series_uid": ["a"], "x_mm": [0.0], "y_mm": [0.0], "z_mm": [0.0], "p": [0.5]})
    assert "no lesion" in words(froc_figure({"expert": froc(marks, {}, ["a"])}))
    recall = candidate_recall(marks.rename(columns={"p": "score"}), {}, ["a"])
    assert "no lesion" in words(candidate_figure(recall))
    assert "no case" in words(calibration_figure({"scan": calibration(truth[:, 0], probability[:, 0])}))


@pytest.fixture
def curves() -> list[TrainingCurve]:
    """Two folds as a CSV logger writes them: training rows by step, validation rows by epoch."""
    rows = []
    for epoch in range(3):
        rows += [{"epoch": epoch, "step": 4 * epoch + k, "train/loss": 2.0 - epoch + k} for k in range(2)]
        last = {"epoch": epoch, "step": 4 * epoch + 3}
        rows.append(last | {"val/loss": 1.5 - epoch / 2, "val/auc": 0.5 + epoch / 10, "weight/mask": 0.4})
    return [TrainingCurve("expert", fold, pd.DataFrame(rows)) for fold in range(2)]


def test_training_panels_pair_training_with_validation(curves):
    figure = training_figure(curves)
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in drawn] == ["loss", "auc"]
    assert sorted(legends(figure)) == ["training", "validation"]
    line = drawn[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [2.5, 1.5, 0.5])  # mean over the steps of an epoch
    assert drawn[0].get_xlabel() == "epoch"


def test_loss_weights_have_their_own_chart(curves):
    assert legends(loss_weight_figure(curves)) == ["mask"]
    bare = [TrainingCurve("vessel", 0, curves[0].metrics.drop(columns="weight/mask"))]
    assert loss_weight_figure(bare) is None
    assert training_figure([TrainingCurve("vessel", 0, pd.DataFrame({"epoch": [0]}))]) is None


def test_colours_cover_every_location():
    from aneurysm.report.figures import _artery_colour

    assert all(_artery_colour(name) for name in LOCATIONS)
