"""How many GPU hours a recipe takes, from the arithmetic of its networks on this machine.

python benchmarks/recipe_cost.py experiment=rsna_full data.root=/data/rsna

The multiplications of one training step and of one sliding window are counted, not timed. Hours follow from
an assumed rate: `--tflops` that the device sustains over a step, of the hundreds that its data sheet names.
Augmentation of a patch is timed on one core of this machine and spread over `--workers` loader processes per
GPU; the slower of the two decides. Preparing scans, reading patches and boosting trees are left out.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aneurysm.build import build, build_expert, build_segmenter, build_vessel
from aneurysm.command_line import config_folder
from aneurysm.data.augment import Augmentation, change_intensity, move
from aneurysm.nets.expert import ExpertBatch
from aneurysm.nets.reconstruction import MaskedReconstruction
from aneurysm.stages import vessel


@dataclass(frozen=True)
class Cost:
    """Arithmetic of one stage."""

    stage: str
    parameters: int
    step: float  # operations of one optimiser step
    steps: int  # per fold
    examples: int  # per step
    loading: float  # seconds of one core per example
    window: float = 0.0  # operations of one sliding window in use
    windows: int = 0  # per scan

    def computing(self, rate: float) -> float:
        """Hours of one fold at `rate` operations per second."""
        return self.step * self.steps / rate / 3600

    def feeding(self, workers: int) -> float:
        """Hours in which the loaders make the examples of one fold."""
        return self.steps * self.examples * self.loading / workers / 3600

    def reading(self, scans: int, rate: float) -> float:
        """Hours in which every scan is read once."""
        return self.window * self.windows * scans / rate / 3600


def counted(net: nn.Module, run: Callable[[], Tensor], train: bool) -> int:
    """Operations (two per multiplication and addition) of a pass, with its backward pass when training."""
    net.train(train)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        result = run()
        if train:
            result.float().pow(2).mean().backward()
    return counter.get_total_flops()


def augmenting(size: int, masks: int, augmentation: Augmentation, intensity: bool = True) -> float:
    """Seconds in which one core augments a patch with its masks, the median of a few."""
    image = np.random.default_rng(0).standard_normal((size, size, size)).astype(np.float32)
    mask = (image > 1).astype(np.float32)
    seconds = []
    for draw in range(9):
        plan = augmentation.draw(np.random.default_rng(draw), "CTA")
        started = time.perf_counter()
        moved = move(image, plan, order=1)
        for _ in range(masks):
            move(mask, plan, order=0)
        if intensity:
            change_intensity(moved, plan)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def windows(extent_mm: float, spacing_mm: float, window: int, overlap: float, flips: int) -> int:
    """Sliding windows that cover a cube, once per flip and once unflipped."""
    voxels = extent_mm / spacing_mm
    along = max(1, math.ceil((voxels - window) / (window * (1 - overlap))) + 1)
    return along**3 * (1 + flips)


def costs(cfg: DictConfig, extent_mm: float) -> list[Cost]:
    """Of the four stages that train networks; one example is counted and multiplied by the batch."""
    made = []
    spacing = float(cfg.prepare.spacing_mm)

    def segmentation(name: str, s: Any, net: nn.Module, channels: int) -> Cost:
        patch = torch.rand(1, channels, *[s.patch] * 3)
        view = torch.rand(1, channels, *[s.window] * 3)
        return Cost(
            name,
            sum(p.numel() for p in net.parameters()),
            s.batch * counted(net, lambda: net(patch), train=True),
            s.epochs * s.steps,
            s.batch,
            augmenting(s.patch, channels, build(s.augmentation)),
            counted(net, lambda: net(view), train=False),
            windows(extent_mm, spacing, s.window, s.overlap, len(s.flips)),
        )

    masking = build(cfg.masking)
    if masking is not None:
        s = cfg.pretrain
        net: Any = MaskedReconstruction(
            build(cfg.backbone), s.decoder_width, mode=s.mode, block=masking.block
        )
        image = torch.rand(1, 1, *[s.patch] * 3)
        active = masking(None, tuple(image.shape), 1.0, torch.Generator().manual_seed(0))
        step = counted(net, lambda: net(image, active).loss, train=True)
        # a teacher reads every crop once more, without a backward pass
        step += step / 3 if type(masking).__name__ == "AnatoMask" else 0
        parameters = sum(p.numel() for p in net.parameters())
        loading = augmenting(s.patch, 0, Augmentation(), intensity=False)
        made.append(Cost("pretrain", parameters, s.batch * step, s.epochs * s.steps, s.batch, loading))
    net = build_vessel(cfg)
    made.append(segmentation("vessel", cfg.vessel, net, vessel.INPUTS))
    made.append(segmentation("segmenter", cfg.smart_net, build_segmenter(cfg), 2))
    made.append(_expert(cfg))
    return made


def _expert(cfg: DictConfig) -> Cost:
    s = cfg.expert
    net: Any = build_expert(cfg, graph_features=16)
    two = 2  # the batch norm needs two examples
    batch = ExpertBatch(
        image=torch.rand(two, 4, *[s.crop] * 3),
        present=torch.tensor([[True, False, False, False]] * two),
        vessel=torch.rand(two, 1, *[s.crop] * 3),
        age=torch.full((two,), 60.0),
        sex=torch.zeros(two),
        position=torch.zeros(two, 3),
        graph=torch.zeros(two, 16),
        score=torch.full((two,), 0.5),
    )

    def run() -> Tensor:
        output = net(batch)
        return output.mask_logit.mean() + output.logit.mean() + output.location_logits.mean()

    one = counted(net, run, train=True) / two
    parameters = sum(p.numel() for p in net.parameters())
    loading = augmenting(s.crop, 0, Augmentation())
    return Cost("expert", parameters, s.batch * one, s.epochs * s.steps, s.batch, loading)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--tflops", type=float, default=25.0, help="sustained, 10^12 operations per second")
    parser.add_argument("--workers", type=int, default=8, help="loader processes per GPU")
    parser.add_argument("--scans", type=int, default=4348)
    parser.add_argument("--extent-mm", type=float, default=180.0, help="edge of a scan taken as a cube")
    given = parser.parse_args()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=given.overrides)
    table = Table(
        "stage", "parameters", "TFLOP/step", "steps", "h computing", "h feeding", "h reading all scans"
    )
    total, rate, folds = 0.0, given.tflops * 1e12, int(cfg.folds)
    torch.set_num_threads(1)
    for cost in costs(cfg, given.extent_mm):
        computing, feeding = cost.computing(rate), cost.feeding(given.workers)
        reading = cost.reading(given.scans, rate)
        total += max(computing, feeding) * folds + reading
        table.add_row(
            cost.stage,
            f"{cost.parameters / 1e6:.1f} M",
            f"{cost.step / 1e12:.2f}",
            str(cost.steps),
            f"{computing:.1f}",
            f"{feeding:.1f}",
            f"{reading:.1f}" if cost.windows else "",
        )
    Console(width=120).print(table)
    print(
        f"{total:.0f} GPU hours for {folds} folds at {given.tflops:g} TFLOP/s sustained, "
        f"{given.workers} loaders per GPU"
    )


if __name__ == "__main__":
    main()
