"""What steps log are the means of their epoch, weighted by the number of examples."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aneurysm.stages.step import StepOutput, log_step

TRAIN, HELD_OUT = torch.tensor([1.0, 3.0, 2.0, 6.0, 10.0]), torch.tensor([4.0, 8.0, 1.0])


class Constant(LightningModule):
    """Its loss is the mean of the batch; a term exists in some steps only, as a loss without labels does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def _step(self, batch: Tensor, split: str) -> Tensor:
        loss = batch.mean() + 100 * self.current_epoch + 0 * self.weight
        terms = {"large": batch.max()} if batch.max() > 5 else {}
        return log_step(self, StepOutput(loss, terms), split, len(batch))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Tensor, index: int) -> Tensor:
        return self._step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(Callback):
    """The figures that a logger gets at the end of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def test_epoch_means_are_weighted_by_examples_and_begin_anew(tmp_path):
    seen = Seen()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[seen], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Constant(), DataLoader(TRAIN, batch_size=2), DataLoader(HELD_OUT, batch_size=2))  # type: ignore
    for epoch, figures in enumerate(seen.epochs):
        assert figures["train/loss"] == pytest.approx(float(TRAIN.mean()) + 100 * epoch)
        assert figures["val/loss"] == pytest.approx(float(HELD_OUT.mean()) + 100 * epoch)
        assert figures["train/large"] == pytest.approx((2 * 6 + 1 * 10) / 3)
        assert figures["val/large"] == pytest.approx(8)


def test_validation_alone_is_logged_too(tmp_path):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    [figures] = trainer.validate(Constant(), DataLoader(HELD_OUT, batch_size=2), verbose=False)  # type: ignore
    assert figures["val/loss"] == pytest.approx(float(HELD_OUT.mean()))
