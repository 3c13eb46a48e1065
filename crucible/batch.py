"""What a loader delivers and a model is handed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor

from crucible.keyed import visited


class Batch(NamedTuple):
    """What a loader delivers and a model is handed.

    Attributes:
        input: (N, C, *spatial), uint8 for images until `BaseDataModule.batch_transform` makes it float32.
        target: (N,) int64 class indices or float32 values; after mixing (N, K) float32 probabilities.
        visit: (N,) int64, by which random numbers of a sample are drawn: the sample's number where it comes up for the
            first time in its epoch, another one each time that it comes up again (`crucible.keyed.visits`).
    """

    input: Tensor
    target: Tensor
    visit: Tensor

    @property
    def index(self) -> Tensor:  # type: ignore[override]  # a tuple's method of this name
        """(N,) int64 numbers of the samples in the raw data set."""
        return visited(self.visit)


def convert_no_batches(plugin: Any) -> None:
    """Let the trainer's plugin for bf16-true or 16-true leave a `Batch` to the model.

    Lightning's loops have it round all that floats in one, the targets too, before the model has a say.
    """
    if isinstance(plugin, HalfPrecision) and not isinstance(plugin.convert_input, partial):
        plugin.convert_input = partial(_unless_a_batch, plugin.convert_input)  # type: ignore[method-assign]


def _unless_a_batch(convert: Callable[[Any], Any], data: Any) -> Any:
    return data if isinstance(data, Batch) else convert(data)
