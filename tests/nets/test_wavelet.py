import json

import numpy as np
import pytest
import torch

from aneurysm.nets.wavelet import (
    BANDS,
    LOW_GAIN,
    haar_analysis,
    haar_decompose,
    haar_low,
    haar_reconstruct,
    haar_replace_low,
    haar_synthesis,
)


def test_golden_three_levels(golden):
    data = np.load(golden / "waveformer_dwt3.npz")
    assert "coarsest" in json.loads(str(data["meta"]))["desc"]
    x = torch.from_numpy(data["x"])
    low, details = haar_decompose(x, 3)
    np.testing.assert_allclose(low.numpy(), data["lll"], atol=1e-10)
    for level, high in enumerate(details):
        for k, band in enumerate(BANDS):
            np.testing.assert_allclose(high[:, k].numpy(), data[f"hf{level}_{band}"], atol=1e-10)
    np.testing.assert_allclose(haar_reconstruct(low, details).numpy(), data["rec"], atol=1e-10)


def test_one_cell_by_hand():
    x = torch.arange(8, dtype=torch.float64).reshape(1, 1, 2, 2, 2)
    low, high = haar_analysis(x)
    assert low.item() == pytest.approx(28 / LOW_GAIN)
    # value = 4 d + 2 h + w, so only the three single-detail bands are non-zero: -4*4, -4*2, -4*1 over 2
    # sqrt 2
    expected = {"aad": -4.0, "ada": -8.0, "daa": -16.0}
    for band, value in zip(BANDS, high.flatten().tolist(), strict=True):
        assert value == pytest.approx(expected.get(band, 0.0) / LOW_GAIN)


@pytest.mark.parametrize("size", [(16, 16, 16), (7, 8, 9), (5, 12, 3), (1, 2, 11)])
def test_perfect_reconstruction_of_any_size(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    low, details = haar_decompose(x, 3)
    assert low.shape[2:] == tuple(-(-n // 8) for n in size)
    torch.testing.assert_close(haar_reconstruct(low, details, size), x, atol=1e-12, rtol=0)


def test_energy_is_kept_and_gradient_is_the_transpose():
    x = torch.randn(1, 2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    low, high = haar_analysis(x)
    energy = (low**2).sum() + (high**2).sum()
    torch.testing.assert_close(energy, (x**2).sum())
    (energy / 2).backward()
    torch.testing.assert_close(x.grad, x.detach())


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_low_band_shortcut(levels):
    x = torch.randn(1, 2, 8, 16, 24, dtype=torch.float64)
    low, _ = haar_decompose(x, levels)
    every_axis = (levels,) * 3
    torch.testing.assert_close(haar_low(x, every_axis, normalise=False), low)
    torch.testing.assert_close(haar_low(x, every_axis, normalise=True), low / LOW_GAIN**levels)


def test_low_band_of_a_flat_volume_with_uneven_levels():
    constant = torch.full((1, 1, 7, 9, 10), 3.0)
    low = haar_low(constant, (0, 1, 3), normalise=True)
    torch.testing.assert_close(low, torch.full((1, 1, 7, 5, 2), 3.0))
    torch.testing.assert_close(haar_low(constant, (0, 1, 3), normalise=False), low * 2.0**2)


def test_wrong_size_is_explained():
    low, high = haar_analysis(torch.randn(1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match="expected 2n or 2n-1"):
        haar_synthesis(low, high, (7, 4, 4))


@pytest.mark.parametrize("size", [(8, 8, 16), (6, 7, 9), (5, 12, 3), (1, 2, 11)])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_replaced_low_band_is_the_long_way_round(size, levels):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    own, details = haar_decompose(x, levels)
    low = torch.randn_like(own)
    expected = haar_reconstruct(low, details, size) if levels else low
    torch.testing.assert_close(haar_replace_low(x, low, levels), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(4, 6, 8), (5, 3, 7)])
def test_memory_layout_changes_nothing_and_is_kept(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    twin = x.contiguous(memory_format=torch.channels_last_3d)
    low, details = haar_decompose(x, 2)
    low2, details2 = haar_decompose(twin, 2)
    torch.testing.assert_close(low2, low)
    for high, high2 in zip(details, details2, strict=True):
        torch.testing.assert_close(high2, high)
        assert high2.stride(2) == 1
    back = haar_reconstruct(low2, details2, size)
    assert back.stride(1) == 1
    torch.testing.assert_close(back, x)


def test_constant_without_details_stays_constant():
    low = torch.full((1, 2, 2, 1, 3), LOW_GAIN**2)
    details = [torch.zeros(1, 7, 2, 2, 1, 3), torch.zeros(1, 7, 2, 4, 2, 6)]
    torch.testing.assert_close(haar_reconstruct(low, details, (7, 3, 12)), torch.ones(1, 2, 7, 3, 12))


def test_shape_errors_teach():
    x = torch.randn(1, 2, 4, 4, 4)
    low, high = haar_analysis(x)
    with pytest.raises(ValueError, match=r"expected \(1, 7, 2, 2, 2, 2\)"):
        haar_synthesis(low, high[:, :6])
    with pytest.raises(ValueError, match=r"expected \(1, 7, 2, 2, 2, 2\)"):
        haar_reconstruct(low, [torch.zeros(1, 7, 2, 4, 4, 4)])
    with pytest.raises(ValueError, match=r"for 2 level\(s\), expected \(1, 2, 1, 1, 1\)"):
        haar_replace_low(x, low, 2)
    with pytest.raises(ValueError, match="-1 levels"):
        haar_decompose(x, -1)
    with pytest.raises(ValueError, match="three numbers"):
        haar_low(x, (1, 1), normalise=True)
    with pytest.raises(ValueError, match="at least one voxel"):
        haar_analysis(torch.zeros(1, 2, 0, 4, 4))
