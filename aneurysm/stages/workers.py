"""Processes that load data for a training."""

import signal
from typing import Any


def in_workers(workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader that has `workers` processes; 0 loads in the training process itself."""
    return {"num_workers": workers, "worker_init_fn": stay if workers else None}


def stay(worker: int) -> None:
    """A loader leaves when the training does, not before.

    A scheduler sends its signals to every process of a job, and a training whose loaders have died cannot
    finish its step.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
