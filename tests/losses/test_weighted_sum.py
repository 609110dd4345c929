"""Sums of losses, and losses on several levels."""

import hydra
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aneurysm.build import build
from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.losses.cbdice import CbDiceLoss
from aneurysm.losses.cldice import ClDiceLoss, SkeletonRecallLoss
from aneurysm.losses.deep_supervision import DeepSupervision
from aneurysm.losses.dice_ce import DiceCELoss
from aneurysm.losses.present import beside_of
from aneurysm.losses.tversky import TverskyLoss
from aneurysm.losses.weighted_sum import WeightedSum


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.zeros(2, 2, size, size, size)
    target[0, 0, :, 5:8, 5:8] = 1
    target[1, :, 3:5, :, 6:8] = 1
    return torch.randn(target.shape, generator=torch.Generator().manual_seed(0)) + 2 * target, target


def drawn(loss, target: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack([beside_of(loss)(scan.numpy()) for scan in target]))


def test_a_sum_is_the_sum_and_names_its_parts():
    logits, target = batch()
    parts = {"recall": TverskyLoss(ce_weight=2.0), "line": ClDiceLoss(share=1.0), "bare": TverskyLoss()}
    total, terms = WeightedSum(parts, {"recall": 0.5, "line": 2.0})(logits, target)
    values = {name: part(logits, target)[0] for name, part in parts.items()}
    torch.testing.assert_close(total, 0.5 * values["recall"] + 2 * values["line"] + values["bare"])
    assert {"recall", "recall_tversky", "recall_ce", "line", "line_dice", "line_cldice", "bare"} == set(terms)
    torch.testing.assert_close(terms["line"], terms["line_cldice"])


def test_what_parts_want_drawn_reaches_each_of_them():
    logits, target = batch()
    parts = {"a": SkeletonRecallLoss(dilations=0), "b": TverskyLoss(), "c": SkeletonRecallLoss(dilations=2)}
    both = WeightedSum(parts, {})
    assert beside_of(WeightedSum({"b": TverskyLoss()}, {})) is None
    beside = drawn(both, target)
    assert beside.shape == (2, 4, 16, 16, 16)
    valid = torch.tensor([[True, False], [True, True]])
    torch.testing.assert_close(both(logits, target, valid, beside)[1], both(logits, target, valid)[1])
    assert not torch.equal(beside[:, :2], beside[:, 2:])


def test_nonsense_sums_are_refused():
    for parts, weights, said in (
        ({}, {}, "at least one part"),
        ({"a": TverskyLoss()}, {"b": 1.0}, "weights for b, but its parts are a"),
        ({"a": TverskyLoss()}, {"a": 0.0}, "not all 0"),
        ({"a": TverskyLoss()}, {"a": -1.0}, "must be >= 0"),
    ):
        with pytest.raises(ValueError, match=said):
            WeightedSum(parts, weights)


def composed(*overrides: str):
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return build(hydra.compose("train", overrides=["loss=sum", *overrides]).loss)


def test_parts_are_composed_on_the_command_line():
    assert composed().weights == {"tversky": 1.0, "skeleton_recall": 1.0}
    more = composed(
        "+loss@loss.parts.cbdice=cbdice", "+loss.weights.cbdice=0.5", "loss.parts.tversky.ce_weight=0.0"
    )
    assert isinstance(more.parts["cbdice"], CbDiceLoss) and more.weights["cbdice"] == 0.5
    assert more.parts["tversky"].ce_weight == 0
    less = composed("~loss@loss.parts.skeleton_recall", "~loss.weights.skeleton_recall")
    assert list(less.parts) == ["tversky"]
    assert isinstance(composed("loss@loss.parts.tversky=dice_ce").parts["tversky"], DiceCELoss)


@pytest.mark.parametrize("option", sorted(p.stem for p in (config_folder() / "loss").glob("*.yaml")))
def test_every_option_of_a_loss_is_in_its_file(option):
    """All of the constructor's, with the values that the constructor itself has, or the file says why not."""
    import inspect

    from hydra.utils import get_class

    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        node = dict(hydra.compose("train", overrides=[f"loss={option}"]).loss)
    arguments = inspect.signature(get_class(node.pop("_target_"))).parameters
    missing = set(arguments) - set(node)
    # FocalTversky has no cross entropy to weigh
    assert not missing, missing


# --- several levels


def test_the_mean_over_levels_is_nnunets():
    logits, target = batch()
    levels = [logits, torch.randn(2, 2, 8, 8, 8), torch.randn(2, 2, 4, 4, 4)]
    plain = DiceCELoss()
    total, terms = DeepSupervision(plain)(levels, target)
    values = [
        plain(level, F.max_pool3d(target, 16 // level.shape[-1]))[0] for level in levels
    ]  # a block with any vessel is vessel
    torch.testing.assert_close(total, (values[0] + values[1] / 2 + values[2] / 4) / 1.75)
    torch.testing.assert_close([terms["level_1"], terms["level_2"]], values[1:])
    torch.testing.assert_close(terms["dice"], plain(logits, target)[1]["dice"])


def test_one_level_is_the_loss_itself():
    logits, target = batch()
    for loss in (TverskyLoss(), SkeletonRecallLoss()):
        for answer in (logits, [logits]):
            total, terms = DeepSupervision(loss)(answer, target)
            torch.testing.assert_close((total, terms), loss(logits, target))


def test_a_vessel_of_one_voxel_is_whole_at_every_level():
    """Every second voxel, as nearest-neighbour sampling takes, would miss it altogether."""
    target = torch.zeros(1, 1, 16, 16, 16)
    target[..., 5, 7] = 1
    assert target[:, :, ::2, ::2, ::2].sum() == 0
    for size in (8, 4):
        truth = torch.zeros(1, 1, size, size, size)
        truth[..., 5 * size // 16, 7 * size // 16] = 1
        found = DeepSupervision(DiceCELoss())([20 * target - 10, 20 * truth - 10], target)[1]["level_1"]
        assert float(found) < 0.05


def test_unknown_channels_and_drawn_tubes_reach_coarse_levels():
    logits, target = batch()
    loss = DeepSupervision(SkeletonRecallLoss())
    valid = torch.tensor([[True, False], [True, True]])
    unknown = target.clone()
    unknown[0, 1] = torch.nan
    coarse = torch.randn(2, 2, 8, 8, 8, requires_grad=True)
    total, terms = loss([logits, coarse], unknown, valid, drawn(loss, target))
    assert torch.isfinite(total)
    total.backward()
    assert (
        coarse.grad is not None and coarse.grad[0, 1].abs().max() == 0 and coarse.grad[0, 0].abs().max() > 0
    )
    torch.testing.assert_close(terms, loss([logits, coarse], target, valid, drawn(loss, target))[1])


def test_levels_may_be_coarser_along_some_axes_only():
    logits, target = batch()
    total, _ = DeepSupervision(DiceCELoss())([logits, torch.zeros(2, 2, 16, 8, 4)], target)
    assert torch.isfinite(total)


def test_sizes_that_do_not_divide_are_refused():
    logits, target = batch()
    with pytest.raises(UserError, match=r"\(5, 8, 8\), which does not divide it"):
        DeepSupervision(DiceCELoss())([logits, torch.zeros(2, 2, 5, 8, 8)], target)
