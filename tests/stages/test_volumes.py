"""Whole volumes seen through windows: nothing is shifted, flips are undone."""

import numpy as np
import pytest
import torch
from torch import nn

from aneurysm.stages.volumes import View, probability_volume


class Shifted(nn.Module):
    """A net with a bias: it answers with what lies one voxel further along w."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(x, -1, dims=-1)


def test_flips_are_undone_and_cancel_a_bias():
    volume = np.full((1, 8, 8, 8), -20, np.float32)
    volume[0, 4, 5, 3] = 20
    plain = probability_volume(Shifted(), volume, View(8, 0.0))[0]
    assert plain.shape == (8, 8, 8) and np.argwhere(plain > 0.5).tolist() == [[4, 5, 2]]
    both = probability_volume(Shifted(), volume, View(8, 0.0, ("w",)))[0]
    # float16 has steps of 5e-4 below 1.
    np.testing.assert_allclose(both[4, 5, [2, 4]], 0.5, atol=5e-4)  # to either side of the truth alike
    three = probability_volume(Shifted(), volume, View(8, 0.0, ("d", "h")))[0]
    np.testing.assert_allclose(three, plain, atol=5e-4)  # these two change nothing for this net


def test_windows_of_any_size_give_the_same_for_a_local_net():
    torch.manual_seed(0)
    net = nn.Conv3d(1, 2, 1)
    volume = np.random.default_rng(0).normal(size=(1, 11, 9, 13)).astype(np.float32)
    whole = probability_volume(net, volume, View(16, 0.0))
    assert whole.shape == (2, 11, 9, 13)
    np.testing.assert_allclose(probability_volume(net, volume, View(4, 0.5, ("h",))), whole, atol=5e-4)


def test_wrong_views():
    with pytest.raises(ValueError, match="not x"):
        View(8, 0.0, ("x",))
    with pytest.raises(ValueError, match="overlap"):
        View(8, 1.0)
