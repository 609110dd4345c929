"""Oscillators as a part of a transformer stage, their control, and where they can stand."""

import pytest
import torch
import torch.nn.functional as F

from aneurysm.nets.oscillators import AkornBlock, ItrsaBlock, OscillatorState, akorn, itrsa
from aneurysm.nets.waveformer import WaveFormerEncoder

PLACEMENTS = ("after_mlp", "before_mlp", "in_attention")


@pytest.mark.parametrize("oscillator_dim", [2, 3, 8])
@pytest.mark.parametrize("connectivity", ["attention", "conv"])
def test_block_keeps_unit_oscillators_and_trains(oscillator_dim, connectivity):
    torch.manual_seed(0)
    block = AkornBlock(
        12, oscillator_dim, oscillator_channels=30, connectivity=connectivity, grid=4, alpha=0.1
    )
    x = torch.randn(2, 12, 6, 4, 5, requires_grad=True)
    out, state = block(x)
    assert isinstance(state, OscillatorState)
    assert out.shape == x.shape
    assert block.oscillator_channels % oscillator_dim == 0
    assert block.oscillator_channels >= 30
    lengths = state.x.unflatten(1, (-1, oscillator_dim)).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0)
    assert state.x.shape[2:] == (4, 4, 4)
    assert state.energies.shape == state.lyapunov.shape == (4, 2)
    for order in (state.order_parameter, state.order_per_group, state.synchrony):
        assert ((order >= 0) & (order <= 1)).all()
    torch.testing.assert_close(state.order_parameter, state.order_per_group.mean(1))
    out.square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", [AkornBlock, ItrsaBlock])
def test_a_net_begins_as_the_one_without_and_only_the_gate_learns_first(kind):
    x = torch.randn(2, 8, 3, 9, 2)
    block = kind(8)
    out, state = block(x)
    torch.testing.assert_close(out, x, atol=0, rtol=0)
    assert (state is None) == (kind is ItrsaBlock)
    out.pow(2).sum().backward()
    assert block.alpha.grad.abs().min() > 0
    assert all(p.grad.abs().sum() == 0 for n, p in block.named_parameters() if n != "alpha")


def test_long_axes_are_pooled_and_short_ones_never_enlarged():
    assert AkornBlock(8)(torch.randn(1, 8, 3, 9, 2))[1].x.shape[2:] == (3, 8, 2)


def test_the_answer_is_the_gated_readout_of_the_pooled_map():
    block = AkornBlock(8, oscillator_channels=32, grid=2, alpha=0.5).eval()
    x = torch.randn(1, 8, 4, 4, 4)
    out, state = block(x)
    fine = F.interpolate(block.readout(state.x), (4, 4, 4), mode="trilinear", align_corners=False)
    torch.testing.assert_close(out, x + 0.5 * fine)
    start = block.to_start(F.adaptive_avg_pool3d(x, 2))
    path = block.layer(start, block.to_stimulus(F.adaptive_avg_pool3d(x, 2)), 4, 0.5)
    torch.testing.assert_close(path.energies / (8 * 8), state.energies)


def test_evaluation_repeats_and_noise_belongs_to_the_sample():
    torch.manual_seed(0)
    x = torch.randn(3, 8, 4, 4, 4)
    still = AkornBlock(8, grid=4)
    torch.testing.assert_close(still(x)[1].x, still(x)[1].x, atol=0, rtol=0)
    block = AkornBlock(8, grid=4, noise=1.0)
    assert not torch.equal(block(x)[1].x, block(x)[1].x)  # training
    block.eval()
    whole = block(x)[1].x
    torch.testing.assert_close(block(x)[1].x, whole, atol=0, rtol=0)
    torch.testing.assert_close(block(x[1:2])[1].x, whole[1:2])
    assert not torch.allclose(whole, AkornBlock(8, grid=4).eval()(x)[1].x)
    seeds = torch.tensor([5, 6, 7])
    seeded = block(x, seeds)[1].x
    torch.testing.assert_close(block(x[2:], seeds[2:])[1].x, seeded[2:])
    assert not torch.allclose(seeded, whole)


@pytest.mark.parametrize("steps", [4, 32])
@pytest.mark.parametrize("kind", [AkornBlock, ItrsaBlock])
def test_half_precision_stays_finite_forth_and_back(kind, steps):
    torch.manual_seed(0)
    block = kind(8, steps=steps, grid=2, alpha=0.1)
    for x in (torch.zeros(1, 8, 4, 4, 4), torch.randn(1, 8, 4, 4, 4)):
        x = x.bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, state = block(x)
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()
        if state is not None:
            assert state.x.dtype == torch.float32
        out.float().pow(2).sum().backward()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in block.parameters())


def test_the_control_iterates_one_attention_on_features():
    torch.manual_seed(0)
    block = ItrsaBlock(8, width=16, steps=3, grid=2, heads=2, alpha=1.0)
    x = torch.randn(2, 8, 2, 2, 2)
    z = block.to_start(x)
    for _ in range(3):
        normal = F.layer_norm(z.movedim(1, -1), (16,)).movedim(-1, 1)
        z = z + block.attention(normal)
    torch.testing.assert_close(block(x)[0], x + block.readout(z))


def test_the_control_has_as_many_parameters():
    def count(block):
        return sum(p.numel() for p in block.parameters())

    assert count(ItrsaBlock(64)) == pytest.approx(count(AkornBlock(64)), rel=0.1)


@pytest.mark.parametrize("make", [akorn, itrsa])
def test_placements_differ_and_deeper_stages_see_them(make):
    torch.manual_seed(0)
    image = torch.randn(1, 1, 32, 32, 32)
    plain = WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8)).eval()
    answers = [plain(image)]
    for placement in PLACEMENTS:
        torch.manual_seed(1)
        plan = make(strides=[4, 8], placement=placement, grid=4, alpha=0.3)
        net = WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8), oscillators=plan).eval()
        net.load_pretrained(plain.state_dict())
        encoding = net.encode(net.patch_embed(image))
        assert len(encoding.oscillators) == (2 if make is akorn else 0)
        answers.append(encoding.maps)
        assert len(net.pretrained_parameters()) == len(list(plain.parameters()))
    for i, a in enumerate(answers):
        for b in answers[:i]:
            torch.testing.assert_close(a[0], b[0])  # the stage before all oscillators
            assert all(not torch.allclose(x, y, atol=1e-4) for x, y in zip(a[1:], b[1:], strict=True))


def test_a_closed_gate_leaves_the_encoder_as_it_is():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 24, 17, 16)
    plain = WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8)).eval()
    for placement in PLACEMENTS:
        net = WaveFormerEncoder(
            1, 8, heads=(1, 2, 4, 8), oscillators=akorn(strides=[2, 4, 8, 16], placement=placement)
        ).eval()
        net.load_pretrained(plain.state_dict())
        for a, b in zip(net(image), plain(image), strict=True):
            torch.testing.assert_close(a, b)


def test_recomputing_changes_no_gradient():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 16, 16, 16)
    gradients = []
    plan = akorn(strides=[8], oscillator_channels=32, alpha=0.1, recompute=True)
    net = WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8), drop_path=0.3, oscillators=plan)
    for net.recompute in (False, True):
        net.zero_grad()
        torch.manual_seed(5)  # the dropped paths are drawn again in the backward pass
        sum(m.pow(3).sum() for m in net(image)).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_teach():
    with pytest.raises(ValueError, match="dimension >= 2"):
        AkornBlock(8, oscillator_dim=1)
    with pytest.raises(ValueError, match="must be even"):
        AkornBlock(8, oscillator_dim=3, omega="pairs")
    with pytest.raises(ValueError, match="at least 6 channels per head"):
        AkornBlock(8, oscillator_channels=16, heads=4)
    with pytest.raises(ValueError, match=r"expected \(b, 8, d, h, w\)"):
        AkornBlock(8)(torch.randn(1, 4, 4, 4, 4))
    with pytest.raises(ValueError, match="needs a step"):
        ItrsaBlock(8, steps=0)
