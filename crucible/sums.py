"""Loss and hits summed on the device over the samples of an epoch, and read at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from crucible.machine import wide


class Sums:
    """Sums over samples of the loss, of hits (regression: absolute errors), and of the samples.

    Args:
        task: what the targets are.
        device: where the sums are kept.
        start: what they begin with.
        leave_out: batches whose loss is not finite; else they make the means so.
    """

    def __init__(
        self,
        task: str,
        device: torch.device,
        start: Iterable[float] = (0.0, 0.0, 0.0),
        leave_out: bool = False,
    ) -> None:
        self.task = task
        self.leave_out = leave_out
        self.totals = torch.tensor(list(start), dtype=wide(device), device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Add a batch: its mean `loss` (scalar), `logits` (N, K) or (N,), `target` (N,) or (N, K). Nothing waits."""
        n = logits.shape[0]
        if self.task == "classification":
            label = target if target.ndim == 1 else target.argmax(dim=1)
            second = (logits.argmax(dim=1) == label).sum()
        else:
            second = (logits - target).abs().sum()
        totals = self.totals
        # filled there: nothing is copied or waited for
        count = torch.full((), n, dtype=totals.dtype, device=totals.device)
        more = torch.stack((loss.detach().to(totals.dtype) * n, second.to(totals.dtype), count))
        totals += more.masked_fill(~more[0].isfinite(), 0.0) if self.leave_out else more

    def samples(self, trainer: Any = None) -> int:
        """How many were added; on all ranks (collective) with a trainer. Waits for the device."""
        return int(self._of_ranks(trainer)[2])

    def _of_ranks(self, trainer: Any) -> Tensor:
        if trainer is not None and trainer.world_size > 1:
            return trainer.strategy.reduce(self.totals.clone(), reduce_op="sum")
        return self.totals

    def means(self, trainer: Any = None) -> dict[str, Tensor]:
        """`loss`, and `acc` or `mae`: exact means over all samples; of all ranks (collective) with a trainer.

        Where the loss of a batch was not finite, both are not.
        """
        totals = self._of_ranks(trainer)
        count = totals[2].clamp(min=1)
        # the largest of logits that are no numbers is a class like any other
        second = totals[1].masked_fill(~totals[0].isfinite(), math.nan)
        return {
            "loss": totals[0] / count,
            "acc" if self.task == "classification" else "mae": second / count,
        }
