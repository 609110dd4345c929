"""Training a compiled network (`trainer.compile`): faster steps after a first one that takes a minute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from aneurysm.data.errors import UserError


class Compiled(Callback):
    """Compiles the network that is trained, for training steps alone.

    In place, so names of weights, checkpoints and averages do not change. What looks at other sizes of image
    than the training's, validation and whole scans, calls the network as it is written: each size would be
    compiled anew.

    Args:
        backend: of torch.compile, such as inductor.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._compiled: Callable[..., Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (net := network(pl_module)) is not None:
            # Sizes are compiled in: kernels that take any size would depend on which ones came first, and a
            # training that was killed and resumed would end differently from an undisturbed one.
            net.compile(backend=self.backend, dynamic=False)
            self._compiled = net._compiled_call_impl

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        release(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (net := network(pl_module)) is not None:
            net._compiled_call_impl = self._compiled


def network(module: LightningModule) -> nn.Module | None:
    """What `trainer.compile` compiles of a stage, None where that does not pay."""
    net = getattr(module, "net", None)
    return net if getattr(module, "compiles", True) and isinstance(net, nn.Module) else None


def release(module: LightningModule) -> None:
    """Let the network of a module run as it is written."""
    if (net := network(module)) is not None:
        net._compiled_call_impl = None  # PyTorch has no way back from Module.compile


@contextmanager
def compiling(module: LightningModule, setting: bool | str) -> Iterator[list[Callback]]:
    """Callbacks for a fit with `trainer.compile` as set; afterwards nothing is compiled any more.

    Raises:
        UserError: the backend is unknown, or cannot compile on this machine.
    """
    if not setting:
        yield []
        return
    from torch._dynamo.exc import TorchDynamoException  # the compiler takes a while to load

    backend = "inductor" if setting is True else str(setting)
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UserError(
            f"trainer.compile={backend}: no such backend of torch.compile. Set true, false or one of "
            f"{', '.join(known)}."
        )
    try:
        yield [Compiled(backend)]
    except TorchDynamoException as error:
        raise UserError(
            f"The network cannot be compiled with trainer.compile={setting}: {_cause(error)} On a CPU "
            "torch.compile needs a C++ compiler (g++ or clang++, named by CXX if it is not on the PATH), on "
            "a GPU Triton and a C compiler. Install them or train with trainer.compile=false, which gives "
            "the same networks."
        ) from error
    finally:
        release(module)
        torch.compiler.reset()  # compiled code is found by the class of a network: other fits start afresh


def _cause(error: Exception) -> str:
    """The first sentence of what went wrong."""
    inner = getattr(error, "inner_exception", None) or error
    line = next((text.strip() for text in str(inner).splitlines() if text.strip()), "")
    return f"{type(inner).__name__}: {line.rstrip('.')}."
