"""Wrong shapes are refused at the door, with what came and what is expected."""

from functools import partial

import pytest
import torch

from aneurysm.nets.expert import ExpertBatch, ExpertNet
from aneurysm.nets.fusion import CrossAttentionFusion, EarlyFusion, MeanFusion
from aneurysm.nets.metadata import FilmGate, MetadataGate
from aneurysm.nets.reconstruction import MaskedReconstruction
from aneurysm.nets.shapes import expect_divisible, expect_map, expect_rows
from aneurysm.nets.vessel_gat import VesselGat, VesselMlp
from aneurysm.nets.waveformer import WaveFormer, WaveFormerEncoder


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        ((1, 2, 3, 3), {"channels": 2}, "(b, 2, d, h, w)"),
        ((1, 3, 3, 3, 3), {"channels": 2}, "(b, 2, d, h, w)"),
        ((1, 2, 3, 0, 3), {"channels": 2}, "(b, 2, d, h, w) with at least one voxel"),
        ((1, 3, 3, 2, 3), {"channels": 2, "channels_last": True}, "(b, d, h, w, 2)"),
        ((5,), {"channels": None, "axes": None}, "(b, c, *space)"),
        ((1, 2, 3), {"channels": 2, "axes": 2}, "(b, 2, h, w)"),
    ],
)
def test_maps(shape, settings, expected):
    with pytest.raises(ValueError) as caught:
        expect_map("Part", torch.zeros(shape), **settings)
    assert f"Part: got a tensor of shape {shape}, expected {expected}" in str(caught.value)


def test_what_fits_passes():
    expect_map("Part", torch.zeros(1, 2, 3, 4, 5), 2)
    expect_map("Part", torch.zeros(1, 3, 4, 5, 2), 2, channels_last=True)
    expect_map("Part", torch.zeros(1, 7), None, axes=None)
    expect_rows("Part", torch.zeros(3, 2), 2, 3)
    expect_divisible("Part", (4, 6), (2, 3))
    with pytest.raises(ValueError, match=r"\(4, 6\) is no multiple of \(2, 4\)"):
        expect_divisible("Part", (4, 6), (2, 4))
    with pytest.raises(ValueError, match=r"got a tensor of shape \(3, 2\), expected \(4, 2\)"):
        expect_rows("Part", torch.zeros(3, 2), 2, 4)


def candidates() -> ExpertBatch:
    return ExpertBatch(
        image=torch.zeros(2, 4, 8, 8, 8),
        present=torch.ones(2, 4, dtype=torch.bool),
        vessel=torch.zeros(2, 1, 8, 8, 8),
        age=torch.full((2,), 50.0),
        sex=torch.zeros(2),
        position=torch.zeros(2, 3),
        graph=torch.zeros(2, 5),
        score=torch.full((2,), 0.5),
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("vessel", torch.zeros(2, 1, 8, 8, 6), r"\(vessel\).*expected \(2, 1, 8, 8, 8\)"),
        ("graph", torch.zeros(2, 4), r"\(graph\).*expected \(2, 5\)"),
        ("position", torch.zeros(3, 3), r"\(position\).*expected \(2, 3\)"),
        ("age", torch.full((3,), 50.0), r"\(age\).*expected \(2, 1\)"),
        ("present", torch.ones(1, 4, dtype=torch.bool), r"\(present\).*expected \(2, 4\)"),
    ],
)
def test_parts_of_a_batch_that_do_not_belong_together(name, value, expected):
    net = ExpertNet(
        WaveFormerEncoder(width=8, heads=(1, 2, 4, 8)),
        partial(CrossAttentionFusion, heads=2),
        graph_features=5,
    )
    batch = candidates()
    object.__setattr__(batch, name, value)  # past the type checks of the tests
    with pytest.raises(ValueError, match=expected):
        net(batch)


def test_networks_and_parts():
    wrong = torch.zeros(1, 2, 20, 20, 20)
    with pytest.raises(ValueError, match=r"expected \(b, 1, d, h, w\)"):
        WaveFormer(1, 1, 8, heads=(1, 2, 4, 8))(wrong)
    for gate in (MetadataGate(3), FilmGate(3)):
        with pytest.raises(ValueError, match=r"expected \(b, 3, d, h, w\)"):
            gate(wrong, torch.zeros(1, 8))
    for net in (VesselGat(4, 2), VesselMlp(4, 2)):
        with pytest.raises(ValueError, match=r"expected \(n, 4\)"):
            nodes = torch.zeros(3, 5)
            net(
                nodes,
                torch.zeros(2, 0, dtype=torch.long),
                torch.zeros(0, 2),
                torch.zeros(3, dtype=torch.long),
            )


@pytest.mark.parametrize("fusion", [MeanFusion, EarlyFusion, CrossAttentionFusion])
def test_every_fusion_wants_a_slot_per_modality_and_its_flags(fusion):
    with pytest.raises(ValueError, match="at least one voxel"):
        fusion(8)(torch.zeros(1, 4, 0, 2, 2), torch.ones(1, 4, dtype=torch.bool))


def test_reconstruction_wants_voxels():
    net = MaskedReconstruction(WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8)))
    with pytest.raises(ValueError, match="at least one voxel"):
        net(torch.zeros(0, 1, 8, 8, 8), torch.ones(0, 1, 1, 1, 1, dtype=torch.bool))
