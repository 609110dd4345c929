"""All hysteresis rules in one pass: the counts of the masks that the rules really make."""

import numpy as np
import pytest
from scipy import ndimage

from aneurysm.data.scan import Grid
from aneurysm.vessels.hysteresis import CORES, LEVELS, LOWEST, count_rules
from aneurysm.vessels.lumen_rule import LumenRule

GRID = Grid((24, 30, 28), np.diag([0.9, 0.7, 0.8, 1.0])[[2, 1, 0, 3]])


def noisy_scan(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random probabilities with many pieces, and a random truth; steps of 1/255 as stored."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=GRID.shape), 1.3)
    probability = np.clip(0.25 + smooth / smooth.std() * 0.35, 0, 1)
    truth = ndimage.gaussian_filter(rng.normal(size=GRID.shape), 1.3) > 0.1
    return (np.round(probability * LEVELS) / LEVELS).astype(np.float32), truth


@pytest.mark.parametrize("seed", [0, 1])
def test_counts_are_those_of_the_masks(seed):
    probability, truth = noisy_scan(seed)
    counts = count_rules(probability, truth, GRID)
    assert counts.lumen == truth.sum()
    dropped = 0
    for c, core in enumerate(CORES):
        for level in (LOWEST, 10, 51, 100, 128, 180, 203, 240):
            mask = LumenRule(level / LEVELS, core / LEVELS)(probability, GRID)
            assert (counts.marked[c, level], counts.hits[c, level]) == (mask.sum(), (mask & truth).sum())
            dropped += (probability >= level / LEVELS).sum() > mask.sum()
    assert dropped  # some pieces really lacked a core
    np.testing.assert_allclose(counts.recall[0, 51], counts.hits[0, 51] / truth.sum())


def test_probabilities_off_the_stored_steps_count_like_in_the_rule():
    probability, truth = noisy_scan(2)
    probability = np.clip(probability + np.float32(0.0017), 0, 1)
    counts = count_rules(probability, truth, GRID)
    for level in (40, 90):
        assert (
            counts.marked[2, level] == LumenRule(level / LEVELS, CORES[2] / LEVELS)(probability, GRID).sum()
        )


def test_flips_and_axis_orders_change_nothing():
    probability, truth = noisy_scan(3)
    usual = count_rules(probability, truth, GRID)
    turned = count_rules(
        probability[::-1, :, ::-1].transpose(2, 0, 1),
        truth[::-1, :, ::-1].transpose(2, 0, 1),
        Grid((28, 24, 30), GRID.affine),
    )
    np.testing.assert_array_equal(usual.marked, turned.marked)
    np.testing.assert_array_equal(usual.hits, turned.hits)


def test_nothing_to_count():
    nothing = count_rules(np.zeros(GRID.shape, np.float32), np.zeros(GRID.shape, bool), GRID)
    assert not nothing.marked.any() and np.isnan(nothing.recall).all() and np.isnan(nothing.dice).all()
    with pytest.raises(ValueError, match="do not lie on the grid"):
        count_rules(np.zeros((2, 2, 2), np.float32), np.zeros(GRID.shape, bool), GRID)
