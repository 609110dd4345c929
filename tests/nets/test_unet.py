from functools import partial

import hydra
import pytest
import torch
import torch.nn.functional as F

from aneurysm.build import build, build_segmenter
from aneurysm.command_line import config_folder
from aneurysm.nets.unet import DynUNet3D, UNet3D

torch.set_num_threads(1)  # the machines that run the tests are shared


@pytest.mark.parametrize("make", [UNet3D, partial(UNet3D, detail_width=0), DynUNet3D])
@pytest.mark.parametrize("size", [(32, 32, 32), (17, 40, 23), (3, 9, 8), (1, 1, 1)])
def test_logits_have_the_size_of_the_image(size, make):
    net = make(2, 3)
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


@pytest.mark.parametrize("make", [UNet3D, DynUNet3D])
def test_batch_does_not_change_a_crop(make):
    net = make().eval()
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


@pytest.mark.parametrize("residual", [False, True])
def test_the_dynamic_unet_is_monais(residual):
    """The same weights under MONAI's own forward pass, which needs a size of whole multiples."""
    from monai.networks.nets.dynunet import DynUNet

    strides = [(1, 2, 2), (2, 2, 2)]
    net = DynUNet3D(2, 3, (4, 8, 16), strides, residual=residual)
    kernels = [(3, 3, 3), (1, 3, 3), (3, 3, 3)]
    norm = ("INSTANCE", {"affine": True})
    theirs = DynUNet(
        3, 2, 3, kernels, [(1, 1, 1), *strides], strides, [4, 8, 16], norm_name=norm, res_block=residual
    )
    missing = theirs.load_state_dict(net.body.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(k.startswith("skip_layers.") for k in missing.missing_keys)
    image = torch.randn(2, 2, 4, 8, 12)
    torch.testing.assert_close(net(image), theirs(image), atol=1e-5, rtol=1e-4)
    storages = [v.untyped_storage().data_ptr() for v in net.state_dict().values()]
    assert len(set(storages)) == len(storages)  # every weight has one name


def test_the_dynamic_unet_trains_every_weight():
    """No bias is invisible: each moves the answer, or AdamW would move it by noise."""
    torch.manual_seed(0)
    net = DynUNet3D(2, 2, (4, 8, 8), residual=True).double()
    image = torch.randn(1, 2, 9, 12, 10, dtype=torch.float64)
    net(image).mul(torch.randn(1, 2, 9, 12, 10, dtype=torch.float64)).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("option", ["dynunet", "dynunet_base"])
def test_segmenters_of_both_stages_can_be_dynamic_unets(option):
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose(
            "train", overrides=[f"segmenter@vessel.net={option}", f"segmenter@smart_net.net={option}"]
        )
    vessel = build(cfg.vessel.net, in_channels=1, out_channels=1)
    assert isinstance(vessel, DynUNet3D) and isinstance(build_segmenter(cfg).net, DynUNet3D)
    assert vessel(torch.randn(1, 1, 17, 16, 20)).shape == (1, 1, 17, 16, 20)


def test_the_dynamic_unet_drops_no_logits_and_starts_at_its_prior():
    torch.manual_seed(0)
    net = DynUNet3D(widths=(4, 8, 8), dropout=0.5, prior=0.01)
    for name, p in net.named_parameters():
        if "output_block" in name and name.endswith("weight"):
            torch.nn.init.zeros_(p)
    torch.testing.assert_close(net(torch.randn(1, 1, 8, 8, 8)).sigmoid(), torch.full((1, 1, 8, 8, 8), 0.01))
    assert any(isinstance(m, torch.nn.Dropout) for m in net.modules())


def test_errors_teach():
    with pytest.raises(ValueError, match="two widths"):
        UNet3D(widths=(8,))
    with pytest.raises(
        ValueError, match=r"built for 1 channel\(s\): got .*\(1, 2, 16, 16, 16\), expected \(b, 1, d"
    ):
        UNet3D()(torch.randn(1, 2, 16, 16, 16))
    with pytest.raises(ValueError, match="at least one voxel"):
        UNet3D()(torch.randn(1, 1, 16, 0, 16))
    with pytest.raises(ValueError, match=r"prior=0"):
        UNet3D(prior=0)
    with pytest.raises(ValueError, match="three widths"):
        DynUNet3D(widths=(8, 16))
    with pytest.raises(ValueError, match="one stride per level below the first, 2 for"):
        DynUNet3D(widths=(8, 16, 32), strides=(2, 2, 2))
    with pytest.raises(ValueError, match=r"one number from 1 per axis"):
        DynUNet3D(widths=(8, 16, 32), strides=(2, (1, 2)))
    with pytest.raises(ValueError, match=r"one number from 1 per axis"):
        DynUNet3D(widths=(8, 16, 32), strides=(2, 1))
    with pytest.raises(ValueError, match=r"DynUNet3D built for 1 channel"):
        DynUNet3D()(torch.randn(1, 2, 16, 16, 16))
    with pytest.raises(ValueError, match="at least one voxel"):
        DynUNet3D()(torch.randn(0, 1, 16, 16, 16))
