"""Accuracy where an image may have several right classes, or none (ReaL, arXiv 2006.07159)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric


class AnyOf(Metric):
    """The share of images whose prediction is one of the right classes; those without a right class do not count."""

    full_state_update = False
    hits: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("hits", "counted"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, allowed: Tensor) -> None:
        """Add `logits` (N, K) float with `allowed` (N, K) bool."""
        right = allowed.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
        self.hits += right.sum()
        self.counted += allowed.any(dim=1).sum()

    def compute(self) -> Tensor:
        return self.hits / self.counted


class RealLabels(Callback):
    """Logs `test/acc_real` and `test/real_images`, how many of the images have a label, after a test.

    Args:
        allowed: (N, K) bool, the right classes of each test image by its number.
    """

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed
        self._accuracy = AnyOf()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._accuracy = AnyOf().to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits = outputs["logits"]
        self._accuracy.update(logits, self.allowed[outputs["index"].cpu()].to(logits.device))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = self._accuracy.compute()
        with self._accuracy.sync_context():
            counted = self._accuracy.counted.clone()
        pl_module.log_dict({"test/acc_real": value, "test/real_images": counted.float()})
