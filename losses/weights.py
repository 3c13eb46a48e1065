"""Class weights: what a sample counts in the loss, by its class."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch.optim import Optimizer

from crucible.options import ConfigError
from crucible.technique import Setting, Step, Technique

log = logging.getLogger("crucible")


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """`N / (C n_c)`: each of the C classes that have samples counts the same in all, and a sample 1 in the mean.

    Args:
        counts: (K,) integers, samples of each class; a class without any has the weight 1.
    """
    present = counts > 0
    share = counts.sum() / (present.sum() * np.maximum(counts, 1))
    return np.where(present, share, 1.0)


@dataclass(frozen=True)
class ClassWeights(Technique):
    """The term of each class in the training loss is multiplied by a weight; evaluation stays plain."""

    class_weights: Annotated[
        Literal["balanced"] | Annotated[list[float], "[0, inf)"] | None,
        "what a class counts in the training loss: balanced (as much as any other, by the counts of training samples), "
        "or a number for each; null: each sample the same",
    ] = None

    def check(self, setting: Setting) -> None:
        if setting.task == "regression":
            raise ConfigError(
                f"model.class_weights={self.class_weights} has no meaning with data.task=regression: "
                "there are no classes"
            )
        if isinstance(self.class_weights, list):
            if setting.num_classes and len(self.class_weights) != setting.num_classes:
                raise ConfigError(
                    f"model.class_weights has {len(self.class_weights)} numbers, data.num_classes is "
                    f"{setting.num_classes}: one for each class"
                )
            if not any(self.class_weights):
                raise ConfigError("model.class_weights: all are 0, which trains nothing")

    def attach(self, step: Step) -> None:
        criterion = step.criterion

        def weigh(module: Any, _: Optimizer) -> None:
            weights = self.class_weights
            if weights == "balanced":
                found = balanced_weights(module.trainer.datamodule.class_counts())
                if np.ptp(found) == 0:
                    log.warning(
                        "model.class_weights=balanced: all classes have as many samples, all weights are 1"
                    )
                weights = found.tolist()
            criterion.weights = torch.tensor(weights, dtype=torch.float32, device=module.device)

        step.optimizer.append(weigh)  # once, when the data are read and the device is known
