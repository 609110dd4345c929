"""How busy data loading keeps a device whose step takes 30 ms, with the demo's data and augmentation.

    OMP_NUM_THREADS=1 python benchmarks/training_loader.py [outputs] [--stages vessel expert] [--epochs 3]

The step is a sleep, so the device takes no CPU from the loader processes. `steady` is the device's share of
the time from the first batch of an epoch to its last; `epoch` counts from the moment the loader is asked
for, with the start of its processes and the first batch. `CPU ms` is what the loader processes used per
batch: with two of them on cores of their own, `possible` is the share that they could keep up. On a machine
that others use as well only these two are comparable from run to run.
"""

import argparse
import logging
import resource
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from demo_stages import demo, stage_fit

STAGES = ("pretrain", "vessel", "segmenter", "expert")
TARGET = 0.95  # of the device's time, at least


def main() -> None:
    """Measure every stage and print one row each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="per epoch; the demo's own when left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("aneurysm").setLevel(logging.WARNING)
    experiment = demo(arguments.outputs, f"trainer.workers={arguments.workers}")
    print("| stage | batch | steps | steady | epoch | first batch, s | CPU ms per batch | possible |")
    print("|---|---|---|---|---|---|---|---|")
    step = arguments.step_ms / 1e3
    for stage in arguments.stages:
        data: Any = stage_fit(experiment, stage).data
        data.steps = arguments.steps or data.steps
        data.setup("fit")
        epochs = [one_epoch(data, epoch, step) for epoch in range(arguments.epochs)]
        steady, whole, first, cpu = (statistics.median(x) for x in zip(*epochs, strict=True))
        possible = min(1.0, step * arguments.workers / cpu)
        print(
            f"| {stage} | {data.batch} | {data.steps} | {steady:.1%} | {whole:.1%} | {first:.2f} "
            f"| {1e3 * cpu:.1f} | {possible:.0%} |",
            flush=True,
        )


def one_epoch(data: Any, epoch: int, step: float) -> tuple[float, float, float, float]:
    """Shares of the device's time (steady, whole epoch), seconds to the first batch, CPU s per batch."""
    loop = SimpleNamespace(restarting=False)
    data.trainer = SimpleNamespace(current_epoch=epoch, world_size=1, global_rank=0, fit_loop=loop)
    before, called = _children(), time.perf_counter()
    batches = iter(data.train_dataloader())
    count, first, free = 0, 0.0, 0.0
    for _ in batches:
        # As a GPU: a step is handed over and the next batch fetched while it runs; the hand-over of the next
        # one waits for its end.
        time.sleep(max(0.0, free - time.perf_counter()))
        now = time.perf_counter()
        first, free = first or now, now + step
        count += 1
    time.sleep(max(0.0, free - time.perf_counter()))
    ended = time.perf_counter()
    del batches  # its processes end here, and only then is their CPU time known
    used = (_children() - before) / count
    return count * step / (ended - first), count * step / (ended - called), first - called, used


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
