import pytest
import torch
import torch.nn.functional as F

from aneurysm.nets.unet import UNet3D

torch.set_num_threads(1)  # the machines that run the tests are shared


@pytest.mark.parametrize("detail", [0, 4])
@pytest.mark.parametrize("size", [(32, 32, 32), (17, 40, 23), (3, 9, 8)])
def test_logits_have_the_size_of_the_image(size, detail):
    net = UNet3D(2, 3, detail_width=detail)
    out = net(torch.randn(1, 2, *size))
    assert out.shape == (1, 3, *size)
    assert torch.isfinite(out).all()


def test_padding_does_not_move_voxels():
    """A volume of a good size and its cut by a few planes agree far from the cut."""
    torch.manual_seed(0)
    net = UNet3D(widths=(4, 8)).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.track_running_stats = True  # fixed statistics: the comparison is about position only
            module.running_mean = torch.zeros(module.num_features)
            module.running_var = torch.ones(module.num_features)
    image = torch.randn(1, 1, 32, 8, 8)
    whole, cut = net(image), net(image[:, :, :29])
    torch.testing.assert_close(cut[:, :, :14], whole[:, :, :14], atol=1e-5, rtol=1e-5)


def test_batch_does_not_change_a_crop():
    net = UNet3D().eval()
    crops = torch.randn(2, 1, 16, 16, 16)
    torch.testing.assert_close(net(crops)[:1], net(crops[:1]), atol=1e-5, rtol=1e-4)


def test_learns_a_one_voxel_line():
    """A line of one voxel is found sharply: the head sees the image at full resolution."""
    torch.manual_seed(0)
    net = UNet3D(widths=(4, 8, 16))
    target = torch.zeros(1, 1, 16, 16, 16)
    target[..., 5, 9, :] = 1
    target[..., 2, :, 3] = 1
    image = 2 * target + 0.3 * torch.randn_like(target)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(30):
        logits = net(image)
        p = logits.sigmoid()
        dice = 2 * (p * target).sum() / (p.sum() + target.sum())
        loss = F.binary_cross_entropy_with_logits(logits, target) + 1 - dice
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = logits > 0
    assert 2 * (found & (target > 0)).sum() / (found.sum() + target.sum()) > 0.9
    assert all(q.grad is not None and q.grad.abs().max() > 0 for q in net.head.parameters())


def test_errors_teach():
    with pytest.raises(ValueError, match="two widths"):
        UNet3D(widths=(8,))
    with pytest.raises(ValueError, match=r"built for 1 channel"):
        UNet3D()(torch.randn(1, 2, 16, 16, 16))
