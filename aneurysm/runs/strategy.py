"""How a fit is spread over the processes that train together, in Lightning's terms."""

import os
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from omegaconf import DictConfig

from aneurysm.global_batch import over_all_processes
from aneurysm.stages.processes import neighbours, world


def placement(trainer: DictConfig, module: LightningModule, files: CheckpointIO) -> dict[str, Any]:
    """Arguments of Lightning's Trainer that say where a module is trained.

    A module without parameters, such as the stacker, is trained by whichever process calls.
    """
    # Named, or Lightning would find SLURM or torchrun by itself: it then counts their processes, and requeues
    # the job in its own way.
    alone = {
        "accelerator": trainer.accelerator,
        "devices": 1,
        "plugins": [files, LightningEnvironment()],
    }
    if world() == 1 or not any(p.requires_grad for p in module.parameters()):
        return alone
    over_all_processes(module)
    if is_sharded(trainer):
        strategy: Any = ModelParallelStrategy(
            data_parallel_size=world(), tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    else:
        # Frozen parts, absent modalities and losses without labels leave parameters without a gradient.
        # Buffers are equal everywhere without being sent: they are computed over the whole batch.
        strategy = DDPStrategy(find_unused_parameters=True, forward_sync_buffers=False)
    return {
        "accelerator": trainer.accelerator,
        "devices": neighbours(),
        "num_nodes": world() // neighbours(),
        "strategy": strategy,
        "plugins": [files, Joined()],
        "use_distributed_sampler": False,  # the loaders draw every process's part themselves
    }


def is_sharded(trainer: DictConfig) -> bool:
    """Whether every process keeps only a part of the weights and of the optimiser's state.

    PyTorch's `fully_shard` through Lightning's ModelParallelStrategy: its FSDPStrategy cannot clip gradients
    by their norm, and flattens the parameters, whose dimensions decide about their decay.
    """
    return trainer.strategy == "fsdp" and world() > 1


class Joined(ClusterEnvironment):
    """Tells Lightning that the group is there already, whoever started it."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return dist.is_initialized()

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        return dist.get_rank() // neighbours()
