"""Training of the coarse net, which finds the region of interest in whole scans at some 3 mm."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from aneurysm.losses.dice_ce import DiceCELoss
from aneurysm.nets.unet import UNet3D

_MOST_CUT = 0.3  # of an axis that a field of view may lack at one end
_LR = 3.0e-3

Pair = tuple[np.ndarray, np.ndarray]  # coarse image (d, h, w) float32 and target (d, h, w) bool


def coarse_net() -> UNet3D:
    """0.3 million weights; a head of 60 x 70 x 60 voxels takes a tenth of a second on one core."""
    return UNet3D(in_channels=1, out_channels=1, widths=(8, 16, 32, 64), detail_width=0)


def train_coarse(pairs: Sequence[Pair], steps: int, seed: int, device: torch.device | str = "cpu") -> UNet3D:
    """Fit a coarse net to whole scans, one per step; the same arguments give the same weights.

    Scans are mirrored, cut at their ends as fields of view differ, and their contrast is changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = coarse_net().to(device).train()
    loss_of = DiceCELoss()
    optimiser = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LR, total_steps=max(steps, 2))
    for image, target in _examples(pairs, steps, np.random.default_rng([seed, len(pairs)])):
        logits = net(torch.from_numpy(image)[None, None].to(device))
        loss, _ = loss_of(logits, torch.from_numpy(target)[None, None].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def _examples(pairs: Sequence[Pair], steps: int, rng: np.random.Generator) -> Iterable[Pair]:
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = [int(i) for i in rng.permutation(len(pairs))]
        image, target = pairs[order.pop()]
        kept = []
        for n in image.shape:
            first, last = (int(rng.uniform(0, _MOST_CUT) * n) if rng.random() < 0.25 else 0 for _ in range(2))
            kept.append(slice(first, n - last))
        image, target = image[tuple(kept)], target[tuple(kept)]
        if rng.random() < 0.5:
            image, target = image[..., ::-1], target[..., ::-1]
        image = image * np.float32(rng.uniform(0.75, 1.3)) + np.float32(rng.normal(0, 0.15))
        image = image + rng.normal(0, rng.uniform(0, 0.1), image.shape).astype(np.float32)
        yield np.ascontiguousarray(image, np.float32), np.ascontiguousarray(target, np.float32)
