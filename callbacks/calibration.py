"""What temperature scaling asks of an evaluation: its logits, and the calibration error without the temperature."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric

from crucible.measures import CalibrationError


class _Outputs(Metric):
    """Logits (N, K) and targets (N,) of all ranks, each sample once."""

    full_state_update = False
    logits: list[Tensor]
    target: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("logits", "target"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        self.logits.append(logits)
        self.target.append(target)

    def compute(self) -> tuple[Tensor, Tensor]:
        columns = (self.logits, self.target)
        logits, target = (torch.cat(c if isinstance(c, list) else [c]).cpu() for c in columns)
        return logits, target


class Outputs(Callback):
    """Keeps what a validation gives: `logits` (N, K) and `target` (N,), on the CPU, of all ranks."""

    def __init__(self) -> None:
        self.logits = self.target = torch.empty(0)
        self._seen = _Outputs()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = _Outputs().to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._seen.update(outputs["logits"], outputs["target"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logits, target = self._seen.compute()
        self.target = target.reshape(-1)  # torchmetrics makes a scalar of the target of a single sample
        self._seen = _Outputs()


class UncalibratedError(Callback):
    """Logs `test/ece_before`, the calibration error at temperature 1, after a test at another one.

    Args:
        temperature: that the test's logits were divided by.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._error = CalibrationError()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._error = CalibrationError().to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._error.update((outputs["logits"] * self.temperature).softmax(dim=1), outputs["target"])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict({"test/ece_before": self._error.compute()})
