"""Deep supervision: more answers in training, the same network otherwise."""

import pytest
import torch
import torch.nn.functional as F

from aneurysm.losses.deep_supervision import DeepSupervision
from aneurysm.losses.dice_ce import DiceCELoss
from aneurysm.nets.refinement import Refinement
from aneurysm.nets.segformer3d import SegFormer3D
from aneurysm.nets.unet import DynUNet3D, UNet3D
from aneurysm.nets.waveformer import WaveFormer

torch.set_num_threads(1)  # the machines that run the tests are shared

SEGFORMER = {"widths": (8, 16), "depths": (1, 1), "heads": (1, 2), "reductions": (2, 1), "decoder_width": 16}
# how it is made with n heads, and the strides of all heads that it can have
NETS = {
    "unet": (lambda n: UNet3D(2, 3, (4, 8, 8, 16), deep_supervision=n), [2, 4, 8]),
    "unet_no_head": (lambda n: UNet3D(2, 3, (4, 8), detail_width=0, deep_supervision=n), [2]),
    "dynunet": (
        lambda n: DynUNet3D(2, 3, (4, 8, 8, 8), [(1, 2, 2), 2, 2], deep_supervision=n),
        [(1, 2, 2), (2, 4, 4)],
    ),
    "segformer": (lambda n: SegFormer3D(2, 3, **SEGFORMER, deep_supervision=n), [4, 8]),
    "waveformer": (
        lambda n: WaveFormer(2, 3, 12, heads=(1, 2, 4, 8), full_width=4, deep_supervision=n),
        [2, 4, 8],
    ),
}


@pytest.mark.parametrize("size", [(32, 40, 32), (35, 33, 41)])
@pytest.mark.parametrize("name", NETS)
def test_coarse_answers_come_beside_the_same_full_one_in_training_alone(name, size):
    make, strides = NETS[name]
    torch.manual_seed(0)
    plain, deep = make(0), make(len(strides))
    missing = deep.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and len(missing.missing_keys) == 2 * len(strides)
    image = torch.randn(1, 2, *size)
    answers = deep.train()(image)
    for answer, stride in zip(answers, [1, *strides], strict=True):
        steps = (stride,) * 3 if isinstance(stride, int) else stride
        assert answer.shape == (1, 3, *(-(-n // s) for n, s in zip(size, steps, strict=True)))
    torch.testing.assert_close(answers[0], plain.train()(image))
    with torch.no_grad():
        torch.testing.assert_close(deep.eval()(image), plain.eval()(image))
    assert len(make(1).train()(image)) == 2


@pytest.mark.parametrize("name", ["unet", "unet_no_head", "dynunet"])
def test_coarse_answers_lie_where_their_voxels_do(name):
    """A head learns a blob in one corner: its coarse map is not shifted against the image."""
    torch.manual_seed(1)
    make, strides = NETS[name]
    net = make(len(strides)).train()
    target = torch.zeros(1, 3, 32, 32, 32)
    target[..., 2:14, 18:30, 1:15] = 1
    image = torch.cat([2 * target[:, :1] - 1, target[:, :1]], dim=1) + 0.1 * torch.randn(1, 2, 32, 32, 32)
    loss, optimiser = DeepSupervision(DiceCELoss()), torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(12):
        optimiser.zero_grad()
        loss(net(image), target)[0].backward()
        optimiser.step()
    assert all(p.grad is not None for name, p in net.named_parameters() if "coarse" in name)
    finest = net(image)[1][:, :1]
    truth = F.adaptive_avg_pool3d(target[:, :1], finest.shape[2:])
    together = torch.stack([finest.detach().flatten(), truth.flatten()])
    assert float(torch.corrcoef(together)[0, 1]) > 0.7


def test_a_prior_is_that_of_coarse_answers_too():
    net = UNet3D(1, 1, (4, 8, 8), prior=0.01, deep_supervision=2)
    for head in net.coarse.heads:
        torch.nn.init.zeros_(head.weight)
    for answer in net.train()(torch.randn(1, 1, 16, 16, 16))[1:]:
        torch.testing.assert_close(answer.sigmoid(), torch.full_like(answer, 0.01))


def test_a_refined_net_corrects_its_full_answer_alone():
    net = Refinement(UNet3D(2, 2, (4, 8), deep_supervision=1))
    inputs = torch.rand(1, 2, 16, 16, 16)
    full, coarse = net.train()(inputs)
    torch.testing.assert_close(full[:, :1], torch.logit(inputs[:, 1:], eps=1 / 510))
    assert coarse.shape == (1, 2, 8, 8, 8)
    assert net.eval()(inputs).shape == (1, 2, 16, 16, 16)


def test_more_heads_than_levels_are_refused():
    with pytest.raises(ValueError, match="a number from 0 to 2"):
        UNet3D(widths=(4, 8, 8), deep_supervision=3)
    with pytest.raises(ValueError, match="a number from 0 to 1"):
        DynUNet3D(widths=(4, 8, 8), deep_supervision=2)
    with pytest.raises(ValueError, match="deep_supervision=-1"):
        SegFormer3D(deep_supervision=-1)
