"""Weights averaged over training."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class AveragedWeights(EMAWeightAveraging):
    """Exponential moving average of the weights, which the network is left with after training.

    Buffers (running statistics, counters) are those of the network itself: an average of a counter means
    nothing. Validation looks at the averaged weights.

    Args:
        decay: share of the average that is kept at every step, 0..1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay, use_buffers=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A fit that was interrupted after its last step has nothing left to train when it is resumed, and
        # Lightning then leaves out `on_train_end`, which would have handed the average over.
        self.on_train_end(trainer, pl_module)
