"""What a loader delivers and a model is handed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What a loader delivers and a model is handed.

    Attributes:
        input: (N, C, *spatial), uint8 for images until `BaseDataModule.batch_transform` makes it float32.
        target: (N,) int64 class indices or float32 values; after mixing (N, K) float32 probabilities.
        index: (N,) int64 numbers of the samples in the raw data set.
    """

    input: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of this name
