from itertools import product

import pytest
import torch
from torch import nn

from aneurysm.nets.fusion import CrossAttentionFusion, EarlyFusion, MeanFusion

SUBSETS = [subset for subset in product([False, True], repeat=4) if any(subset)]
KINDS = {
    "cross": lambda width: CrossAttentionFusion(width, heads=2, token_grid=(2, 2, 2)),
    "early": EarlyFusion,
    "mean": MeanFusion,
}
fusions = pytest.mark.parametrize("kind", KINDS)


def _awake(kind: str, width: int = 8) -> nn.Module:
    """A fusion whose zero-started parts have left zero."""
    torch.manual_seed(0)
    fusion = KINDS[kind](width)
    with torch.no_grad():
        nn.init.normal_(fusion.vessel.conv.weight)
        if kind == "cross":
            nn.init.normal_(fusion.gate)
    return fusion


@fusions
def test_absent_slots_never_matter_for_any_subset(kind: str) -> None:
    fusion = _awake(kind)
    present = torch.tensor(SUBSETS)
    images = torch.randn(len(SUBSETS), 4, 8, 6, 10)
    vessel = torch.rand(len(SUBSETS), 1, 8, 6, 10)
    absent = ~present[:, :, None, None, None].expand_as(images)
    reference = fusion(images, present, vessel)
    assert reference.shape == (len(SUBSETS), 8, 4, 3, 5)
    assert reference.isfinite().all()
    for content in (0.0, torch.nan, torch.inf, 1e6):
        other = fusion(images.masked_fill(absent, content), present, vessel)
        torch.testing.assert_close(other, reference, atol=0, rtol=0)


@fusions
def test_rows_do_not_see_each_other(kind: str) -> None:
    fusion = _awake(kind)
    present = torch.tensor(SUBSETS)
    images = torch.randn(len(SUBSETS), 4, 6, 6, 6)
    together = fusion(images, present)
    for row in (0, 6, 14):
        alone = fusion(images[row : row + 1], present[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@fusions
def test_present_content_matters(kind: str) -> None:
    fusion = _awake(kind)
    present = torch.tensor([[True, False, True, True]])
    images = torch.randn(1, 4, 6, 6, 6)
    reference = fusion(images, present)
    for slot in (0, 2, 3):
        changed = images.clone()
        changed[0, slot] += 1
        assert not torch.allclose(fusion(changed, present), reference)


@fusions
def test_pretrained_stem_gives_the_pretrained_embedding_for_every_single_modality(kind: str) -> None:
    fusion = KINDS[kind](8)
    embed = nn.Conv3d(1, 8, 2, 2)
    fusion.load_stem(embed.state_dict())
    images = torch.randn(4, 4, 6, 8, 4)
    fused = fusion(images, torch.eye(4, dtype=torch.bool), torch.rand(4, 1, 6, 8, 4))
    expected = torch.cat([embed(images[i : i + 1, i : i + 1]) for i in range(4)])
    torch.testing.assert_close(fused, expected)  # also: gate and vessel stem start at zero


@fusions
def test_odd_sizes_round_up(kind: str) -> None:
    fused = KINDS[kind](8)(
        torch.randn(1, 4, 7, 9, 5), torch.ones(1, 4, dtype=torch.bool), torch.rand(1, 1, 7, 9, 5)
    )
    assert fused.shape == (1, 8, 4, 5, 3)


@fusions
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    fusion = _awake(kind)
    present = torch.tensor([[True, True, False, False], [False, False, True, True]])
    fusion(torch.randn(2, 4, 8, 8, 8), present, torch.rand(2, 1, 8, 8, 8)).square().mean().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@fusions
def test_a_modality_nobody_has_gets_a_zero_gradient_not_none(kind: str) -> None:
    fusion = _awake(kind)
    present = torch.tensor([[True, False, False, False]] * 2)
    images = torch.full((2, 4, 4, 4, 4), torch.nan)
    images[:, 0] = torch.randn(2, 4, 4, 4)
    fusion(images, present, torch.rand(2, 1, 4, 4, 4)).sum().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@fusions
def test_a_row_without_modality_is_refused_by_number(kind: str) -> None:
    present = torch.tensor([[True, False, False, False], [False] * 4])
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        KINDS[kind](8)(torch.randn(2, 4, 4, 4, 4), present)


@fusions
def test_a_stem_of_another_width_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"Conv3d\(1, 8, 2, 2\)"):
        KINDS[kind](8).load_stem(nn.Conv3d(1, 12, 2, 2).state_dict())


def test_mean_fusion_is_the_mean_of_the_stems() -> None:
    fusion = MeanFusion(4)
    images = torch.randn(1, 4, 4, 4, 4)
    stems = fusion.stems.stems
    expected = (stems[1](images[:, 1:2]) + stems[3](images[:, 3:4])) / 2
    torch.testing.assert_close(fusion(images, torch.tensor([[False, True, False, True]])), expected)


def test_attention_sees_the_other_modality_but_not_itself() -> None:
    """With one modality only the null token is visible, so what is added cannot depend on the image."""
    fusion = _awake("cross")
    images = torch.randn(2, 4, 8, 8, 8)
    alone = torch.tensor([[True, False, False, False]] * 2)
    added = fusion(images, alone) - fusion.stems.stems[0](images[:, :1])
    torch.testing.assert_close(added[0], added[1], atol=1e-5, rtol=1e-5)
    both = torch.tensor([[True, True, False, False]] * 2)
    stems = fusion.stems.stems
    added = fusion(images, both) - (stems[0](images[:, :1]) + stems[1](images[:, 1:2])) / 2
    assert (added[0] - added[1]).abs().max() > 1e-3


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        CrossAttentionFusion(10, heads=4)
