"""Which operations of every stage give other last digits each time on a GPU, written to docs/determinism.md.

python benchmarks/determinism.py --write docs/determinism.md

No GPU is needed: the smallest experiment is trained on the CPU, every operation of its training steps, their
backward passes and the optimiser is listed by PyTorch's dispatcher, and the list is compared with the
operations that `torch.use_deterministic_algorithms` documents (torch 2.13).
"""

import argparse
import importlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch.utils._python_dispatch import TorchDispatchMode

from aneurysm.command_line import config_folder
from aneurysm.runs.folders import StageRun
from aneurysm.train import train

# Operation of the dispatcher -> what it belongs to, as the documentation lists them for CUDA tensors.
# These stop the run with trainer.deterministic=true: there is no other kernel.
NO_OTHER_KERNEL = {
    "avg_pool3d_backward": "backward of 3D average pooling",
    "_adaptive_avg_pool2d_backward": "backward of adaptive average pooling",
    "_adaptive_avg_pool3d_backward": "backward of adaptive average pooling",
    "adaptive_max_pool2d_backward": "backward of adaptive maximum pooling",
    "fractional_max_pool2d_backward": "backward of fractional maximum pooling",
    "fractional_max_pool3d_backward": "backward of fractional maximum pooling",
    "max_unpool2d": "unpooling",
    "max_unpool3d": "unpooling",
    "upsample_linear1d_backward": "backward of linear interpolation",
    "upsample_bilinear2d_backward": "backward of bilinear interpolation",
    "upsample_bicubic2d_backward": "backward of bicubic interpolation",
    "upsample_trilinear3d_backward": "backward of trilinear interpolation",
    "reflection_pad1d_backward": "backward of reflection padding",
    "reflection_pad2d_backward": "backward of reflection padding",
    "reflection_pad3d_backward": "backward of reflection padding",
    "nll_loss_forward": "negative log likelihood",
    "nll_loss2d_forward": "negative log likelihood",
    "_ctc_loss_backward": "backward of CTC",
    "_embedding_bag_backward": "backward of embedding bags",
    "put": "put",
    "histc": "histogram",
    "bincount": "counting with weights",
    "median.dim": "median with its index",
    "nanmedian.dim": "median with its index",
    "grid_sampler_2d_backward": "backward of grid sampling",
    "grid_sampler_3d_backward": "backward of grid sampling",
    "cumsum": "cumulative sum of floating point numbers",
}
# These have another kernel, which trainer.deterministic=true or warn chooses, often a slower one.
OTHER_KERNEL = {
    "convolution": "convolution",
    "convolution_backward": "backward of convolution",
    "replication_pad1d_backward": "backward of replication padding",
    "replication_pad2d_backward": "backward of replication padding",
    "replication_pad3d_backward": "backward of replication padding",
    "index_put": "writing at indices",
    "scatter_add": "sum by index",
    "scatter_reduce.two": "reduction by index",
    "scatter.src": "scattering a tensor",
    "gather": "gathering, when differentiated",
    "index_add": "sum by index; also the backward of selecting by index",
    "index_select": "selecting by index, when differentiated",
    "index_copy": "copying to indices",
    "repeat_interleave": "repetition, when differentiated",
    "max_pool3d_with_indices_backward": "backward of 3D maximum pooling",
}
# Not in that list; what happens depends on the attention kernel that CUDA picks for shapes and mask.
ATTENTION = "scaled_dot_product"
WHY = """Many threads add into one place with atomic additions, in whatever order they arrive, and floating
point sums depend on the order. With convolutions it is cuDNN's choice of algorithm."""
STAGES = ("pretrain", "vessel", "segmenter", "smart_net", "expert")


class Operations(TorchDispatchMode):
    """Collects the names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation_name(func))
        result = func(*args, **(kwargs or {}))
        if operation_name(func) in ("cumsum", "bincount") and not sensitive(func, args, kwargs or {}):
            self.names.discard(operation_name(func))
        return result


def operation_name(func: Any) -> str:
    """As the tables above write it: no in-place underscore, the overload only where it matters."""
    name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name
    name = name if name.startswith("_") and name.endswith("__") else name.rstrip("_")
    full = f"{name}.{overload}"
    return full if full in NO_OTHER_KERNEL or full in OTHER_KERNEL else name


def sensitive(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is of the kind that the documentation means."""
    if operation_name(func) == "cumsum":
        return args[0].is_floating_point()
    return (len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None


class Listen(Callback):
    """Turns the collector on for a training step: neither loading data nor validation is meant."""

    def __init__(self, into: set[str]) -> None:
        self.into, self.mode = into, None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.mode = Operations().__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.into |= self.mode.names


@contextmanager
def listening(found: dict[str, set[str]]) -> Iterator[None]:
    """Replace the fit of every stage by one of two steps that listens."""

    def fit(
        run: StageRun,
        module: LightningModule,
        data: LightningDataModule,
        epochs: int,
        cfg: DictConfig,
    ) -> None:
        seed_everything(int(cfg.seed), verbose=False)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=2,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Listen(found.setdefault(run.stage, set()))],
            gradient_clip_val=1.0,
        )
        trainer.fit(module, data)
        module.eval()

    with ExitStack() as stack:
        for stage in STAGES:
            stack.enter_context(
                patch.object(importlib.import_module(f"aneurysm.training.{stage}"), "fit", fit)
            )
        yield


def operations(outputs: Path, *overrides: str) -> dict[str, set[str]]:
    """Operations of two training steps per stage, of the smallest experiment."""
    found: dict[str, set[str]] = {}
    small = ["experiment=smoke", "fold=0", f"paths.outputs={outputs}", "masking=anatomask"]
    small += ["vessel.rule_scans=1", "smart_net.rule_scans=1", "vessel.flips=[]", "trainer.progress=none"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*small, "stage=expert", *overrides])
    with listening(found):
        train(cfg)
    return found


def page(found: dict[str, set[str]]) -> str:
    """The document."""
    lines = [TOP.format(why=WHY)]
    for title, table in (
        ("No deterministic kernel", NO_OTHER_KERNEL),
        ("A deterministic kernel is chosen by `trainer.deterministic=true` or `warn`", OTHER_KERNEL),
    ):
        lines += [f"### {title}", "", "| operation | what it is | stages |", "|---|---|---|"]
        for name, what in table.items():
            stages = [s for s in STAGES if name in found.get(s, ())]
            if stages:
                lines.append(f"| `{name}` | {what} | {', '.join(stages)} |")
        lines.append("")
    attention = [s for s in STAGES if any(ATTENTION in name for name in found.get(s, ()))]
    lines.append(BOTTOM.format(attention=", ".join(attention) or "none"))
    return "\n".join(lines)


TOP = """# Determinism

On a CPU a training is a function of its configuration: the same command twice gives weights that are
equal bit by bit, and another `seed` gives other weights (`tests/test_determinism.py`). Data order and
augmentation depend on (seed, epoch, index), initial weights on (seed, fold), masks of the pretraining
on (seed, epoch, step). The number of threads and the build of PyTorch are part of the function: sums
over other chunks differ in the last digits.

On a GPU two runs differ in the last digits, and after thousands of steps visibly. {why}

```
python train.py trainer=gpu trainer.deterministic=warn  # where there is such a kernel; the rest is named
python train.py trainer=gpu trainer.deterministic=true  # an operation without one stops the run
python train.py -m experiment=seeds                     # how much is luck anyway: five seeds, the same folds
```

`warn` and `true` set `torch.use_deterministic_algorithms`, cuDNN's flags and `CUBLAS_WORKSPACE_CONFIG`.
They are not part of what names a run. Compare settings over several seeds: repetitions of one seed show
only a part of the spread.

## Operations of the training steps

Found by listing every operation of two training steps per stage (forward, backward, optimiser) with the
default networks (pretraining with AnatoMask, whose teacher does more), and comparing the list with the
documentation of `torch.use_deterministic_algorithms` of torch 2.13. It was made on a CPU, without a GPU
at hand: it says where differences can come from, not how large they are. The stacker's trees grow on
the CPU, with a seed and one thread.
"""
BOTTOM = """Attention (`scaled_dot_product_attention`) is used by: {attention}. It is not in PyTorch's list,
because the kernel depends on shapes, mask and precision; the backward passes of the flash and
memory-efficient kernels add atomically unless deterministic algorithms are asked for.

Written by `python benchmarks/determinism.py --write docs/determinism.md`.
"""


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = page(operations(Path(folder)))
    if given.write:
        given.write.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
