"""What a training or validation step returns, and the learning-rate schedule that all stages share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from aneurysm.stages.joint_optimiser import JointOptimiser


@dataclass(frozen=True)
class StepOutput:
    """The minimised loss and the named parts that are logged beside it."""

    loss: Tensor  # scalar
    terms: dict[str, Tensor] = field(default_factory=dict)  # scalars


Sums = dict[str, tuple[Tensor, int]]  # name -> sum of value times batch size, sum of batch sizes


def epoch_sums(module: LightningModule, split: str) -> Sums:
    """What the steps of the running epoch have added up for its means."""
    return module.__dict__.setdefault("_epoch_sums", {}).setdefault(split, {})


class StageModule(LightningModule):
    """A LightningModule whose networks can be spread over processes."""

    compiles = True  # whether `trainer.compile` pays for them

    def configure_model(self) -> None:
        """Under `trainer=fsdp` every process keeps a part of each network and of what optimises it."""
        if self._device_mesh is None:
            return
        for part in self.children():
            if any(True for _ in part.parameters()) and not isinstance(part, FSDPModule):
                for parameter in part.parameters():  # it cannot share out weights in channels-last layout
                    parameter.data = parameter.data.contiguous()
                # Also after a forward pass without a backward one: a teacher's average is taken of parts.
                fully_shard(part, mesh=self._device_mesh["data_parallel"], reshard_after_forward=True)


def log_step(module: LightningModule, output: StepOutput, split: str, batch_size: int) -> Tensor:
    """Add a step's loss and terms to the means of its epoch, logged as `<split>/<name>`; return the loss.

    Lightning would take a millisecond per value and step for the same means; it is handed them once, by the
    last step of the epoch.
    """
    sums = epoch_sums(module, split)
    for name, value in {"loss": output.loss, **output.terms}.items():
        total, weight = sums.get(name, (0.0, 0))
        sums[name] = torch.add(value.detach() * batch_size, total), weight + batch_size
    if _is_last(module, split):
        for name, (total, weight) in sums.items():
            module.log(
                f"{split}/{name}",
                total / weight,
                on_step=False,
                on_epoch=True,
                batch_size=weight,
                sync_dist=True,
            )
        sums.clear()
    return output.loss


def _is_last(module: LightningModule, split: str) -> bool:
    trainer = module.trainer
    if split == "train":
        return trainer.is_last_batch
    alone = trainer.state.fn == TrainerFn.VALIDATING  # `trainer.validate`, no training around it
    loop = trainer.validate_loop if alone else trainer.fit_loop.epoch_loop.val_loop
    return loop.batch_progress.is_last_batch


def adamw_one_cycle(
    parameters: Any,
    lr: float,
    weight_decay: float,
    total_steps: int,
    apart: Mapping[Optimizer, float] | None = None,
) -> dict[str, Any]:
    """AdamW under a one-cycle schedule: warm-up over a tenth of the steps, then cosine to zero.

    Biases, norms and other one-dimensional parameters are not decayed.

    Args:
        parameters: all that are trained; those that `apart` optimises are left out.
        apart: optimisers of some of the parameters, with their highest learning rates; they follow the same
            schedule.
    """
    taken = {id(p) for one in apart or {} for group in one.param_groups for p in group["params"]}
    trainable = [p for p in parameters if p.requires_grad and id(p) not in taken]
    optimiser: Optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    rates = [lr] * len(optimiser.param_groups)
    if apart:
        rates += [rate for one, rate in apart.items() for _ in one.param_groups]
        optimiser = JointOptimiser([optimiser, *apart])
    # The cycle divides by its phase lengths: very short trainings need a longer first phase.
    steps = max(total_steps, 4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=rates, total_steps=steps, pct_start=max(0.1, 2 / steps)
    )
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
