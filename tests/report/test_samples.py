"""Pictures of held-out samples show what they say: the right slice, the right colour, both masks."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from aneurysm.data.scan import Grid
from aneurysm.report.samples import (
    AGREEMENT,
    JudgedCrop,
    ReconstructedCrop,
    agreement_figure,
    judged_crops_figure,
    reconstruction_figure,
)
from aneurysm.report.style import GREEN, SKY, png


def crop(seed: int = 0) -> ReconstructedCrop:
    """Noise with one slice of high contrast, its right half hidden and reconstructed as zero."""
    image = np.random.default_rng(seed).normal(0, 0.1, (8, 10, 12)).astype(np.float32)
    image[5, :, ::2] += 3
    visible = np.ones(image.shape, bool)
    visible[:, :, 6:] = False
    return ReconstructedCrop(image, visible, np.where(visible, image, 0.0), np.array([2.0, 1.0, 1.0]))


def test_a_reconstruction_shows_the_slice_with_most_to_see_and_hides_what_was_hidden():
    figure = reconstruction_figure([crop(0), crop(1)])
    assert len(figure.axes) == 8
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:4] == ["Held-out crop", "What the network saw", "Reconstruction", "Error, same scale"]
    assert not any(titles[4:])
    image, seen, made, error = (np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes[:4])
    assert np.allclose(image, crop(0).image[5])
    assert np.isnan(seen[:, 6:]).all() and np.allclose(seen[:, :6], image[:, :6])
    assert np.allclose(error, np.abs(made - image)) and error[:, :6].max() == 0 < error[:, 6:].max()
    assert png(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no crop"):
        reconstruction_figure([])


def test_agreement_colours_found_missed_and_extra_voxels(volume: np.ndarray, grid: Grid):
    predicted, truth = np.zeros(grid.shape, bool), np.zeros(grid.shape, bool)
    predicted[3:6, 10:12, 10:12] = truth[3:6, 10:12, 10:12] = True  # found
    truth[3:6, 20:22, 20:22] = True  # missed
    predicted[3:6, 30:32, 30:32] = True  # extra
    figure = agreement_figure(volume, grid, predicted, truth)
    axial = figure.axes[0]
    tints = [image.get_array() for image in axial.images[1:]]
    for place, pixels, colour in zip((11, 21, 31), tints, AGREEMENT.values(), strict=True):
        shown = np.asarray(pixels)[..., 3] > 0
        assert shown.sum() == 4 and shown[place, place]
        assert np.allclose(np.asarray(pixels)[place, place, :3], to_rgb(colour))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(AGREEMENT)


def test_judged_crops_cut_through_the_annotated_sac_and_draw_both_masks():
    image = np.random.default_rng(0).normal(0, 1, (12, 12, 12)).astype(np.float32)
    truth, mask = np.zeros(image.shape, bool), np.zeros(image.shape, np.float32)
    truth[8:11, 3:6, 3:6] = True
    mask[7:11, 2:6, 3:7] = 0.9
    one = JudgedCrop(image, mask, truth, np.ones(3), "p 0.90, aneurysm")
    unknown = JudgedCrop(image, np.zeros_like(mask), None, np.ones(3), "p 0.10")
    figure = judged_crops_figure(
        {"Surest and right": [one, unknown], "Surest and wrong": [], "Other": [unknown]}
    )
    parts = figure.subfigs
    assert [part.get_suptitle() for part in parts] == ["Surest and right", "Other"]
    first = parts[0].axes[0]
    assert np.allclose(first.images[0].get_array(), image[9])  # the middle of the annotated sac
    assert first.get_title(loc="left") == "p 0.90, aneurysm"

    def colours(axes) -> list[tuple[float, ...]]:
        return [tuple(c.get_edgecolor()[0][:3]) for c in axes.collections if len(c.get_edgecolor())]

    assert colours(first) == [to_rgb(SKY), to_rgb(GREEN)]
    assert not colours(parts[0].axes[3])  # nothing predicted, nothing known
    assert png(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no candidate"):
        judged_crops_figure({"Surest and right": []})
