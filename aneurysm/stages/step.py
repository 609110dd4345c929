"""What a training or validation step returns, and the learning-rate schedule that all stages share."""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard


@dataclass(frozen=True)
class StepOutput:
    """The minimised loss and the named parts that are logged beside it."""

    loss: Tensor  # scalar
    terms: dict[str, Tensor] = field(default_factory=dict)  # scalars


class StageModule(LightningModule):
    """A LightningModule whose networks can be spread over processes."""

    def configure_model(self) -> None:
        """Under `trainer=fsdp` every process keeps a part of each network and of what optimises it."""
        if self._device_mesh is None:
            return
        for part in self.children():
            if any(True for _ in part.parameters()) and not isinstance(part, FSDPModule):
                # Also after a forward pass without a backward one: a teacher's average is taken of parts.
                fully_shard(part, mesh=self._device_mesh["data_parallel"], reshard_after_forward=True)


def log_step(module: LightningModule, output: StepOutput, split: str, batch_size: int) -> Tensor:
    """Log a step's loss and terms as `<split>/<name>` and return the loss."""
    values = {f"{split}/loss": output.loss.detach(), **{f"{split}/{k}": v for k, v in output.terms.items()}}
    module.log_dict(values, on_step=False, on_epoch=True, batch_size=batch_size, sync_dist=True)
    return output.loss


def adamw_one_cycle(parameters: Any, lr: float, weight_decay: float, total_steps: int) -> dict[str, Any]:
    """AdamW under a one-cycle schedule: warm-up over a tenth of the steps, then cosine to zero.

    Biases, norms and other one-dimensional parameters are not decayed.
    """
    trainable = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    # The cycle divides by its phase lengths: very short trainings need a longer first phase.
    steps = max(total_steps, 4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=lr, total_steps=steps, pct_start=max(0.1, 2 / steps)
    )
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
