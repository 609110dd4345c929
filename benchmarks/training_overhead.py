"""A training step through our modules and Lightning against a bare PyTorch loop on the same net and data.

    OMP_NUM_THREADS=1 python benchmarks/training_overhead.py [outputs] [--stages vessel expert] [--repeats 3]

The bare loop has the same net, loss, optimiser, schedule, clipping, draws and validation, and no logging,
checkpoint, callback or hook. Both run in one process and take turns, one step each, so that a busy machine
slows both alike. They start from the same weights; that they end with the same ones is checked, so they did
the same work. `step` is the median over steps of the time of one here over the same one there, fetching its
batch included. `epoch end` is what the last step of an epoch takes more here, with validation on both sides
and checkpoint and logs on ours. `whole` is everything from the first epoch's start to the last one's end.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Semaphore, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from demo_stages import NEURAL, StageFit, demo, stage_fit
from lightning.pytorch import LightningDataModule, seed_everything
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aneurysm.build import build
from aneurysm.runs.fit import fit
from aneurysm.runs.folders import StageRun
from aneurysm.runs.step_seeds import StepSeeds
from aneurysm.stages.segmentation import SegmentationModule

TARGET = 1.05  # Lightning / bare, at most
OURS, BARE = 0, 1
EMPTY = "empty"  # a stage whose step does next to nothing: what is left is the loop itself


class Turns:
    """Two trainings in two threads that take turns, and the seconds that each of them has used."""

    def __init__(self) -> None:
        self.may_go = (Semaphore(0), Semaphore(0))
        self.finished = [False, False]
        self.wall: tuple[list[float], list[float]] = [], []  # seconds of every turn
        self.cpu: tuple[list[float], list[float]] = [], []
        self.mark = (0.0, 0.0)

    def start(self, me: int, first: bool = False) -> None:
        """Wait for the first turn, unless this one begins."""
        if not first:
            self.may_go[me].acquire()
        self.mark = time.perf_counter(), time.thread_time()

    def step(self, me: int) -> None:
        """Let the other one take a step."""
        self._count(me)
        if not self.finished[1 - me]:
            self.may_go[1 - me].release()
            self.may_go[me].acquire()
        torch.manual_seed(len(self.cpu[me]))  # dropout draws from the generator that both share
        self.mark = time.perf_counter(), time.thread_time()

    def finish(self, me: int) -> None:
        """The other one goes on alone."""
        self._count(me)
        self.finished[me] = True
        self.may_go[1 - me].release()

    def _count(self, me: int) -> None:
        self.wall[me].append(time.perf_counter() - self.mark[0])
        self.cpu[me].append(time.thread_time() - self.mark[1])


def main() -> None:
    """Measure every stage and print one row each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"))
    parser.add_argument("--stages", nargs="+", choices=(EMPTY, *NEURAL), default=[EMPTY, *NEURAL])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="of every training")
    parser.add_argument("--steps", type=int, help="per epoch; the demo's own when left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("aneurysm").setLevel(logging.WARNING)
    experiment = demo(arguments.outputs)
    print(
        "| stage | steps | bare, CPU ms | ours | step, ms more | step, CPU | step, wall | epoch end, ms more "
        "| steps per epoch | whole, CPU | setup s | same weights |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for stage in arguments.stages:

        def made(stage: str = stage) -> StageFit:
            if stage == EMPTY:
                return empty_fit(experiment.cfg, arguments.steps or 200)
            one: Any = stage_fit(experiment, stage)
            if arguments.steps and stage != "smart_net":
                one.data.steps = arguments.steps
            return one

        compare(made, arguments.repeats, arguments.epochs)


def compare(make: Callable[[], StageFit], repeats: int, epochs: int) -> None:
    """One row: medians over the repeats."""
    runs, same, setups, stage = [], True, [], ""
    for _ in range(repeats):
        ours, bare, turns = make(), make(), Turns()
        stage = ours.stage
        other = Thread(target=bare_loop, args=(bare, epochs, turns))
        other.start()
        setups.append(through_lightning(ours, epochs, turns))
        other.join()
        same = same and _equal(ours.module, bare.module)
        runs.append(turns)
    # Turn 0 fetches the first batch; turn t > 0 takes step t - 1 and fetches the next batch.
    turns_each = len(runs[0].cpu[BARE]) - 1
    per_epoch = turns_each // epochs
    inner = [t for t in range(1, turns_each + 1) if t % per_epoch]
    ends = [t for t in range(1, turns_each + 1) if t % per_epoch == 0]

    def ratio(seconds: str, turns: list[int]) -> float:
        pairs = [getattr(run, seconds) for run in runs]
        return statistics.median(p[OURS][t] / p[BARE][t] for p in pairs for t in turns)

    def each(me: int, turns: list[int]) -> float:
        return 1e3 * statistics.median(run.cpu[me][t] for run in runs for t in turns)

    def excess(turns: list[int]) -> float:
        return 1e3 * statistics.median(run.cpu[OURS][t] - run.cpu[BARE][t] for run in runs for t in turns)

    whole = [sum(run.cpu[OURS]) / sum(run.cpu[BARE]) for run in runs]
    print(
        f"| {stage} | {len(inner)} x {len(runs)} | {each(BARE, inner):.1f} | {each(OURS, inner):.1f} "
        f"| {excess(inner):.2f} | {ratio('cpu', inner):.3f} | {ratio('wall', inner):.3f} "
        f"| {excess(ends):.0f} | {per_epoch} "
        f"| {statistics.median(whole):.3f} | {statistics.median(setups):.2f} | {'yes' if same else 'NO'} |",
        flush=True,
    )


class EmptyData(LightningDataModule):
    """One voxel per patch."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        ones = torch.ones(4 * steps, 1, 1, 1, 1)
        self.patches = TensorDataset(ones, ones, torch.ones(4 * steps, 1, dtype=torch.bool))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.patches, batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.patches, batch_size=len(self.patches))


def empty_fit(cfg: DictConfig, steps: int) -> StageFit:
    """A segmentation stage whose network has two weights."""
    torch.manual_seed(0)
    module = SegmentationModule(nn.Conv3d(1, 1, 1), build(cfg.loss), 1e-3, 0.0, 2 * steps)
    return StageFit(EMPTY, module, EmptyData(steps), 1, cfg)


def through_lightning(one: StageFit, epochs: int, turns: Turns) -> float:
    """`runs.fit.fit` as training calls it; seconds until its first epoch."""
    module: Any = one.module
    begin, next_step, end = module.on_train_start, module.on_train_batch_start, module.on_train_end
    called, ready = time.perf_counter(), []

    def started() -> None:
        begin()
        ready.append(time.perf_counter())
        turns.start(OURS, first=True)

    def steps(batch: Any, index: int) -> Any:
        turns.step(OURS)
        return next_step(batch, index)

    def ended() -> None:
        turns.finish(OURS)
        end()

    module.on_train_start, module.on_train_batch_start, module.on_train_end = started, steps, ended
    with tempfile.TemporaryDirectory() as folder:
        fit(StageRun(one.stage, 0, Path(folder), "benchmark"), one.module, one.data, epochs, one.cfg)
    return ready[0] - called


def bare_loop(one: StageFit, epochs: int, turns: Turns) -> None:
    """The same training written out by hand."""
    module: Any = one.module
    data: Any = one.data
    turns.start(BARE)
    seed_everything(one.cfg.seed * 1000, verbose=False)
    setup = module.configure_optimizers()
    optimiser, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    loss_of = LOSS[one.stage]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    step = 0
    seeds = StepSeeds(int(one.cfg.seed), 0)  # the same dropout, to end with the same weights
    for epoch in range(epochs):
        trainer: Any = SimpleNamespace(
            current_epoch=epoch, world_size=1, global_rank=0, global_step=step,
            fit_loop=SimpleNamespace(restarting=False),
        )  # fmt: skip
        data.trainer = trainer
        module.train()
        for index, batch in enumerate(data.train_dataloader()):
            turns.step(BARE)
            seeds.on_train_batch_start(trainer, module, batch, index)
            optimiser.zero_grad(set_to_none=True)
            loss = loss_of(module, batch, epoch, index, step, "train")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            step += 1
        module.eval()
        with torch.no_grad():
            for index, batch in enumerate(data.val_dataloader()):
                loss_of(module, batch, epoch, index, step, "val")
    turns.finish(BARE)


def _segmentation(module: Any, batch: Any, epoch: int, index: int, step: int, split: str) -> Tensor:
    inputs, target, known = batch
    return module.loss(module.net(inputs), target, known)[0]


def _pretrain(module: Any, image: Tensor, epoch: int, index: int, step: int, split: str) -> Tensor:
    key = np.random.SeedSequence([module.seed, epoch if split == "train" else 10**6, index]).generate_state(1)
    generator = torch.Generator().manual_seed(int(key[0]))
    active = module.masking(None, tuple(image.shape), step / module.total_steps, generator)
    return module.net(image, active).loss


def _graph(module: Any, batch: Any, epoch: int, index: int, step: int, split: str) -> Tensor:
    logits = module.net(batch.x, batch.edge_index, batch.edge_attr, batch.batch)
    return module.loss(logits, batch.y)[0]


def _expert(module: Any, batch: Any, epoch: int, index: int, step: int, split: str) -> Tensor:
    inputs, target = batch
    progress = step / module.total_steps if split == "train" else 1.0
    return module.balance(module.terms(module.net(inputs, progress=progress), target))[0]


LOSS: dict[str, Callable[..., Tensor]] = {
    "pretrain": _pretrain,
    EMPTY: _segmentation,
    "vessel": _segmentation,
    "segmenter": _segmentation,
    "smart_net": _graph,
    "expert": _expert,
}


def _equal(a: nn.Module, b: nn.Module) -> bool:
    bare = b.state_dict()
    return all(torch.equal(v, bare[k]) for k, v in a.state_dict().items() if isinstance(v, Tensor))


if __name__ == "__main__":
    main()
