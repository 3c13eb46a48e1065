"""What callbacks may ask of the model that they watch, besides what Lightning's own modules have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from crucible.technique import Step


class Training(Protocol):
    """`models.base_model.BaseModel`, as the callbacks see it.

    Attributes:
        epochs: length of the training, of which the last may be a part; infinite where it has none.
        epoch_values: asked for once, at the end of a training epoch: what is logged beside the model's own values.
        model: the network.
        step: the stages of a step.
        optimizer_options: a dataclass with `lr`, the rate that the schedule scales.
        plateau: what lets the rate fall by the validations, where that is the schedule; observed once a validation.
        batch_samples: of the training batch under way, as it was read: views of one are one.
        steps_per_epoch: optimizer steps of an epoch.
        skips_nonfinite: whether batches of a loss that is not finite are left out of the epoch's means.
        hands_on_rows: whether a callback gives the loggers whole rows, so that what is logged shall not go there too.
    """

    epochs: float
    epoch_values: list[Callable[[], Mapping[str, Tensor]]]
    model: nn.Module
    step: Step
    optimizer_options: Any
    plateau: Any
    batch_samples: int
    steps_per_epoch: int
    skips_nonfinite: bool
    hands_on_rows: bool

    def log_training(self) -> None:
        """Log the epoch's values of training, unless that is done; of an epoch that was cut, those of its part."""

    def running_metrics(self) -> dict[str, float]:
        """This rank's means of the epoch so far. Waits for the device: call it rarely."""

    def running_sums(self) -> Tensor:
        """This rank's sums of the epoch so far, (3,) on the device: loss, hits (or errors), samples. It goes on."""


def watched(module: LightningModule) -> Training:
    """The module that a callback is handed, as what it is."""
    return cast(Training, module)
