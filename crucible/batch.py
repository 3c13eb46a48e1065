"""What a loader delivers and a model is handed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor

from crucible.keyed import visited


class _Batch(NamedTuple):
    input: Tensor
    target: Tensor
    visit: Tensor


class Batch(_Batch):
    """What a loader delivers and a model is handed: a tuple of three tensors.

    `Batch(input, target, index)` is one of samples that come up once in their epoch.

    Attributes:
        input: (N, C, *spatial), uint8 for images until `BaseDataModule.batch_transform` makes it float32.
        target: (N,) int64 class indices or float32 values; after mixing (N, K) float32 probabilities.
        visit: (N,) int64, by which random numbers of a sample are drawn: the sample's number where it comes up for the
            first time in its epoch, another one each time that it comes up again (`crucible.keyed.visits`).
    """

    __slots__ = ()

    def __new__(
        cls, input: Tensor, target: Tensor, visit: Tensor | None = None, *, index: Tensor | None = None
    ) -> Batch:
        which = index if visit is None else visit
        if which is None:
            raise TypeError("a Batch needs its samples' numbers")
        return super().__new__(cls, input, target, which)

    @property
    def index(self) -> Tensor:  # type: ignore[override]  # a tuple's method of this name
        """(N,) int64 numbers of the samples in the raw data set."""
        return visited(self.visit)

    def _replace(self, **changes: Tensor) -> Batch:
        if "index" in changes:
            changes["visit"] = changes.pop("index")
        return super()._replace(**changes)


def convert_no_batches(plugin: Any) -> None:
    """Let the trainer's plugin for bf16-true or 16-true leave a `Batch` to the model.

    Lightning's loops have it round all that floats in one, the targets too, before the model has a say.
    """
    if isinstance(plugin, HalfPrecision) and not isinstance(plugin.convert_input, partial):
        plugin.convert_input = partial(_unless_a_batch, plugin.convert_input)  # type: ignore[method-assign]


def _unless_a_batch(convert: Callable[[Any], Any], data: Any) -> Any:
    return data if isinstance(data, Batch) else convert(data)
