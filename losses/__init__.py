"""Criteria: `(logits, target) -> scalar`, built from the loss options of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from crucible.machine import widened
from crucible.options import ConfigError, option_names, read_options, suggest
from crucible.technique import Setting, assemble, read_techniques
from losses.binary import BinaryCrossEntropy
from losses.powergrad import LabelSmoothing, PowerGrad, PowerGradCrossEntropy, powergrad_cross_entropy
from losses.weights import ClassWeights

Task = Literal["classification", "regression"]
LossName = Literal["cross_entropy", "mse", "mae"]
CRITERION_TECHNIQUES = (BinaryCrossEntropy, PowerGrad, LabelSmoothing, ClassWeights)

__all__ = [
    "LossOptions",
    "PowerGradCrossEntropy",
    "RegressionLoss",
    "build_criterion",
    "evaluation_criterion",
    "powergrad_cross_entropy",
]


@dataclass(frozen=True)
class LossOptions:
    """The loss; what acts on it are techniques."""

    loss: Annotated[
        LossName | None, "what is minimised; null: cross_entropy for classification, mse for regression"
    ] = None


class RegressionLoss(nn.Module):
    """Mean squared (`mse`) or absolute (`mae`) error in float32: `(prediction (N,) or (N, 1), target (N,))`.

    Raises:
        ValueError: where the shapes differ otherwise; they are never broadcast.
    """

    def __init__(self, loss: Literal["mse", "mae"] = "mse") -> None:
        super().__init__()
        self.loss = loss

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.ndim == 2 and prediction.shape[1] == 1:
            prediction = prediction.squeeze(1)
        if prediction.ndim != 1 or prediction.shape != target.shape:
            raise ValueError(
                f"regression needs predictions (N,) or (N, 1) and targets (N,),"
                f" got {tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        error = F.mse_loss if self.loss == "mse" else F.l1_loss
        return error(widened(prediction), widened(target))

    def extra_repr(self) -> str:
        return self.loss


def build_criterion(task: Task = "classification", **values: Any) -> nn.Module:
    """The training criterion.

    Classification takes logits `(N, K)` with a target of `(N,)` int64 indices or `(N, K)` probabilities;
    regression takes predictions `(N,)` or `(N, 1)` with a target `(N,)`. Both return a float32 scalar
    (float64 for float64 input). Label smoothing is applied here and nowhere else.

    Args:
        task: what the targets are.
        values: `loss`, and the options of the techniques in `CRITERION_TECHNIQUES`, by name.

    Raises:
        ConfigError: for an unknown option, a bad value, or one that has no meaning for the task.
    """
    kinds: tuple[type, ...] = (LossOptions, *CRITERION_TECHNIQUES)
    known = [name for kind in kinds for name in option_names(kind)]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"model.{name}={value!r}: no such loss option{suggest(name, known)}")
    techniques = read_techniques(CRITERION_TECHNIQUES, values)
    plain = evaluation_criterion(task, read_options(LossOptions, values).loss)
    return assemble(techniques, Setting(task), plain).criterion


def evaluation_criterion(task: Task = "classification", loss: LossName | None = None) -> nn.Module:
    """The criterion of validation and test: what is minimised, without PowerGrad and without smoothing.

    Raises:
        ConfigError: for a loss that has no meaning for the task.
    """
    _check_loss(task, loss)
    if task == "classification":
        return PowerGradCrossEntropy(alpha=1.0)
    return RegressionLoss("mae" if loss == "mae" else "mse")


def _check_loss(task: Task, loss: LossName | None) -> None:
    allowed = ("cross_entropy",) if task == "classification" else ("mse", "mae")
    if loss is not None and loss not in allowed:
        raise ConfigError(f"model.loss must be {' or '.join(allowed)} with data.task={task}, got {loss!r}")
