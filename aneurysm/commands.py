"""The commands `train.py` and `predict.py`.

What they run takes seconds to import (torch, Lightning, MONAI), so that happens once the command line is
known to be right: `--help` and a misspelt key are answered at once.
"""

from typing import Any

from omegaconf import DictConfig

from aneurysm.command_line import entry_point


def train() -> None:
    """Command line of `train.py`."""
    entry_point("train", _train, recorded=True)()


def predict() -> None:
    """Command line of `predict.py`."""
    entry_point("predict", _predict)()


def _train(cfg: DictConfig) -> float:
    from aneurysm.train import train

    return train(cfg)


def _predict(cfg: DictConfig) -> Any:
    from aneurysm.predict import predict

    return predict(cfg)
