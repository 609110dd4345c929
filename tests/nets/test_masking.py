import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aneurysm.nets.masking import AnatoMask, RandomBlocks, block_grid, blocks_to_voxels, teacher_decay
from aneurysm.nets.reconstruction import MaskedReconstruction, block_mean, block_statistics
from aneurysm.nets.waveformer import WaveFormerEncoder

torch.set_num_threads(1)  # the machines that run the tests are shared


def build(mode="spark", **options):
    torch.manual_seed(0)
    backbone = WaveFormerEncoder(1, 8, heads=(1, 2, 4, 8), mlp_ratio=2)
    return MaskedReconstruction(backbone, 8, mode, **options)


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(*[st.integers(9, 40)] * 3),
    st.sampled_from([0.3, 0.6, 0.75]),
    st.integers(0, 99),
    st.sampled_from([RandomBlocks, AnatoMask]),
)
def test_every_sample_hides_the_same_share(size, ratio, seed, kind):
    shape = (3, 1, *size)
    masker = kind(ratio, 8)
    grid = block_grid(shape, 8)
    loss = torch.rand(3, 1, *grid)
    active = masker(loss, shape, 0.7, torch.Generator().manual_seed(seed))
    n = int(np.prod(grid))
    assert active.shape == (3, 1, *grid)
    hidden = (~active).flatten(1).sum(1)
    assert (hidden == masker.hidden_count(n)).all()
    assert abs(int(hidden[0]) - ratio * n) <= 1
    again = masker(loss, shape, 0.7, torch.Generator().manual_seed(seed))
    assert torch.equal(active, again)


def test_every_block_is_hidden_equally_often():
    active = RandomBlocks(0.6, 8)(None, (2000, 1, 16, 16, 24), generator=torch.Generator().manual_seed(1))
    share = (~active).float().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 7 / 12), atol=0.04, rtol=0)


def test_golden_number_of_hard_blocks(golden):
    data = np.load(golden / "anatomask_dynamics.npz", allow_pickle=True)
    masker = AnatoMask(0.6, 16)
    for epoch, share, blocks, keep, hidden, hard in data["rows"]:
        assert masker.hidden_count(int(blocks)) == hidden == blocks - keep
        progress = (epoch + 1) / 999
        if progress <= 1:
            assert masker.hard_start + masker.hard_end * progress == pytest.approx(share)
        assert masker.hard_count(int(blocks), progress) == hard
    for epoch, decay in zip(data["ema_epoch"], data["ema_decay"], strict=True):
        assert teacher_decay(float(epoch) / 1000) == pytest.approx(decay, abs=1e-9)


def test_hard_blocks_are_hidden_and_the_rest_is_chance():
    shape = (400, 1, 32, 32, 32)
    loss = torch.rand(400, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    masker = AnatoMask(0.5, 8, hard_end=0.5)
    hidden = ~masker(loss, shape, 1.0, torch.Generator().manual_seed(1)).flatten(1)
    rank = loss.flatten(1).argsort(dim=1, descending=True)
    sorted_hidden = hidden.gather(1, rank).float()
    assert masker.hard_count(64, 1.0) == 16
    assert sorted_hidden[:, :16].all()
    assert sorted_hidden[:, 16:].mean() == pytest.approx(16 / 48)
    # uniform over ranks 17..64: no preference beyond the hard ones
    assert sorted_hidden[:, 16:].mean(0).std() < 0.05
    early = ~masker(loss, shape, 0.0, torch.Generator().manual_seed(1)).flatten(1)
    assert early.gather(1, rank).float()[:, :16].mean() == pytest.approx(0.5, abs=0.05)


def test_blocks_without_loss_are_never_hard():
    loss = torch.zeros(200, 1, 4, 4, 4)
    loss[:, 0, 0, 0, :3] = 1.0  # three candidates, sixteen wanted
    hidden = ~AnatoMask(0.5, 8)(loss, (200, 1, 32, 32, 32), 1.0, torch.Generator().manual_seed(0))
    assert hidden[:, 0, 0, 0, :3].all()
    assert (hidden.flatten(1).sum(1) == 32).all()
    rest = hidden.flatten(1)[:, 3:].float().mean(0)
    assert rest.min() > 0.3 and rest.max() < 0.65


def test_blocks_to_voxels_cuts_the_border():
    active = torch.tensor([True, False, True]).reshape(1, 1, 1, 1, 3)
    voxels = blocks_to_voxels(active, 4, (3, 4, 10))
    assert voxels.shape == (1, 1, 3, 4, 10)
    assert voxels[0, 0, 0, 0].tolist() == [True] * 4 + [False] * 4 + [True] * 2


@pytest.mark.parametrize("mode", ["spark", "dense"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("size,block", [((32, 32, 32), 8), ((21, 32, 18), 6)])
def test_hidden_voxels_leak_nowhere(mode, normalise, size, block):
    net = build(mode, block=block, normalise_patches=normalise).eval()
    image = torch.randn(2, 1, *size)
    active = RandomBlocks(0.6, block)(None, image.shape, generator=torch.Generator().manual_seed(3))
    visible = blocks_to_voxels(active, block, size)
    other = torch.where(visible, image, 5 * torch.randn_like(image) + 3)
    other[~visible & (torch.rand_like(image) < 0.1)] = float("nan")
    seen = []
    net.backbone.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        first, second = net(image, active), net(other, active)
    assert torch.equal(first.prediction, second.prediction)
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    moved = image + visible  # whereas visible voxels do count
    with torch.no_grad():
        assert not torch.allclose(net(moved, active).prediction, first.prediction)


def test_loss_is_the_slow_formula_and_ignores_visible_and_invalid_voxels():
    net = build(block=8)
    image = torch.randn(2, 1, 16, 16, 20)
    active = RandomBlocks(0.5, 8)(None, image.shape, generator=torch.Generator().manual_seed(0))
    valid = torch.rand_like(image) < 0.7
    valid[0, 0, :8, :8, :8] = False
    active[0, 0, 0, 0, 0] = False
    image[~valid] = float("nan")
    image[~valid & blocks_to_voxels(active, 8, image.shape[2:])] = 0.0  # what the encoder sees must be finite
    out = net(image, active, valid)
    hidden = ~blocks_to_voxels(active, 8, image.shape[2:]) & valid
    error = (out.prediction - image) ** 2
    torch.testing.assert_close(out.loss, error[hidden].mean())
    assert out.per_block_loss[0, 0, 0, 0, 0] == 0
    for b in range(2):
        for k in range(3):
            cell = (b, 0, slice(0, 8), slice(8, 16), slice(8 * k, 8 * k + 8))
            expected = error[cell][hidden[cell]].mean() if hidden[cell].any() else torch.zeros(())
            torch.testing.assert_close(out.per_block_loss[b, 0, 0, 1, k], expected.detach())
    gradient = torch.autograd.grad(out.loss, out.prediction)[0]
    assert (gradient[~hidden] == 0).all() and torch.isfinite(gradient).all()
    shown = blocks_to_voxels(active, 8, image.shape[2:])
    assert torch.equal(out.reconstruction[shown], image[shown])


def test_golden_patch_normalised_loss(golden):
    """Loss of the reference for a given prediction, target normalisation included."""
    data = np.load(golden / "anatomask_forward_ref.npz")
    image, active = torch.from_numpy(data["x"]), torch.from_numpy(data["active"])

    def to_image(patches):  # (b, 64 blocks, 64 voxels) -> (b, 1, 16, 16, 16)
        x = torch.from_numpy(patches).reshape(2, 4, 4, 4, 4, 4, 4)
        return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(2, 1, 16, 16, 16)

    torch.testing.assert_close(to_image(data["inp"]), image)
    net = build(block=4, normalise_patches=True, deviation_floor=1e-3, ranking="as_code")
    net.decode = lambda maps, visible: to_image(data["rec"])
    out = net(image, active)
    assert out.loss.item() == pytest.approx(float(data["loss"]), abs=1e-6)
    hidden = ~active.flatten(1)
    raw = torch.from_numpy(data["teacher_loss_raw_as_code"])
    torch.testing.assert_close(out.per_block_loss.flatten(1), raw * hidden, atol=1e-5, rtol=1e-5)
    net.ranking = "normalised"
    masked = torch.from_numpy(data["per_patch_loss_masked"])
    torch.testing.assert_close(net(image, active).per_block_loss.flatten(1), masked, atol=1e-5, rtol=1e-5)


def test_block_statistics_against_a_loop():
    image, valid = torch.randn(1, 1, 7, 8, 9).double() + 5, torch.rand(1, 1, 7, 8, 9).double().round()
    mean, deviation = block_statistics(image, valid, 4, 0.0)
    part = (0, 0, slice(4, 7), slice(4, 8), slice(8, 9))
    inside = image[part][valid[part] > 0]
    torch.testing.assert_close(mean[part], inside.mean().expand(3, 4, 1))
    torch.testing.assert_close(deviation[part], inside.std().expand(3, 4, 1))
    _, count = block_mean(image, valid, 4)
    assert count[0, 0, 1, 1, 2] == inside.numel()


@pytest.mark.parametrize("mode", ["spark", "dense"])
def test_training_paints_structure(mode):
    net = build(mode)
    axis = torch.linspace(0, 6.0, 24)
    wave = torch.sin(axis)[:, None, None] + torch.cos(axis)[None, :, None] * torch.sin(axis)
    image = torch.stack([wave, wave.flip(0)])[:, None].contiguous()
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    active = RandomBlocks(0.6, 8)(None, image.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        out = net(image, active)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in net.parameters())


def test_errors_teach():
    with pytest.raises(ValueError, match="between 0 and 1"):
        RandomBlocks(1.0)
    with pytest.raises(ValueError, match="larger crops"):
        RandomBlocks(0.6, 16)(None, (1, 1, 16, 16, 16))
    with pytest.raises(ValueError, match="same block size"):
        AnatoMask(0.6, 8)(torch.zeros(1, 1, 2, 2, 2), (1, 1, 32, 32, 32), 0.5)
    with pytest.raises(ValueError, match="same block size"):
        build(block=8)(torch.zeros(1, 1, 32, 32, 32), torch.ones(1, 1, 2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="in_channels=1"):
        MaskedReconstruction(WaveFormerEncoder(2, 8, heads=(1, 2, 4, 8)))
