"""The half of a model that evaluates: plain loss and metrics, exact over ranks, of the weights that ship."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, cast

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from crucible.batch import Batch
from crucible.metrics import remarks, scalars
from crucible.sums import Sums
from crucible.technique import Step, Weights
from models.groups import GroupScores, Shares
from models.views import Views
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
    views: Views = Views()  # of each input, as it is evaluated
    hands_on_rows: bool = (
        False  # whether a callback gives the loggers whole rows; else Lightning gives them each value
    )
    _sums: dict[str, Sums]
    _said: set[str]  # remarks on metrics
    _groups: dict[str, GroupScores]  # of the stages under way, where the data have groups
    _shares: Shares | None = None  # of the batch under way

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
            self._begin(stage)

    def on_predict_epoch_start(self) -> None:
        self._make_fit()

    def on_test_epoch_start(self) -> None:
        self._make_fit()
        self._begin("test")

    def _begin(self, stage: Stage) -> None:
        self._sums[stage] = Sums(self.task, self.device)
        declared = getattr(getattr(self.trainer, "datamodule", None), "groups", None)
        groups = declared("test" if stage == "test" else "val") if declared else None
        if groups is not None:
            self._groups[stage] = GroupScores(
                groups.names, groups.numbers, partial(Sums, self.task, self.device), self._metrics(stage)
            )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Which samples are of which group is settled here, where their numbers can be read without a wait."""
        stage = "test" if self.trainer.testing else "val"
        self._shares = None
        if stage in self._groups and not self.trainer.training and not self.trainer.predicting:
            self._shares = self._groups[stage].shares(batch.index)
        return batch

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
        logits = self.views.read(self.outputs, batch.input)
        self._sums[stage].add(self.evaluation_criterion(logits, batch.target), logits, batch.target)
        scores = logits.softmax(dim=1) if self.task == "classification" else logits
        self._metrics(stage).update(scores, batch.target, logits=logits)
        if self._shares is not None:
            self._groups[stage].add(self._shares, self.evaluation_criterion, logits, scores, batch.target)
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
        self._log(stage, self._sums[stage], self._metrics(stage))
        for group, sums, metrics in self._groups.pop(stage, ()):
            if sums.samples(self.trainer):
                self._log(f"{stage}_{group}", sums, metrics)
            else:
                self._say(f"{stage}_{group}: no sample of this group was evaluated: it has no values")

    def _log(self, split: str, sums: Sums, metrics: MetricCollection) -> None:
        class_names = getattr(getattr(self.trainer, "datamodule", None), "class_names", [])
        values = {"loss": sums.means(self.trainer)["loss"]}
        values |= scalars(metrics.compute(), class_names)
        for remark in remarks(metrics, class_names) if self.trainer.is_global_zero else ():
            self._say(f"{split}: {remark}")
        metrics.reset()
        self.log_dict({f"{split}/{k}": v for k, v in values.items()}, logger=not self.hands_on_rows)

    def _say(self, remark: str) -> None:
        if self.trainer.is_global_zero and remark not in self._said:
            self._said.add(remark)
            log.warning("%s", remark)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """`scores` (N, K) probabilities or (N,) values, `target` and `index` of one batch, float32 or wider."""
        with self._with_shipped():
            logits = self.views.read(self.outputs, batch.input)
        scores = logits.softmax(dim=1) if self.task == "classification" else logits
        return {"scores": scores, "target": batch.target, "index": batch.index}

    def running_metrics(self) -> dict[str, float]:
        """This rank's means of the epoch so far. Waits for the device: call it rarely."""
        return {k: float(v) for k, v in self._sums["train"].means().items()}

    def running_sums(self) -> Tensor:
        """This rank's sums of the epoch so far, (3,) on the device: loss, hits (or errors), samples. It goes on."""
        return self._sums["train"].totals
