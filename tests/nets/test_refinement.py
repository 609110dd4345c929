"""A refined segmenter begins as the earlier one and can leave it."""

import pytest
import torch

from aneurysm.nets.refinement import Refinement
from aneurysm.nets.segformer3d import SegFormer3D
from aneurysm.nets.unet import UNet3D

SMALL_SEGFORMER = {
    "widths": (8, 16),
    "depths": (1, 1),
    "heads": (1, 2),
    "reductions": (2, 1),
    "decoder_width": 8,
}
NETS = {
    "unet": lambda: UNet3D(2, 2, widths=(4, 8)),
    "unet without detail": lambda: UNet3D(2, 2, widths=(4, 8), detail_width=0),
    "segformer": lambda: SegFormer3D(2, 2, **SMALL_SEGFORMER),
    "segformer with skip": lambda: SegFormer3D(2, 2, **SMALL_SEGFORMER, full_resolution_skip=True),
}


@pytest.mark.parametrize("name", NETS)
def test_untrained_it_repeats_the_earlier_net_and_training_changes_it(name):
    torch.manual_seed(0)
    net = NETS[name]()  # after the seed: the weights do not depend on which tests were collected before
    refined = Refinement(net)
    earlier = torch.rand(2, 1, 16, 16, 16)
    earlier[0, 0, :2], earlier[0, 0, 2:4] = 0, 1
    inputs = torch.cat([torch.randn_like(earlier), earlier], dim=1)
    logits = refined(inputs)
    assert logits.shape == (2, 2, 16, 16, 16) and logits.isfinite().all()
    # Certain voxels stay within half a storage step of certain, so that training can still move them.
    torch.testing.assert_close(torch.sigmoid(logits[:, :1]), earlier.clamp(1 / 510, 1 - 1 / 510))
    torch.testing.assert_close(logits[:, 1:], net(inputs)[:, 1:])  # the other channel is the net's own
    optimiser = torch.optim.SGD(refined.parameters(), lr=0.1)
    for _ in range(3):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            refined(inputs)[:, :1], torch.zeros_like(earlier)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.sigmoid(refined(inputs)[:, :1]).mean() < earlier.mean()
