"""The metrics of a run by name: states live on the device, are bounded, and add up exactly over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from crucible.options import ConfigError, suggest

CLASSIFICATION_METRICS = ("acc", "top5", "f1", "f1_per_class", "precision", "recall", "auroc", "ece")
REGRESSION_METRICS = ("mse", "mae", "r2")
AUROC_THRESHOLDS = 200


class CalibrationError(Metric):
    """Expected calibration error: the mean over samples of |confidence - accuracy|, in equal-width bins.

    Guo et al., arXiv 1706.04599, equation 3. The state is three sums a bin, whatever the data's size.

    Args:
        bins: number of bins over the confidence of the predicted class.
    """

    full_state_update = False
    confidence: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        for name in ("confidence", "correct", "count"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add `probabilities` (N, K) float and `target` (N,) int64."""
        confidence, prediction = probabilities.max(dim=1)
        bin_index = (confidence * self.bins).long().clamp(0, self.bins - 1)
        self.confidence.index_add_(0, bin_index, confidence.to(self.confidence.dtype))
        self.correct.index_add_(0, bin_index, (prediction == target).to(self.correct.dtype))
        self.count.index_add_(0, bin_index, torch.ones_like(confidence, dtype=self.count.dtype))

    def compute(self) -> Tensor:
        """The error, 0 to 1."""
        return ((self.confidence - self.correct).abs().sum() / self.count.sum().clamp(min=1)).float()


def check_metrics(names: Sequence[str], task: str, num_classes: int) -> None:
    """Refuse a metric that does not exist or has no meaning for the task.

    Raises:
        ConfigError: naming `metrics`.
    """
    known = CLASSIFICATION_METRICS if task == "classification" else REGRESSION_METRICS
    for name in names:
        if name not in known:
            raise ConfigError(f"metrics: {name!r} is not a metric for {task}{suggest(name, known)}")
    if "top5" in names and num_classes <= 5:
        raise ConfigError(
            f"metrics: top5 is always 1 with data.num_classes={num_classes}; it needs at least 6 classes"
        )


def build_metrics(names: Sequence[str], task: str, num_classes: int) -> MetricCollection:
    """The metrics `names`, keyed as they are logged (`top5` is logged as `acc_top5`).

    Classification metrics take probabilities (N, K) and targets (N,); f1, precision, recall and AUROC are
    means over classes. AUROC is binned (200 thresholds), so its memory does not grow with the data.
    Regression metrics take predictions (N,) and targets (N,).
    """
    check_metrics(names, task, num_classes)
    common: dict[str, Any] = {"num_classes": num_classes, "validate_args": False}
    builders: dict[str, Callable[[], dict[str, Metric]]] = {
        "acc": lambda: {"acc": MulticlassAccuracy(average="micro", **common)},
        "top5": lambda: {"acc_top5": MulticlassAccuracy(average="micro", top_k=5, **common)},
        "f1": lambda: {"f1": MulticlassF1Score(average="macro", **common)},
        "f1_per_class": lambda: {"f1_per_class": MulticlassF1Score(average="none", **common)},
        "precision": lambda: {"precision": MulticlassPrecision(average="macro", **common)},
        "recall": lambda: {"recall": MulticlassRecall(average="macro", **common)},
        "auroc": lambda: {"auroc": MulticlassAUROC(average="macro", thresholds=AUROC_THRESHOLDS, **common)},
        "ece": lambda: {"ece": CalibrationError()},
        "mse": lambda: {"mse": MeanSquaredError()},
        "mae": lambda: {"mae": MeanAbsoluteError()},
        "r2": lambda: {"r2": R2Score()},
    }
    metrics: dict[str, Metric] = {}
    for name in names:
        metrics.update(builders[name]())
    return MetricCollection(metrics)  # type: ignore[arg-type]


def scalars(values: dict[str, Tensor], class_names: Sequence[str] = ()) -> dict[str, Tensor]:
    """One scalar a name: `f1_per_class` (K,) becomes `f1_per_class/<class>`."""
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        if value.ndim == 0:
            flat[name] = value
        else:
            labels = class_names if len(class_names) == len(value) else [str(i) for i in range(len(value))]
            flat.update({f"{name}/{label}": v for label, v in zip(labels, value, strict=True)})
    return flat


def headline(final: Mapping[str, float]) -> str:
    """The two of a run's final values that a reader wants first."""
    wanted = [name for name in ("test/acc", "test/mae", "val/acc", "val/loss") if name in final]
    return ", ".join(f"{name} {final[name]:.4f}" for name in wanted[:2])
