"""Stage 1, pretrain: the WaveFormer backbone learns anatomy by filling in what a mask hides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from aneurysm.data.augment import Augmentation, move
from aneurysm.global_batch import gather, own_rows, rows_in_all
from aneurysm.nets.masking import AnatoMask, RandomBlocks, teacher_decay
from aneurysm.nets.reconstruction import MaskedReconstruction, mean_error
from aneurysm.stages.draws import DrawnBatches, drawn_batches
from aneurysm.stages.patches import network_patch
from aneurysm.stages.processes import rank, world
from aneurysm.stages.step import StageModule, StepOutput, adamw_one_cycle, log_step
from aneurysm.stages.stored import case_at, fit_in_memory
from aneurysm.stages.workers import in_workers

# Geometry only: the task is to reconstruct intensities, so they stay what they are.
AUGMENTATION = Augmentation(flip_chance=0.5)


class PretrainModule(StageModule):
    """Masked reconstruction: hide blocks, reconstruct them, learn from hidden voxels alone.

    With `AnatoMask` a teacher, the moving average of the network, says which blocks are hard.
    """

    def __init__(
        self,
        net: MaskedReconstruction,
        masking: RandomBlocks,
        lr: float,
        weight_decay: float,
        total_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.net, self.masking, self.seed = net, masking, seed
        self.lr, self.weight_decay, self.total_steps = lr, weight_decay, total_steps
        self.teacher = None
        if isinstance(masking, AnatoMask):
            self.teacher = AveragedModel(net, avg_fn=self._average, use_buffers=True)
            self.teacher.requires_grad_(False)

    @property
    def progress(self) -> float:
        """Share of the training done, 0..1."""
        return min(1.0, self.global_step / max(1, self.total_steps))

    def _average(self, kept: Tensor, new: Tensor, count: Any) -> Tensor:
        done = min(1.0, (self.global_step + 1) / max(1, self.total_steps))  # this step is counted later
        return torch.lerp(new, kept, teacher_decay(done))

    def loss(self, image: Tensor, index: int, split: str) -> Tensor:
        # The mask is a function of (seed, epoch, step), so that a resumed run hides the same blocks; it is
        # drawn for the whole batch, of which every process has its part.
        epoch = self.current_epoch if split == "train" else 10**6
        key = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(key))
        shape, hardness = (rows_in_all(image), *image.shape[1:]), None
        if self.teacher is not None:
            with torch.no_grad():
                seen = own_rows(self.masking(None, shape, self.progress, generator)).to(image.device)
                (hardness,) = gather(self.teacher(image, seen).per_block_loss)
        active = own_rows(self.masking(hardness, shape, self.progress, generator)).to(image.device)
        output = self.net(image, active)
        return mean_error(*gather(output.squared_error, output.hidden_voxels))

    def _step(self, image: Tensor, index: int, split: str) -> Tensor:
        return log_step(self, StepOutput(self.loss(image, index, split)), split, rows_in_all(image))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Not at the batch's end: a module's turn comes after the checkpoint there, which would miss it.
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.update_parameters(self.net)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self._step(batch, index, "train")

    def validation_step(self, batch: Tensor, index: int) -> Tensor:
        return self._step(batch, index, "val")

    def configure_optimizers(self) -> Any:
        return adamw_one_cycle(self.net.parameters(), self.lr, self.weight_decay, self.total_steps)


@torch.no_grad()
def held_out_loss(module: PretrainModule, data: "PretrainData") -> float:
    """Mean reconstruction loss over the crops of held-out scans; NaN when none is held out."""
    module.eval()
    device = next(module.net.parameters()).device
    losses, counts = [], []
    for index, image in enumerate(data.val_dataloader()):
        losses.append(float(module.loss(image.to(device), index, "val")))
        counts.append(len(image))  # a last batch that is smaller counts less
    return float(np.average(losses, weights=counts)) if losses else float("nan")


class PretrainData(LightningDataModule):
    """Random crops of training scans; no label is read."""

    def __init__(
        self,
        train: Sequence[Path],
        held_out: Sequence[Path],
        patch: int,
        batch: int,
        steps: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.held_out = list(train), list(held_out)
        self.patch, self.batch, self.steps, self.seed, self.workers = patch, batch, steps, seed, workers
        self.whole = fit_in_memory([*self.train, *self.held_out], processes=workers)

    def train_dataloader(self) -> DataLoader[Tensor]:
        epoch = self.trainer.current_epoch if self.trainer else 0
        key = (self.seed, epoch)
        crops = CropDataset(
            self.train, self.batch * self.steps, self.patch, key, augment=True, whole=self.whole
        )
        batches = drawn_batches(self.trainer, self.steps if self.train else 0, self.batch)
        return DataLoader(crops, batch_sampler=batches, **in_workers(self.workers))

    def val_dataloader(self) -> DataLoader[Tensor]:
        key = (self.seed, 10**6)
        crops = CropDataset(self.held_out, 4 * self.batch, self.patch, key, augment=False, whole=self.whole)
        batches = DrawnBatches(4 if self.held_out else 0, self.batch, rank=rank(), world=world())
        return DataLoader(crops, batch_sampler=batches, **in_workers(self.workers))


class CropDataset(Dataset):
    """Crop i of an epoch is a function of (seed, epoch, i) alone."""

    def __init__(
        self,
        paths: list[Path],
        count: int,
        patch: int,
        key: tuple[int, int],
        augment: bool,
        whole: bool,
    ) -> None:
        self.paths, self.count, self.patch, self.key = paths, count, patch, key
        self.augment, self.whole = augment, whole

    def __len__(self) -> int:
        return self.count if self.paths else 0

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng((*self.key, index))
        case = case_at(self.paths[int(rng.integers(len(self.paths)))], self.whole)
        room = np.maximum(np.array(case.grid.shape) - self.patch, 0)
        start = np.array([int(rng.integers(n + 1)) for n in room])
        patch = network_patch(case, start, self.patch)
        if self.augment:
            patch = move(patch, AUGMENTATION.draw(rng, case.modality), order=1)
        return torch.from_numpy(np.ascontiguousarray(patch, dtype=np.float32))[None]
