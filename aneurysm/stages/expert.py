"""Stage 4, expert: looks closely at every candidate and says whether, where, which voxels and how sure.

Four losses (classification, segmentation, location, physics) share one network; their balance is a
module of its own. A task whose labels are unknown in a batch is left out of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from aneurysm.data.labels import LOCATIONS
from aneurysm.data.scan import Grid
from aneurysm.data.tables import LOCATION_KEYS
from aneurysm.global_batch import gather, total
from aneurysm.losses.classification import BinaryLoss, LocationLoss, OffsetLoss
from aneurysm.nets.expert import ExpertBatch, ExpertNet, ExpertOutput, FlowReading
from aneurysm.physics.head import PhysicsHead
from aneurysm.physics.soap import SOAP
from aneurysm.stages.draws import drawn_batches, every_draw_once
from aneurysm.stages.findings import CropSettings, Finding, Target, collate, example, remember
from aneurysm.stages.step import StageModule, StepOutput, adamw_one_cycle, log_step
from aneurysm.stages.workers import in_workers

# Columns of the expert's table, and which feature of the physics head they hold.
FLOW_COLUMNS = {
    "flow_coherence": "coherence",
    "flow_nematic_order": "nematic_order",
    "flow_backflow": "backflow_fraction",
    "flow_slow": "slow_fraction",
    "flow_energy": "kinetic_energy_ratio",
    "flow_wall_shear_pa": "wall_shear_pa",
    "flow_low_shear": "low_shear_fraction",
    "flow_flux_error": "flux_error",
}
SHOWN = 48  # held-out candidates in the validation curve, about


class ExpertModule(StageModule):
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
        physics_optimiser: str = "soap",
        physics_lr: float = 3e-3,
    ) -> None:
        super().__init__()
        if physics_optimiser not in ("soap", "adamw"):
            raise ValueError(f"physics_optimiser is soap or adamw, got {physics_optimiser!r}.")
        self.physics_optimiser, self.physics_lr = physics_optimiser, physics_lr
        self.net, self.balance, self.mask_loss = net, balance, mask_loss
        self.lr, self.weight_decay, self.total_steps = lr, weight_decay, total_steps
        self.freeze_steps = freeze_epochs * steps_per_epoch
        self.classify, self.locate, self.place = BinaryLoss(smoothing=0.02), LocationLoss(), OffsetLoss()

    def terms(self, output: ExpertOutput, target: Target) -> dict[str, Tensor]:
        """The four losses over the whole batch, of which every process passes its part.

        A loss over no labels is an exact zero, which the balance leaves out.
        """
        n = len(target.is_aneurysm)  # fewer than crops where a crop only keeps this process in step
        logit, location, mask, offset = gather(
            output.logit[:n], output.location_logits[:n], output.mask_logit[:n], output.offset_mm[:n]
        )
        names = tuple(vars(target))
        target = Target(**dict(zip(names, gather(*vars(target).values()), strict=True)))
        terms = {
            "classification": self.classify(logit, target.is_aneurysm)[0],
            "segmentation": self.mask_loss(mask, target.mask, target.mask_known)[0],
            "location": self.locate(location, target.location)[0] + self.place(offset, target.offset_mm)[0],
        }
        if output.physics is not None:
            loss, valid = gather(output.physics.loss[:n], output.physics.valid[:n])
            if bool(valid.any()):
                # The gradient was made in the same sweep as the loss, as that of one sum.
                slope = total(output.physics.total) / valid.sum()
                mean = torch.log1p(loss[valid]).mean()
                terms["physics"] = (mean + slope - slope.detach()).to(logit.dtype)
        return terms

    def _step(self, batch: tuple[ExpertBatch, Target], split: str) -> Tensor:
        inputs, target = batch
        # The physics curriculum follows training; held-out data are judged by the finished equations.
        progress = self.global_step / max(1, self.total_steps) if split == "train" else 1.0
        output = self.net(inputs, progress=progress)
        terms = self.terms(output, target)
        loss, weights = self.balance(terms)
        logged = {
            **terms,
            **{f"weight/{name}": w for name, w in weights.items()},
            **synchronisation(output),
            **flow_state(self.net.physics, output, progress),
        }
        step = StepOutput(loss, {name: value.detach() for name, value in logged.items()})
        (rows,) = gather(target.is_aneurysm)
        return log_step(self, step, split, len(rows))

    def training_step(self, batch: tuple[ExpertBatch, Target], index: int) -> Tensor:
        frozen = self.global_step < self.freeze_steps
        for parameter in self.net.backbone.pretrained_parameters():
            parameter.requires_grad_(not frozen)
        self.net.backbone.patch_embed.requires_grad_(False)  # the fusion's stems replace it
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[ExpertBatch, Target], index: int) -> Tensor:
        return self._step(batch, "val")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        inputs, target = batch
        moved = {name: value.to(device) for name, value in vars(target).items()}
        return inputs.to(device), Target(**moved)

    def configure_optimizers(self) -> Any:
        head = self.net.physics
        apart = {}
        # A process that holds parts of the matrices has no basis of them: sharded nets are left to AdamW.
        sharded = head is not None and any(isinstance(p, DTensor) for p in head.parameters())
        if head is not None and self.physics_optimiser == "soap" and not sharded:
            # Residuals are stiff: Adam needs ten times the steps. No decay, it would slow the blood down.
            apart[SOAP(list(head.parameters()), lr=self.physics_lr)] = self.physics_lr
        return adamw_one_cycle(self.parameters(), self.lr, self.weight_decay, self.total_steps, apart)


def synchronisation(output: ExpertOutput) -> dict[str, Tensor]:
    """How far the last oscillators agree, and how they got there: means over this process's crops.

    Energies are per oscillator: `start` before the first step, `fall` from there to before the last one.
    """
    if not output.oscillators:
        return {}
    state = output.oscillators[-1]
    return {
        "oscillators/order_parameter": state.order_parameter.mean(),
        "oscillators/energy_start": state.energies[0].mean(),
        "oscillators/energy_fall": (state.energies[0] - state.energies[-1]).mean(),
        "oscillators/lyapunov_fall": (state.lyapunov[0] - state.lyapunov[-1]).mean(),
    }


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
        batches = drawn_batches(self.trainer, self.steps if self.train else 0, self.batch)
        return DataLoader(data, batch_sampler=batches, collate_fn=collate, **in_workers(self.workers))

    def val_dataloader(self) -> DataLoader:
        # A part is enough for a curve; the held-out figures come from all of them, after training.
        step = max(1, len(self.held_out) // SHOWN)
        data = FixedFindings(self.held_out[::step], self.settings)
        batches = every_draw_once(len(data), self.batch)
        return DataLoader(
            data, batch_sampler=batches, collate_fn=data.collate_or_keep_step, **in_workers(self.workers)
        )


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

    def collate_or_keep_step(self, items: list[tuple[ExpertBatch, Target]]) -> tuple[ExpertBatch, Target]:
        """As `collate`; where nothing is left for this process, a crop without a row of targets."""
        if items:
            return collate(items)
        inputs, target = self[0]
        return inputs, Target(**{name: value[:0] for name, value in vars(target).items()})


def flow_state(head: nn.Module | None, output: ExpertOutput, progress: float) -> dict[str, Tensor]:
    """Where the physics curriculum stands, and for how many of this process's crops blood flows."""
    reading = output.physics
    if reading is None or not isinstance(head, PhysicsHead):
        return {}
    weights = head.curriculum.at(progress)
    return {
        "flow/valid": reading.valid.float().mean(),
        "flow/driven": reading.driven.float().mean(),
        "flow/momentum_weight": torch.full_like(output.logit[0], weights.momentum),
        "flow/reynolds_cap": torch.full_like(output.logit[0], weights.reynolds_cap),
    }


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
        flow: Any = output.physics
        head = net.physics
        if flow is not None and isinstance(head, PhysicsHead) and head.refine_steps:
            latent: Any = net.to_latent
            places: Any = inputs.to(device).flow
            flow = head.refine(latent(output.embedding), places)
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
                    **flow_columns(flow if valid else None, i),
                    "volume_mm3": float((mask[i] >= 0.5).sum() * one.case.grid.voxel_mm3),
                }
            )
            masks.append(mask[i])
    return pd.DataFrame(rows), masks


def flow_columns(flow: FlowReading | None, row: int) -> dict[str, float]:
    """What the physics head says of a candidate, for the expert's table; NaN without flow."""
    if flow is None:
        return {"has_flow": 0.0} | dict.fromkeys(("flow_driven", "physics_residual", *FLOW_COLUMNS), np.nan)
    named = dict(zip(PhysicsHead.FEATURES, flow.features[row].tolist(), strict=True))
    return {
        "has_flow": 1.0,
        "flow_driven": float(flow.driven[row]),
        "physics_residual": float(flow.residual_log10[row]),
        **{column: named[name] for column, name in FLOW_COLUMNS.items()},
    }


def inside(grid: Grid, position_mm: np.ndarray) -> np.ndarray:
    """The nearest position within the scan."""
    index = np.clip(grid.to_index(position_mm), 0, np.array(grid.shape) - 1)
    return grid.to_mm(index)
