"""Which test images a run got right: what statements about new images are made from."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric

from crucible.files import write_atomically
from crucible.writing import fails_together

BINS = 15  # of confidence, as in `crucible.calibration.CalibrationError`


class ExampleHits(Metric):
    """The number, the hit and the confidence of each sample, of all ranks (nine bytes a sample)."""

    full_state_update = False
    index: list[Tensor]
    hit: list[Tensor]
    confidence: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("index", "hit", "confidence"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Add `logits` (N, K) float with `target` (N,) int64 and `index` (N,) int64."""
        confidence, prediction = logits.float().softmax(dim=1).max(dim=1)
        self.index.append(index.int())
        self.hit.append((prediction == target) & confidence.isfinite())
        self.confidence.append(confidence)

    def compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index (N,) int64 ascending, hit (N,) bool and confidence (N,) float64; each sample once."""
        columns = (self.index, self.hit, self.confidence)
        index, hit, confidence = (torch.cat(c if isinstance(c, list) else [c]).cpu().numpy() for c in columns)
        index, first = np.unique(index.astype(np.int64), return_index=True)
        return index, hit[first], confidence[first].astype(np.float64)


class CorrectnessRecord(Callback):
    """Writes `test_correct.npz` after a test of a classifier; rank 0 writes, for all ranks.

    It holds `correct` (packed bits in ascending order of the samples' numbers, `numpy.packbits`), `count`,
    `samples` (a digest of those numbers: records of the same images have the same) and `calibration`
    (3, 15): number of samples, summed confidence and summed hits, by confidence in equal bins; and `data`.

    Args:
        file: where to.
        data: fingerprint of the data.
    """

    def __init__(self, file: Path, data: str = "") -> None:
        self.file = file
        self.data = data
        self._hits: ExampleHits | None = None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hits = ExampleHits().to(pl_module.device) if pl_module.task == "classification" else None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # a model whose own test_step returns something else has no such record
        if (
            self._hits is not None
            and isinstance(outputs, dict)
            and {"logits", "target", "index"} <= set(outputs)
        ):
            self._hits.update(outputs["logits"], outputs["target"], outputs["index"])

    @fails_together
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hits is None or not self._hits.update_called:
            return
        index, hit, confidence = self._hits.compute()
        self._hits = None
        if not trainer.is_global_zero:
            return
        known = np.isfinite(confidence)  # outputs that are no numbers are not right, and in no bin
        confidence, of_known = confidence[known], hit[known].astype(np.float64)
        bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        weights = (np.ones_like(confidence), confidence, of_known)
        stream = io.BytesIO()
        np.savez(
            stream,
            correct=np.packbits(hit),
            count=np.int64(len(hit)),
            samples=np.str_(hashlib.sha256(index.tobytes()).hexdigest()[:16]),
            data=np.str_(self.data),
            calibration=np.stack([np.bincount(bins, w, minlength=BINS) for w in weights]),
        )
        write_atomically(self.file, stream.getvalue())
