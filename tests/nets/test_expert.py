from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aneurysm.nets.expert import (
    ExpertBatch,
    ExpertNet,
    RunningScale,
    centre_pool,
    expected_place,
    mask_evidence,
)
from aneurysm.nets.fusion import CrossAttentionFusion, EarlyFusion, MeanFusion
from aneurysm.nets.metadata import FilmGate, MetadataGate
from aneurysm.nets.oscillators import Oscillators, akorn, itrsa
from aneurysm.nets.waveformer import WaveFormerEncoder
from aneurysm.physics.flow_points import FlowPoints, collate_flow, no_flow
from aneurysm.physics.flow_sampling import sample_flow_points
from aneurysm.physics.head import PhysicsHead

NAN = float("nan")


@dataclass(frozen=True)
class _Points:
    value: Tensor

    def to(self, device: torch.device | str) -> "_Points":
        return _Points(self.value.to(device))


@dataclass(frozen=True)
class _Reading:
    total: Tensor
    loss: Tensor
    residual_log10: Tensor
    features: Tensor
    valid: Tensor
    driven: Tensor


class _Physics(nn.Module):
    """Stands in for the flow: a quadratic form of the latent, with features over many decades."""

    latent_dim, feature_count = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, latent: Tensor, flow: _Points, progress: float) -> _Reading:
        features = (latent @ self.weight) * torch.tensor([1e-3, 1.0, 1e5])
        valid = flow.value > 0
        features = torch.where(valid[:, None], features, torch.nan)
        loss = (latent**2).sum(1)
        seen = loss.detach()
        return _Reading(torch.log1p(loss[valid]).sum(), seen, seen.log10(), features, valid, valid)


OSCILLATORS = akorn(
    oscillator_dim=4, oscillator_channels=32, grid=4, alpha=0.1
)  # an open gate from the start


def _backbone(oscillators: Oscillators | None = None) -> WaveFormerEncoder:
    return WaveFormerEncoder(width=12, heads=(1, 2, 4, 8), oscillators=oscillators)


def _net(
    physics: nn.Module | None = None, oscillators: Oscillators | None = OSCILLATORS, **changes: object
) -> ExpertNet:
    torch.manual_seed(0)
    parts = {
        "fusion": partial(CrossAttentionFusion, heads=2),
        "metadata": partial(MetadataGate, dropout=0.0),
        "physics": physics,
        "graph_features": 5,
        "head_width": 16,
        "decoder_width": 8,
        "dropout": 0.0,
    }
    return ExpertNet(_backbone(oscillators), **(parts | changes))


def _batch(b: int = 4, crop: tuple[int, int, int] = (32, 32, 32)) -> ExpertBatch:
    torch.manual_seed(1)
    present = torch.eye(4, dtype=torch.bool)[torch.arange(b) % 4]
    present[0, 2] = True
    image = torch.randn(b, 4, *crop).masked_fill(~present[:, :, None, None, None], torch.nan)
    return ExpertBatch(
        image=image,
        present=present,
        vessel=torch.rand(b, 1, *crop),
        age=torch.tensor([50.0, NAN, 70.0, 33.0])[:b],
        sex=torch.tensor([0.0, 1.0, NAN, 1.0])[:b],
        position=torch.tensor([[0.1, 0.2, 0.3], [NAN, NAN, NAN], [1, 0, 0], [0, 1, -1]])[:b],
        graph=torch.tensor([[0.1, NAN, 3.0, 1.0, 0.0]]).repeat(b, 1) + torch.arange(b)[:, None],
        score=torch.tensor([0.1, 0.9, NAN, 0.5])[:b],
        flow=_Points(torch.tensor([1.0, 1.0, 0.0, 1.0])[:b]),
    )


@pytest.mark.parametrize("crop", [(32, 32, 32), (24, 32, 40), (17, 16, 19)])
def test_shapes_ranges_and_no_nan_from_what_is_absent(crop: tuple[int, int, int]) -> None:
    batch = _batch(crop=crop)
    out = _net(_Physics())(batch)
    assert out.logit.shape == (4,) and out.location_logits.shape == (4, 13)
    assert out.mask_logit.shape == (4, 1, *crop) and out.offset_mm.shape == (4, 3)
    assert out.embedding.shape == (4, 16)
    assert (out.offset_mm.abs() <= 10).all()
    assert ((out.order_parameter >= 0) & (out.order_parameter <= 1)).all()
    for value in (out.logit, out.location_logits, out.mask_logit, out.offset_mm, out.embedding):
        assert value.isfinite().all()


def _loss(out) -> Tensor:
    loss = out.logit.square().mean() + out.location_logits.square().mean() + out.mask_logit.square().mean()
    loss = loss + out.offset_mm.square().mean()
    return loss if out.physics is None else loss + out.physics.total


@pytest.mark.parametrize("physics", [_Physics, lambda: None])
def test_every_trainable_parameter_gets_a_finite_gradient(physics: Callable[[], nn.Module | None]) -> None:
    net = _net(physics())
    with torch.no_grad():  # leave the zero starts, behind which nothing can get a gradient yet
        for layer in (net.fusion.vessel.conv, net.metadata.gate):
            nn.init.normal_(layer.weight, std=0.1)
        nn.init.normal_(net.fusion.gate)
        if net.physics is not None:
            nn.init.normal_(net.from_flow.weight)
    _loss(net(_batch())).backward()
    for name, parameter in net.named_parameters():
        if name.startswith("backbone.patch_embed"):
            assert not parameter.requires_grad
        elif name == "physics.weight":
            assert parameter.grad is None  # only the detached features read it here
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_physics_changes_nothing_at_the_start_and_its_features_are_detached() -> None:
    net, batch = _net(_Physics()).eval(), _batch(crop=(16, 16, 16))
    with_flow, without = net(batch), net(replace(batch, flow=None))
    assert without.physics is None and with_flow.physics is not None
    torch.testing.assert_close(with_flow.logit, without.logit)
    nn.init.normal_(net.from_flow.weight)
    out = net(batch)
    changed = (out.logit - without.logit).abs() > 1e-4
    assert changed.tolist() == [True, True, False, True]  # the third candidate's flow is not valid
    out.logit.sum().backward()
    assert net.to_latent.weight.grad is None
    net(batch).physics.total.backward()
    assert net.to_latent.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("fusion", [partial(CrossAttentionFusion, heads=2), EarlyFusion, MeanFusion])
@pytest.mark.parametrize(
    "oscillators", [None, akorn(connectivity="conv", grid=4, strides=[4, 8]), itrsa(grid=4)]
)
@pytest.mark.parametrize("metadata", [None, FilmGate])
def test_parts_can_be_swapped_or_left_out(fusion, oscillators, metadata) -> None:
    net = _net(fusion=fusion, oscillators=oscillators, metadata=metadata)
    out = net(_batch(2, (16, 16, 16)))
    kuramoto = oscillators is not None and oscillators.strides == (4, 8)
    assert len(out.oscillators) == (2 if kuramoto else 0)
    assert out.order_parameter.isnan().all().item() is not kuramoto
    assert out.logit.isfinite().all()


@pytest.mark.parametrize("oscillator_dim", [2, 3, 8])
def test_oscillator_dimensions(oscillator_dim: int) -> None:
    out = _net(oscillators=akorn(oscillator_dim=oscillator_dim))(_batch(2, (16, 16, 16)))
    (state,) = out.oscillators
    assert state.order_per_group.shape == (2, state.x.shape[1] // oscillator_dim)
    torch.testing.assert_close(out.order_parameter, state.synchrony)


def _tube() -> FlowPoints:
    """A straight vessel of 3 mm radius through a crop of 32^3 voxels of 0.5 mm."""
    _, h, w = np.meshgrid(*[(np.arange(32) - 15.5) * 0.5] * 3, indexing="ij")
    along = np.linspace(-6, 6, 13)
    return sample_flow_points(
        (h**2 + w**2 < 9).astype(np.float64),
        np.full(3, 0.5),
        np.stack((along, 0 * along, 0 * along), axis=1),
        np.tile([1.0, 0.0, 0.0], (13, 1)),
        np.full(13, 3.0),
        rng=np.random.default_rng(0),
    )


def test_the_navier_stokes_head_fits_in() -> None:
    net = _net(PhysicsHead(latent_dim=8, width=8, depth=2, points=32))
    nn.init.normal_(net.from_flow.weight)
    batch = replace(_batch(3, (16, 16, 16)), flow=collate_flow([_tube(), no_flow(), _tube()]))
    out = net(batch, progress=0.5)
    assert out.physics.valid.tolist() == [True, False, True]
    (out.logit.sum() + out.physics.total).backward()
    for module in (net.physics, net.to_latent, net.from_flow):
        gradients = [p.grad for p in module.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert any(g.abs().sum() > 0 for g in gradients)
    with torch.inference_mode():
        assert net.eval()(batch).logit.isfinite().all()


def test_absent_slots_do_not_matter() -> None:
    net, batch = _net().eval(), _batch()
    absent = ~batch.present[:, :, None, None, None]
    other = replace(batch, image=batch.image.masked_fill(absent, 7.0))
    torch.testing.assert_close(net(batch).logit, net(other).logit, atol=0, rtol=0)


def test_pretrained_backbone_also_starts_the_stems() -> None:
    pretrained = _backbone()
    net = _net(metadata=None).eval()
    before = {k: v.clone() for k, v in net.backbone.state_dict().items() if ".oscillator." in k}
    net.load_pretrained(pretrained.state_dict())
    for name, value in before.items():  # nobody trained the oscillators before
        torch.testing.assert_close(net.backbone.state_dict()[name], value)
    for state in net.backbone.stages[2][-1].oscillator.parameters():
        nn.init.zeros_(state)
    batch = _batch()
    image = torch.where(batch.image.isnan(), 0.0, batch.image)
    fused = net.fusion(batch.image, batch.present, batch.vessel)
    torch.testing.assert_close(fused[1:2], pretrained.patch_embed(image[1:2, 1:2]))
    torch.testing.assert_close(net.backbone.encode(fused).maps[2][1:2], pretrained(image[1:2, 1:2])[2])


def test_answers_are_in_single_precision_under_autocast() -> None:
    net, batch = _net(), _batch(2, (16, 16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(batch)
    for value in (out.logit, out.location_logits, out.mask_logit, out.offset_mm, out.order_parameter):
        assert value.dtype == torch.float32 and value.isfinite().all()
    torch.testing.assert_close(out.logit, net(batch).logit, atol=0.1, rtol=0.1)


def test_batch_moves_as_one() -> None:
    batch = _batch().to("meta")
    assert batch.image.device.type == batch.graph.device.type == batch.flow.value.device.type == "meta"


def test_unknown_stride_is_explained() -> None:
    with pytest.raises(ValueError, match=r"strides \[2, 4, 8, 16\]"):
        _net(oscillators=akorn(strides=[32]))


def test_an_answer_does_not_depend_on_the_neighbours_in_the_batch() -> None:
    net, batch = _net().train(), _batch(4)
    for _ in range(3):
        net(batch)  # moves the running statistics
    net.eval()
    together = net(batch).logit
    for row in range(4):
        values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "flow"}
        alone = replace(batch, **{name: v[row : row + 1] for name, v in values.items()}, flow=None)
        torch.testing.assert_close(net(alone).logit, together[row : row + 1], atol=1e-4, rtol=1e-4)
    net.train()(_batch(1))  # a batch of one can be trained on


def test_training_starts_from_the_score_of_the_proposing_stage() -> None:
    net, batch = _net().eval(), _batch()
    logit = net(batch).logit
    expected = torch.tensor([-2.197, 2.197, 0.0, 0.0])  # log odds of 0.1, 0.9, unknown and 0.5
    torch.testing.assert_close(logit, expected, atol=0.2, rtol=0)
    sure = net(replace(batch, score=torch.tensor([0.0, 1.0, NAN, 0.5]))).logit
    assert sure.isfinite().all() and sure[0] < logit[0] and sure[1] > logit[1]


def test_mask_evidence_is_about_the_middle() -> None:
    nothing = torch.full((1, 1, 32, 32, 32), -8.0)
    middle, corner, speck = nothing.clone(), nothing.clone(), nothing.clone()
    middle[..., 14:18, 14:18, 14:18] = 4
    corner[..., :4, :4, :4] = 4
    speck[..., 16, 16, 16] = 4
    quiet, sac, elsewhere, one = (mask_evidence(m, 6.0)[0] for m in (nothing, middle, corner, speck))
    assert sac[0] > 0.9 and elsewhere[0] < 0 and one[0] < 0
    assert sac[1] > elsewhere[1] > quiet[1] - 1e-3
    torch.testing.assert_close(sac[2], elsewhere[2])
    assert sac[2] > one[2] > quiet[2]


def test_centre_pool_is_the_mean_of_a_constant_and_finds_the_centre() -> None:
    torch.testing.assert_close(
        centre_pool(torch.full((1, 2, 4, 6, 8), 3.0), (16, 24, 32), 6.0), torch.full((1, 2), 3.0)
    )
    middle, corner = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    middle[..., 3:5, 3:5, 3:5], corner[..., :2, :2, :2] = 1, 1
    assert centre_pool(middle, (32, 32, 32), 6.0) > 50 * centre_pool(corner, (32, 32, 32), 6.0)


def test_expected_place_is_in_xyz_voxels_of_the_crop() -> None:
    score = torch.full((1, 1, 4, 6, 8), -1e4)
    score[0, 0, 3, 0, 5] = 0  # stride-2 map of an 8 x 12 x 16 crop: cell middles at 2 i + 0.5 voxels
    d, h, w = 6.5 - 3.5, 0.5 - 5.5, 10.5 - 7.5
    torch.testing.assert_close(expected_place(score, (8, 12, 16)), torch.tensor([[w, h, d]]))


def test_running_scale_standardises_valid_rows_and_keeps_the_rest_at_zero() -> None:
    torch.manual_seed(0)
    scale = RunningScale(2)
    spread = torch.tensor([1e-4, 1e4])
    valid = torch.ones(64, dtype=torch.bool)
    for _ in range(60):
        scale((torch.randn(64, 2) + 3) * spread, valid)
    scale.eval()
    x = (torch.randn(64, 2) + 3) * spread
    out = scale(x, valid)
    assert out[:, 1].mean().abs() < 0.5 and 0.7 < out[:, 1].std() < 1.3
    x[0, 0], valid[1] = torch.nan, False
    out = scale(x, valid)
    assert (out[:2] == 0).all() and out.abs().max() <= 5
    before = scale.mean.clone()
    scale.train()(torch.full((4, 2), torch.nan), torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(scale.mean, before)


def test_learns_to_tell_bright_centres_from_empty_ones() -> None:
    torch.manual_seed(0)
    net = _net().train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    truth = torch.tensor([1.0, 0.0])
    ball = torch.zeros(2, 1, 16, 16, 16)
    ball[truth == 1, :, 6:10, 6:10, 6:10] = 1
    losses = []
    for _ in range(32):
        batch = _batch(2, (16, 16, 16))
        batch = replace(batch, image=0.3 * batch.image + 2 * ball, vessel=torch.zeros_like(batch.vessel))
        out = net(batch)
        candidate = nn.functional.binary_cross_entropy_with_logits(out.logit, truth)
        mask = nn.functional.binary_cross_entropy_with_logits(out.mask_logit, ball)
        optimiser.zero_grad()
        (candidate + mask).backward()
        optimiser.step()
        losses.append((candidate.item(), mask.item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.95 * losses[0][1]
