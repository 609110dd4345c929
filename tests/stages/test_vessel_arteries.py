"""The vessel stage with a channel for each artery: mirrored patches swap names, unknown ones do not count."""

import numpy as np
import pytest
import torch
from torch import nn

from aneurysm.data.augment import Augmentation
from aneurysm.data.errors import UserError
from aneurysm.data.labels import LOCATIONS, MIRRORED_LOCATION, UNNAMED_VESSEL, VESSEL_LABEL
from aneurysm.data.preparation.prepared import PreparedCase, save_prepared
from aneurysm.data.scan import Grid, Lesion
from aneurysm.losses.cldice import SkeletonRecallLoss
from aneurysm.losses.dice_ce import DiceCELoss
from aneurysm.losses.present import beside_of
from aneurysm.losses.weighted_sum import WeightedSum
from aneurysm.stages.sampling import Sampling
from aneurysm.stages.segmentation import PatchDataset
from aneurysm.stages.stored import read_labels, write_labels
from aneurysm.stages.vessel import (
    CLASSES,
    VesselData,
    VesselModule,
    artery_accuracy,
    names_arteries,
    vessels_and_names,
)
from aneurysm.stages.windows import Box, Region, View

SHAPE = (24, 24, 24)
OTHER = LOCATIONS.index("Basilar Tip")
LEFT, RIGHT = LOCATIONS.index("Left Middle Cerebral Artery"), LOCATIONS.index("Right Middle Cerebral Artery")
STILL = Augmentation(
    mirror_chance=0, affine_chance=0, gamma_chance=0, intensity_chance=0, blur_chance=0,
    low_resolution_chance=0, bias_chance=0, noise_chance=0,
)  # fmt: skip


def case_of(unnamed: bool = False, uid: str = "s") -> PreparedCase:
    """A left and a right artery along d; the right one carries a sac that the vessel labels leave out."""
    grid = Grid(SHAPE, np.diag([0.5, 0.5, 0.5, 1.0]))
    vessel = np.zeros(SHAPE, np.uint8)
    vessel[:, 10:13, 4:7], vessel[:, 10:13, 17:20] = VESSEL_LABEL[LEFT], VESSEL_LABEL[RIGHT]
    aneurysm = np.zeros(SHAPE, np.uint8)
    aneurysm[8:12, 13:16, 17:20] = 1
    if unnamed:
        vessel[vessel > 0] = UNNAMED_VESSEL
    lumen = (vessel > 0) | (aneurysm > 0)
    image = (3.0 * lumen + np.linspace(0, 1, SHAPE[2])).astype(np.float32)
    return PreparedCase(
        uid, "p", "CTA", image, grid, vessel, aneurysm, (Lesion(grid.to_mm([10, 14, 18]), 1.0, RIGHT),),
        50.0, "F", True, np.full(13, np.nan, np.float32), grid, -4.0,
    )  # fmt: skip


def data_of(tmp_path, augmentation: Augmentation = STILL, **settings) -> VesselData:
    paths = []
    for i, unnamed in enumerate(settings.pop("unnamed", [False])):
        paths.append(tmp_path / f"{i}.blosc2")
        save_prepared(case_of(unnamed, f"s{i}"), paths[-1])
    return VesselData(
        paths, [], patch=24, batch=2, steps=2, sampling=Sampling(vessel=0.0), seed=0, arteries=True,
        augmentation=augmentation, **settings,
    )  # fmt: skip


def test_targets_are_one_channel_for_lumen_and_one_for_each_artery(tmp_path):
    data = data_of(tmp_path)
    for i in range(4):
        image, target, known = PatchDataset(data, data.train_groups, 4, (0, 0), augment=True)[i]
        assert image.shape == (1, 24, 24, 24) and target.shape == (14, 24, 24, 24)
        assert known.shape == (14,) and known.all()
        lumen, arteries = target[0], target[1:]
        assert torch.equal(arteries.sum(0), lumen)  # every voxel has one name, those of the sac as well
        assert set(torch.nonzero(arteries.sum((1, 2, 3))).flatten().tolist()) <= {LEFT, RIGHT}


def test_a_mirrored_patch_has_the_names_of_the_other_side(tmp_path):
    mirrored = Augmentation(**{**vars(STILL), "mirror_chance": 1.0, "flip_chance": 1.0})
    plain, other = data_of(tmp_path), data_of(tmp_path, mirrored)
    assert other.augmentation.flip_chance == 0  # upside down, no artery has its name
    for i in range(4):
        (_, a, _), (_, b, _) = (
            PatchDataset(d, d.train_groups, 4, (0, 0), augment=True)[i] for d in (plain, other)
        )
        assert torch.equal(b[0], a[0].flip(2))
        assert torch.equal(b[1:], a[1:].flip(3)[list(MIRRORED_LOCATION)])


def test_vessels_without_names_are_lumen_of_an_unknown_artery(tmp_path):
    data = data_of(tmp_path, unnamed=[False, True])
    seen = set()
    for i in range(12):
        _, target, known = PatchDataset(data, data.train_groups, 12, (0, 0), augment=False)[i]
        assert known[0] and target[0].any()
        seen.add(bool(known[1]))
        assert bool(known[1:].all()) == bool(known[1:].any())
    assert seen == {False, True}
    with pytest.raises(UserError, match="give no artery a name"):
        data_of(tmp_path, unnamed=[True])


class Answer(nn.Module):
    """Gives what it is told, as a network under deep supervision would."""

    def __init__(self, *levels: torch.Tensor) -> None:
        super().__init__()
        self.levels = nn.ParameterList(levels)

    def forward(self, image):
        return [level + 0 for level in self.levels]


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize(
    "loss", [DiceCELoss(), WeightedSum({"a": SkeletonRecallLoss(), "b": SkeletonRecallLoss(dilations=2)}, {})]
)
def test_the_lumen_counts_as_much_as_all_arteries(tmp_path, loss, weight):
    data = data_of(tmp_path, unnamed=[False, True], beside=beside_of(loss))
    patches = PatchDataset(data, data.train_groups, 4, (0, 0), augment=True)
    batch = [torch.stack(parts) for parts in zip(*(patches[i] for i in range(4)), strict=True)]
    assert not batch[2].all() and batch[2].any(0).all()
    fine, coarse = torch.randn(4, 14, 24, 24, 24), torch.randn(4, 14, 12, 12, 12)
    module = VesselModule(Answer(fine, coarse), loss, 1e-3, 0.0, 1, artery_weight=weight)
    output = module.compare([fine, coarse], *batch[1:])
    _, target, known, *beside = batch
    first_of_each = [b[:, [0, 14]] for b in beside]  # a sum of two losses wants 14 channels for each of them
    others_of_each = [torch.cat([b[:, 1:14], b[:, 15:]], dim=1) for b in beside]
    lumen, names = (
        module.loss([fine[:, w], coarse[:, w]], target[:, w], known[:, w], *drawn)[0]
        for w, drawn in ((slice(0, 1), first_of_each), (slice(1, 14), others_of_each))
    )
    torch.testing.assert_close(output.loss, lumen + weight * names)
    first = "a" if isinstance(loss, WeightedSum) else "dice"
    assert {first, f"artery_{first}", "level_1", "artery_level_1"} <= set(output.terms)


class Sides(nn.Module):
    """Lumen where it is bright, of the left artery in the left half of its window and of the right one in the
    right half: what is upside down it calls a third artery."""

    def forward(self, image):
        out = torch.full((len(image), 14, *image.shape[2:]), -8.0)
        out[:, :1] = 8 * (image > 2).float() - 4
        half = image.shape[-1] // 2
        out[:, 1 + LEFT, ..., :half] = 4.0
        out[:, 1 + RIGHT, ..., half:] = 4.0
        sac = (image[:, 0] > 2).sum((1, 3))  # (b, h) the sac lies behind both arteries
        upside = sac[:, :12].sum(1) > sac[:, 12:].sum(1)
        out[~upside, 1 + OTHER] = 40.0
        return out


def test_flipped_looks_agree_about_names():
    case = case_of()
    net = Sides()
    net.anchor = nn.Parameter(torch.zeros(()))
    for flips in ((), ("w",), ("d", "h", "w")):
        lumen, labels = vessels_and_names([net, net], case, View(24, 0.0, flips), arteries=True)
        assert lumen.shape == SHAPE and lumen.dtype == np.float16 and labels.dtype == np.uint8
        np.testing.assert_array_equal(lumen > 0.5, case.image > 2)
        assert set(np.unique(labels)) == {0, VESSEL_LABEL[LEFT], VESSEL_LABEL[RIGHT]}
        assert artery_accuracy(labels, case) == 1.0
    assert np.isnan(artery_accuracy(labels, case_of(unnamed=True)))
    swapped = np.where(labels == VESSEL_LABEL[LEFT], VESSEL_LABEL[RIGHT], labels)
    assert 0.3 < artery_accuracy(swapped, case) < 0.7


@pytest.mark.parametrize("exact", [True, False])
def test_a_region_is_named_as_in_the_whole_scan(exact: bool):
    net = nn.Conv3d(1, 14, 1)  # sees single voxels: windows make no difference
    view, box = View(8, 0.5, ("d", "h", "w")), Box((3, 9, 15), (12, 18, 21))
    whole, names = vessels_and_names([net], case_of(), view, arteries=True)
    lumen, labels = vessels_and_names([net], case_of(), view, arteries=True, region=Region(box, exact))
    np.testing.assert_allclose(lumen[box.slices], whole[box.slices], atol=1e-3)  # a step of float16
    np.testing.assert_array_equal(labels[box.slices], names[box.slices])
    lumen[box.slices] = 0
    assert not lumen.any() and labels.any()


def test_without_names_there_are_none():
    class Lumen(nn.Conv3d):
        pass

    net = Lumen(1, 1, 1)
    lumen, labels = vessels_and_names([net], case_of(), View(24, 0.0, ("w",)), arteries=False)
    assert labels is None and lumen.shape == SHAPE


def test_labels_are_kept(tmp_path):
    labels = np.random.default_rng(0).integers(0, 14, SHAPE).astype(np.uint8)
    write_labels(tmp_path / "arteries" / "s.blosc2", labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "arteries" / "s.blosc2"), labels)
    with pytest.raises(UserError, match="force=true"):
        read_labels(tmp_path / "none.blosc2")


def test_classes_are_two():
    assert CLASSES == {"binary": 1, "arteries": 14}
    assert names_arteries("arteries") and not names_arteries("binary")
    with pytest.raises(UserError, match=r"vessel\.classes=13: it is one of binary, arteries"):
        names_arteries("13")
