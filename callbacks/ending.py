"""Ends a training before its length, which schedules and averages go on counting by."""

from __future__ import annotations

from typing import Annotated

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class EndAfter(Callback):
    """The first epochs of a longer training, just as they are in it; what follows (the test, say) follows.

    Args:
        epochs: after which the training ends.
    """

    def __init__(self, epochs: Annotated[int, "[1, inf)"]) -> None:
        super().__init__()
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True
