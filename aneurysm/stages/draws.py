"""Which training examples make a batch: a function of (epoch, step, process) alone.

An epoch is `steps` batches of numbered draws; what draw i holds is a function of (seed, epoch, i). Batch t of
an epoch is draws [t b W, (t + 1) b W) for W processes of b draws each, so two processes see together what one
process with twice the batch sees, and a training that goes on at step t meets what it would have met.
"""

from collections.abc import Iterator

from torch.utils.data import Sampler


class DrawnBatches(Sampler[list[int]]):
    """The numbers of the draws in every batch of one epoch, for one process.

    Args:
        steps: batches per epoch and process.
        batch: draws per batch and process.
        first: batches that are done already, when a training goes on within an epoch. The length stays
            `steps`, because Lightning counts from the start of the epoch.
        rank: number of this process.
        world: number of processes.
        total: draws there are; batches beyond are cut short or left out. None: no end.
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
            begin = (step * self.world + self.rank) * self.batch
            yield list(range(begin, min(begin + self.batch, self.total or begin + self.batch)))
