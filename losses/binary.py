"""Binary cross-entropy: each class is told from all others by itself (arXiv 2110.00476)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from torch import Tensor

from crucible.machine import widened
from crucible.options import ConfigError
from crucible.technique import Setting, Step, Technique
from losses.powergrad import ClassCriterion, PowerGrad, spread


@dataclass(frozen=True)
class BinaryCrossEntropy(Technique):
    """Each class is a question of its own: a sigmoid and a binary cross-entropy in place of the softmax's."""

    needs: ClassVar = {"bce_threshold": ("binary_cross_entropy",)}

    binary_cross_entropy: Annotated[
        bool, "a sigmoid for each class in place of the softmax, in the training loss (arXiv 2110.00476)"
    ] = False
    bce_threshold: Annotated[
        float | None,
        "[0, 1)",
        "mixed targets above it become 1, others 0, before smoothing; null: they stay shares",
    ] = None

    def check(self, setting: Setting) -> None:
        if setting.task == "regression":
            raise ConfigError(
                "model.binary_cross_entropy=true has no meaning with data.task=regression: there are no classes"
            )
        if setting.of(PowerGrad).on:
            raise ConfigError(
                "model.binary_cross_entropy=true: PowerGrad acts on the softmax's probabilities, which this loss does "
                "not have; choose one"
            )

    def attach(self, step: Step) -> None:
        step.criterion = BinaryCrossEntropyLoss(self.bce_threshold)


class BinaryCrossEntropyLoss(ClassCriterion):
    """The mean over samples and classes of the binary cross-entropy of sigmoid(z): `(logits, target) -> scalar`.

    Logits are `(N, K)`, targets `(N,)` int64 indices or `(N, K)` probabilities. Computed in float32 or wider. Without
    `threshold` it is timm's `BinaryCrossEntropy`, whose targets are smoothed before they are cut at its threshold; here
    they are cut first, so that a class that is there has the target 1 - s + s / K, whichever share it has.

    Args:
        threshold: targets above it become 1, others 0; None: they stay.
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = widened(logits)
        target = spread(logits, target)
        if self.threshold is not None:
            target = target.gt(self.threshold).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, self.smooth(logits, target), self.weights)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, {super().extra_repr()}"
