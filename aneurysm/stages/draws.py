"""Which training examples make a batch: a function of (epoch, step, process) alone.

An epoch is `steps` batches of numbered draws; what draw i holds is a function of (seed, epoch, i). Batch t of
an epoch is draws [t b W, (t + 1) b W) for W processes of b draws each, so two processes see together what one
process with twice the batch sees, and a training that goes on at step t meets what it would have met.
"""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import Sampler

from aneurysm.stages.processes import rank, world


class DrawnBatches(Sampler[list[int]]):
    """The numbers of the draws in every batch of one epoch, for one process.

    Args:
        steps: batches per epoch and process.
        batch: draws per batch and process.
        first: batches that are done already, when a training goes on within an epoch. The length stays
            `steps`, because Lightning counts from the start of the epoch.
        rank: number of this process.
        world: number of processes.
        total: draws there are, None for no end. The last batch then has what is left, dealt evenly to the
            processes; should there be fewer draws than processes, those without one repeat one of the
            first, as every process has to take every step.
    """

    def __init__(
        self, steps: int, batch: int, first: int = 0, rank: int = 0, world: int = 1, total: int | None = None
    ) -> None:
        if not 0 <= rank < world or batch < 1 or first < 0:
            raise ValueError(
                f"No such part of an epoch: batch {batch}, first {first}, rank {rank} of {world}."
            )
        self.steps, self.batch, self.first = steps, batch, first
        self.rank, self.world, self.total = rank, world, total

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            together = self.world * self.batch
            begin = step * together
            if self.total is not None:
                together = max(0, min(together, self.total - begin))
            low, high = (begin + together * r // self.world for r in (self.rank, self.rank + 1))
            yield list(range(low, high)) or [self.rank % (self.total or self.world)]


def drawn_batches(trainer: Trainer | None, steps: int, batch: int, total: int | None = None) -> DrawnBatches:
    """The batches of the epoch that `trainer` is about to train, for this process.

    An epoch that is gone on with begins after the batches that the checkpoint counts as done.
    """
    first = 0
    if trainer is not None and trainer.fit_loop.restarting:
        done: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        first = done.processed
    return DrawnBatches(steps, batch, first, rank(), world(), total)
