"""Training a segmentation network on random patches: shared by the vessel net and the Smart Net."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from aneurysm.data.augment import Augmentation, change_intensity, move
from aneurysm.data.labels import UNNAMED_VESSEL, VESSEL_LABEL, mirrored_vessel_labels
from aneurysm.global_batch import gather
from aneurysm.losses.deep_supervision import DeepSupervision
from aneurysm.stages.draws import DrawnBatches, drawn_batches
from aneurysm.stages.patches import (
    aneurysm_patch,
    artery_patch,
    network_patch,
    probability_patch,
    vessel_patch,
)
from aneurysm.stages.processes import rank, world
from aneurysm.stages.sampling import Sampling
from aneurysm.stages.step import StageModule, StepOutput, adamw_one_cycle, log_step
from aneurysm.stages.stored import case_at, fit_in_memory, opened, probabilities_at
from aneurysm.stages.workers import in_workers

# inputs (b, c, d, h, w), targets (b, k, d, h, w), known (b, k) bool; for some losses also what they want
# drawn beside the targets, (b, p, d, h, w) bool
Batch = tuple[Tensor, ...]
# Structures are named by shape, not by side, so every flip gives a plausible patch.
AUGMENTATION = Augmentation(flip_chance=0.5)
TARGETS = {"vessel": vessel_patch, "aneurysm": aneurysm_patch}  # how a structure's patch is cut


class SegmentationModule(StageModule):
    """Fits a voxel classifier with one sigmoid channel per structure; unknown channels do not count.

    Coarser answers that a net gives in training (deep supervision) are compared as well.
    """

    def __init__(
        self, net: nn.Module, loss: nn.Module, lr: float, weight_decay: float, total_steps: int
    ) -> None:
        super().__init__()
        self.net, self.loss = net, DeepSupervision(loss)
        self.lr, self.weight_decay, self.total_steps = lr, weight_decay, total_steps

    def _step(self, batch: Batch, split: str) -> Tensor:
        inputs, *truth = batch
        answers = self.net(inputs)
        levels = [answers] if isinstance(answers, Tensor) else list(answers)
        # Overlap is counted over the whole batch, of which this process may hold a part.
        gathered = gather(*levels, *truth)
        output = self.compare(list(gathered[: len(levels)]), *gathered[len(levels) :])
        return log_step(self, output, split, len(gathered[0]))

    def compare(self, levels: list[Tensor], target: Tensor, known: Tensor, *beside: Tensor) -> StepOutput:
        """The loss of answers, finest first, against what is known."""
        return StepOutput(*self.loss(levels, target, known, *beside))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, index: int) -> Tensor:
        return self._step(batch, "val")

    def configure_optimizers(self):
        return adamw_one_cycle(self.parameters(), self.lr, self.weight_decay, self.total_steps)


class SegmentationData(LightningDataModule):
    """Random patches of the training scans, and a fixed set from the held-out fold for the curves.

    Every modality gives the same share of the patches, however few its scans are: a net that has seen MRA
    often and T2 seldom would be finished with the one before it had begun with the other.

    Scans are kept whole in memory when all of them fit; otherwise every patch is read from its file alone.

    Args:
        train: prepared cases of the training patients.
        held_out: prepared cases of the held-out fold; they steer nothing, only the curves show them.
        channels: what to segment, names in TARGETS.
        upstream: vessel probabilities by series, given as a second input channel.
        augmentation: of training patches.
        sampling: where patches are cut.
        beside: what the loss wants drawn beside every target (`losses.present.beside_of`).
        arteries: after `channels`, one for each of the 13 arteries; unknown in patches with a vessel that has
            no name. Patches are then mirrored left to right, with the names, but not turned upside down or
            back to front: no artery of that place would have its name.
    """

    targets: Mapping[str, Callable] = TARGETS  # how the patch of each channel is cut

    def __init__(
        self,
        train: Sequence[Path],
        held_out: Sequence[Path],
        channels: tuple[str, ...],
        patch: int,
        batch: int,
        steps: int,
        sampling: Sampling,
        seed: int,
        workers: int = 0,
        upstream: dict[str, Path] | None = None,
        augmentation: Augmentation = AUGMENTATION,
        beside: Callable[[np.ndarray], np.ndarray] | None = None,
        arteries: bool = False,
    ) -> None:
        super().__init__()
        self.train, self.held_out, self.channels = list(train), list(held_out), channels
        # Here and not in the dataset, which is made anew for every epoch: this opens every file.
        self.train_groups, self.held_out_groups = by_modality(self.train), by_modality(self.held_out)
        self.patch, self.batch, self.steps, self.sampling = patch, batch, steps, sampling
        self.seed, self.workers, self.upstream = seed, workers, upstream
        self.beside, self.arteries = beside, arteries
        self.augmentation = replace(augmentation, flip_chance=0.0) if arteries else augmentation
        self.whole = fit_in_memory([*self.train, *self.held_out], 0 if upstream is None else 1, workers)

    def train_dataloader(self) -> DataLoader[Batch]:
        epoch = self.trainer.current_epoch if self.trainer else 0
        patches = PatchDataset(
            self, self.train_groups, self.batch * self.steps, (self.seed, epoch), augment=True
        )
        batches = drawn_batches(self.trainer, self.steps if self.train else 0, self.batch)
        if self.workers:
            self.sampling.look_up([*self.train, *self.held_out])
        return DataLoader(patches, batch_sampler=batches, **in_workers(self.workers))

    def val_dataloader(self) -> DataLoader[Batch]:
        patches = PatchDataset(self, self.held_out_groups, 4 * self.batch, (self.seed, 10**6), augment=False)
        batches = DrawnBatches(4 if self.held_out_groups else 0, self.batch, rank=rank(), world=world())
        return DataLoader(patches, batch_sampler=batches, **in_workers(self.workers))


def by_modality(paths: Sequence[Path]) -> list[list[Path]]:
    """Prepared cases in groups of one modality each, in the order of the modalities' names."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[opened(path).modality].append(path)
    return [groups[name] for name in sorted(groups)]


class PatchDataset(Dataset):
    """Patch i of an epoch is a function of (seed, epoch, i) alone, so a resumed run sees the same data."""

    def __init__(
        self,
        data: SegmentationData,
        groups: list[list[Path]],
        count: int,
        key: tuple[int, int],
        augment: bool,
    ) -> None:
        self.data, self.groups, self.count, self.key, self.augment = data, groups, count, key, augment

    def __len__(self) -> int:
        return self.count if self.groups else 0

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((*self.key, index))
        group = self.groups[int(rng.integers(len(self.groups)))]
        path = group[int(rng.integers(len(group)))]
        case, size = case_at(path, self.data.whole), self.data.patch
        start = self.data.sampling.centre(case, path, rng) - size // 2
        inputs = [network_patch(case, start, size)]
        if self.data.upstream is not None:
            vessel = probabilities_at(self.data.upstream[case.series_uid], self.data.whole)
            inputs.append(probability_patch(vessel, "vessel", start, size))
        targets = [self.data.targets[name](case, start, size) for name in self.data.channels]
        if self.data.arteries:
            targets.append(artery_patch(case, start, size))
        empty = np.zeros((size, size, size), bool)
        # Masks as numbers; a soft target, as a heat map is one, keeps its values between 0 and 1.
        masks = [empty if t is None else t for t in targets]
        masks = [m if m.dtype == np.float32 else m.astype(np.uint8) for m in masks]
        mirrored = False
        if self.augment:
            plan = self.data.augmentation.draw(rng, case.modality)
            inputs = [move(volume, plan, order=1) for volume in inputs]
            inputs[0] = change_intensity(inputs[0], plan)
            masks = [move(m, plan, order=0 if m.dtype == np.uint8 else 1) for m in masks]
            mirrored = plan.mirror
        known = [t is not None for t in targets]
        if self.data.arteries:
            labels, named = masks.pop(), known.pop() and not (targets[-1] == UNNAMED_VESSEL).any()
            labels = mirrored_vessel_labels(labels) if mirrored else labels
            masks += [labels == label for label in VESSEL_LABEL]
            known += [named] * len(VESSEL_LABEL)
        target = np.stack(masks).astype(np.float32)
        drawn: list[Any] = [np.stack(inputs).astype(np.float32), target, np.array(known)]
        if self.data.beside is not None:
            drawn.append(self.data.beside(target))
        return tuple(map(torch.from_numpy, drawn))
