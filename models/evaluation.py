"""The half of a model that evaluates: plain loss and metrics, exact over ranks, of the weights that ship."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from crucible.batch import Batch
from crucible.machine import widened
from crucible.metrics import remarks, scalars
from crucible.sums import Sums
from crucible.technique import Step, Weights
from norms import share_buffers

log = logging.getLogger("crucible")

Stage = Literal["train", "val", "val_raw", "test"]


class EvaluatedModel(LightningModule):
    """What validation, test and prediction do. `BaseModel` adds the options and the training."""

    model: nn.Module
    task: str
    step: Step
    metrics: nn.ModuleDict
    evaluation_criterion: nn.Module
    _sums: dict[str, Sums]
    _said: set[str]  # remarks on metrics

    def outputs(self, input: Tensor) -> Tensor:
        """Logits `(N, K)`, or predictions `(N,)` for regression."""
        out = self(input)
        return out if self.task == "classification" else out.flatten()

    @property
    def _evaluated_stages(self) -> tuple[Stage, ...]:
        return ("val", "test", "val_raw") if self.step.weights else ("val", "test")

    @property
    def _shipped(self) -> Weights | None:
        return next((weights for weights in self.step.weights if weights.active), None)

    def _with_shipped(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shipped is None else self._shipped.applied()

    def _make_fit(self) -> None:
        """Before whatever evaluates or ships the weights: the same buffers in all processes, shipped ones fresh."""
        share_buffers(self.model)
        if (weights := self._shipped) is not None:
            with weights.applied():
                share_buffers(self.model)
                weights.refresh(self)

    def on_validation_epoch_start(self) -> None:
        self._make_fit()
        for stage in self._evaluated_stages:
            self._sums[stage] = Sums(self.task, self.device)

    def on_predict_epoch_start(self) -> None:
        self._make_fit()

    def on_test_epoch_start(self) -> None:
        self._make_fit()
        self._sums["test"] = Sums(self.task, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns `logits` (N, K) or (N,), `target` (N,) and `index` (N,), for the callbacks."""
        if self._shipped is not None:
            self._evaluate(batch, "val_raw")
        with self._with_shipped():
            return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        with self._with_shipped():
            return self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        logits = widened(self.outputs(batch.input))
        self._sums[stage].add(self.evaluation_criterion(logits, batch.target), logits, batch.target)
        scores = logits.softmax(dim=1) if self.task == "classification" else logits
        self._metrics(stage).update(scores, batch.target, logits=logits)
        return {"logits": logits, "target": batch.target, "index": batch.index}

    def _metrics(self, stage: Stage) -> MetricCollection:
        return cast(MetricCollection, self.metrics[f"{stage}_metrics"])

    def on_validation_epoch_end(self) -> None:
        for stage in self._evaluated_stages:
            if stage != "test":
                self._log_evaluation(stage)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: Stage) -> None:
        metrics = self._metrics(stage)
        class_names = getattr(getattr(self.trainer, "datamodule", None), "class_names", [])
        values = {"loss": self._sums[stage].means(self.trainer)["loss"]}
        values |= scalars(metrics.compute(), class_names)
        if self.trainer.is_global_zero:
            for remark in remarks(metrics, class_names):
                if (said := f"{stage}: {remark}") not in self._said:
                    self._said.add(said)
                    log.warning("%s", said)
        metrics.reset()
        self.log_dict({f"{stage}/{k}": v for k, v in values.items()})

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """`scores` (N, K) probabilities or (N,) values, `target` and `index` of one batch, float32 or wider."""
        with self._with_shipped():
            logits = widened(self.outputs(batch.input))
        scores = logits.softmax(dim=1) if self.task == "classification" else logits
        return {"scores": scores, "target": batch.target, "index": batch.index}

    def running_metrics(self) -> dict[str, float]:
        """This rank's means of the epoch so far. Waits for the device: call it rarely."""
        return {k: float(v) for k, v in self._sums["train"].means().items()}
