"""Stage 4, expert: looks closely at every candidate and says whether, where, which voxels and how sure.

Four losses (classification, segmentation, location, physics) share one network; their balance is a
module of its own. A task whose labels are unknown in a batch is left out of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from aneurysm.data.labels import LOCATIONS
from aneurysm.data.scan import Grid
from aneurysm.data.tables import LOCATION_KEYS
from aneurysm.losses.classification import BinaryLoss, LocationLoss, OffsetLoss
from aneurysm.nets.expert import ExpertBatch, ExpertNet, ExpertOutput
from aneurysm.stages.findings import CropSettings, Finding, Target, collate, example, remember
from aneurysm.stages.step import StepOutput, adamw_one_cycle, log_step

SHOWN = 48  # held-out candidates in the validation curve, about


class ExpertModule(LightningModule):
    """Fits the expert on four tasks."""

    def __init__(
        self,
        net: ExpertNet,
        balance: nn.Module,
        mask_loss: nn.Module,
        lr: float,
        weight_decay: float,
        total_steps: int,
        steps_per_epoch: int,
        freeze_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.balance, self.mask_loss = net, balance, mask_loss
        self.lr, self.weight_decay, self.total_steps = lr, weight_decay, total_steps
        self.freeze_steps = freeze_epochs * steps_per_epoch
        self.classify, self.locate, self.place = BinaryLoss(smoothing=0.02), LocationLoss(), OffsetLoss()

    def terms(self, output: ExpertOutput, target: Target) -> dict[str, Tensor]:
        """The four losses; a loss over no labels is an exact zero, which the balance leaves out."""
        terms = {
            "classification": self.classify(output.logit, target.is_aneurysm)[0],
            "segmentation": self.mask_loss(output.mask_logit, target.mask, target.mask_known)[0],
            "location": self.locate(output.location_logits, target.location)[0]
            + self.place(output.offset_mm, target.offset_mm)[0],
        }
        if output.physics is not None and bool(output.physics.valid.any()):
            # Residuals range over decades; one badly conditioned vessel must not drown three other tasks.
            residual = torch.log1p(output.physics.loss[output.physics.valid])
            terms["physics"] = residual.mean().to(output.logit.dtype)
        return terms

    def _step(self, batch: tuple[ExpertBatch, Target], split: str) -> Tensor:
        inputs, target = batch
        # The physics curriculum follows training; held-out data are judged by the finished equations.
        progress = self.global_step / max(1, self.total_steps) if split == "train" else 1.0
        terms = self.terms(self.net(inputs, progress=progress), target)
        total, weights = self.balance(terms)
        logged = {**terms, **{f"weight/{name}": w for name, w in weights.items()}}
        output = StepOutput(total, {name: value.detach() for name, value in logged.items()})
        return log_step(self, output, split, len(inputs.image))

    def training_step(self, batch: tuple[ExpertBatch, Target], index: int) -> Tensor:
        frozen = self.global_step < self.freeze_steps
        backbone: Any = self.net.backbone
        for name, parameter in backbone.named_parameters():
            if not name.startswith("patch_embed"):  # the fusion's stems replace it
                parameter.requires_grad_(not frozen)
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[ExpertBatch, Target], index: int) -> Tensor:
        return self._step(batch, "val")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        inputs, target = batch
        moved = {name: value.to(device) for name, value in vars(target).items()}
        return inputs.to(device), Target(**moved)

    def configure_optimizers(self) -> Any:
        return adamw_one_cycle(self.parameters(), self.lr, self.weight_decay, self.total_steps)


class ExpertData(LightningDataModule):
    """Crops around candidates, with a fixed share of aneurysms per batch."""

    def __init__(
        self,
        train: Sequence[Finding],
        held_out: Sequence[Finding],
        settings: CropSettings,
        batch: int,
        steps: int,
        positive_share: float,
        jitter_mm: float,
        seed: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.held_out, self.settings = list(train), list(held_out), settings
        self.batch, self.steps, self.positive_share = batch, steps, positive_share
        self.jitter_mm, self.seed, self.workers = jitter_mm, seed, workers

    def setup(self, stage: str | None = None) -> None:
        # Loader processes end with their epoch, and what they have worked out ends with them.
        for one in self.train if self.workers else ():
            remember(one, self.settings)

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch if self.trainer else 0
        data = DrawnFindings(self, (self.seed, epoch))
        return DataLoader(data, batch_size=self.batch, num_workers=self.workers, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        # A part is enough for a curve; the held-out figures come from all of them, after training.
        step = max(1, len(self.held_out) // SHOWN)
        data = FixedFindings(self.held_out[::step], self.settings)
        return DataLoader(data, batch_size=self.batch, num_workers=self.workers, collate_fn=collate)


class DrawnFindings(Dataset):
    """Draw i of an epoch is a function of (seed, epoch, i) alone."""

    def __init__(self, data: ExpertData, key: tuple[int, int]) -> None:
        self.data, self.key = data, key
        self.positive = [f for f in data.train if f.is_aneurysm == 1]
        self.other = [f for f in data.train if f.is_aneurysm != 1]

    def __len__(self) -> int:
        return self.data.batch * self.data.steps if self.data.train else 0

    def __getitem__(self, index: int) -> tuple[ExpertBatch, Target]:
        rng = np.random.default_rng((*self.key, index))
        positive = self.positive and (not self.other or rng.random() < self.data.positive_share)
        pool = self.positive if positive else self.other
        one = pool[int(rng.integers(len(pool)))]
        shift = rng.uniform(-self.data.jitter_mm, self.data.jitter_mm, 3)
        return example(one, self.data.settings, shift_mm=shift, rng=rng)


class FixedFindings(Dataset):
    """Every finding once, unchanged."""

    def __init__(self, found: Sequence[Finding], settings: CropSettings) -> None:
        self.found, self.settings = list(found), settings

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> tuple[ExpertBatch, Target]:
        return example(self.found[index], self.settings)


@torch.no_grad()
def judge(
    net: nn.Module, found: list[Finding], settings: CropSettings, fold: int, seed: int, batch: int = 16
) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """The expert's rows for these candidates, and the sac probability of every crop, (crop, crop, crop)."""
    net.eval()
    device = next(net.parameters()).device
    rows, masks = [], []
    for begin in range(0, len(found), batch):
        part = found[begin : begin + batch]
        inputs, _ = collate([example(f, settings) for f in part])
        output: ExpertOutput = net(inputs.to(device))
        p = torch.sigmoid(output.logit).cpu().numpy()
        mask = torch.sigmoid(output.mask_logit[:, 0]).cpu().numpy()
        flow = output.physics
        for i, one in enumerate(part):
            offset = output.offset_mm[i].cpu().numpy().astype(np.float64)
            place = inside(one.case.grid, one.centre_mm + offset)
            valid = flow is not None and bool(flow.valid[i])
            rows.append(
                {
                    "series_uid": one.case.series_uid,
                    "candidate": one.number,
                    "fold": fold,
                    "seed": seed,
                    "x_mm": place[0],
                    "y_mm": place[1],
                    "z_mm": place[2],
                    "score": one.candidate.score,
                    "p": p[i],
                    **{
                        f"{key}_logit": float(output.location_logits[i, k])
                        for k, key in enumerate(LOCATION_KEYS[: len(LOCATIONS)])
                    },
                    "order_parameter": float(output.order_parameter[i]),
                    "physics_residual": float(flow.residual_log10[i]) if valid and flow else np.nan,
                    "flow_coherence": float(flow.coherence[i]) if valid and flow else np.nan,
                    "volume_mm3": float((mask[i] >= 0.5).sum() * one.case.grid.voxel_mm3),
                }
            )
            masks.append(mask[i])
    return pd.DataFrame(rows), masks


def inside(grid: Grid, position_mm: np.ndarray) -> np.ndarray:
    """The nearest position within the scan."""
    index = np.clip(grid.to_index(position_mm), 0, np.array(grid.shape) - 1)
    return grid.to_mm(index)
