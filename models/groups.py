"""Groups of evaluation samples: loss and metrics of each, beside those of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from crucible.sums import Sums


class Shares(NamedTuple):
    """Which samples of a batch belong to which group, known before the batch is on its device.

    Attributes:
        order: (M,) int64, the places in the batch of the samples that are of a group, one group after the other.
        sizes: samples of each group.
    """

    order: Tensor
    sizes: list[int]

    def divide(self, values: Tensor) -> tuple[Tensor, ...]:
        """(N, ...) of a batch as a tensor for each group. Nothing waits for the device."""
        order = self.order.to(values.device, non_blocking=True)
        return values.index_select(0, order).split(self.sizes)


class GroupScores:
    """Sums and metrics of each group of a split, on the device.

    Args:
        names: of the groups.
        numbers: (N,) int64, the group of each sample by `Batch.index`; -1: of none.
        sums: makes the sums of one group.
        metrics: what is computed of all samples; each group gets its own copy.
    """

    def __init__(
        self,
        names: Sequence[str],
        numbers: np.ndarray,
        sums: Callable[[], Sums],
        metrics: MetricCollection,
    ) -> None:
        self.names = list(names)
        self._numbers = torch.from_numpy(numbers)
        self._sums = [sums() for _ in names]
        self._metrics = [metrics.clone() for _ in names]
        for each in self._metrics:
            each.reset()

    def __iter__(self) -> Iterator[tuple[str, Sums, MetricCollection]]:
        return zip(self.names, self._sums, self._metrics, strict=True)

    def shares(self, index: Tensor) -> Shares:
        """Of a batch, by the numbers (N,) of its samples on the CPU."""
        of_group = self._numbers[index]
        order = of_group.argsort(stable=True)
        sizes = torch.bincount(of_group + 1, minlength=len(self.names) + 1).tolist()
        return Shares(order[sizes[0] :], sizes[1:])

    def add(
        self,
        shares: Shares,
        criterion: Callable[[Tensor, Tensor], Tensor],
        logits: Tensor,
        scores: Tensor,
        target: Tensor,
    ) -> None:
        """Add a batch: `logits` and `scores` (N, K) or (N,), `target` (N,)."""
        parts = (shares.divide(values) for values in (logits, scores, target))
        for (_, sums, metrics), size, of_logits, of_scores, of_target in zip(
            self, shares.sizes, *parts, strict=True
        ):
            if size:
                sums.add(criterion(of_logits, of_target), of_logits, of_target)
            metrics.update(of_scores, of_target, logits=of_logits)
