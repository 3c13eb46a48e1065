"""Ends a run of a search that is worse than the others were at the same epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    import optuna


class Pruned(Exception):
    """The search's pruner ended the run; its state is in last.ckpt."""


class Pruning(Callback):
    """Reports a value to Optuna after each validated epoch and ends the run where the pruner says so.

    Under DDP rank 0 reports and decides for all ranks.

    Args:
        open_trial: gives the trial; called on rank 0 only.
        metric: the logged value that is optimised.

    Raises:
        Pruned: at the end of an epoch, whose state has been saved by then.
    """

    def __init__(self, open_trial: Callable[[], optuna.trial.Trial], metric: str) -> None:
        self._open_trial, self._metric = open_trial, metric
        self._trial: optuna.trial.Trial | None = None
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._validated or self._metric not in trainer.callback_metrics:
            return
        prune = False
        if trainer.is_global_zero:
            self._trial = self._trial or self._open_trial()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # an epoch that is trained again after a resume was reported before
                self._trial.report(float(trainer.callback_metrics[self._metric]), trainer.current_epoch)
            last = trainer.current_epoch + 1 == trainer.max_epochs
            prune = not last and self._trial.should_prune()
        if trainer.strategy.reduce_boolean_decision(prune, all=False):
            raise Pruned(f"pruned after epoch {trainer.current_epoch + 1}: worse than earlier trials were")
