"""The learning-rate range test (Smith, arXiv 1506.01186, section 3.3): the rate rises over one short training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from crucible.machine import wide
from crucible.options import ConfigError
from crucible.technique import Factor
from crucible.training import watched

READ_EVERY = 10  # steps between two looks at the losses, each of which waits for the device
DIVERGED = 4.0  # times the lowest smoothed loss, as in fastai
_HORIZONS = 20  # of the smoothing, in the whole test


@dataclass(frozen=True)
class RangeOptions:
    """The options of task=tune.

    The rate grows by the same factor a step, as in fastai, not linearly as in the paper: nobody knows its power of ten.
    The defaults span seven of them, from below what Lion takes to above what plain SGD on a small network does, in
    the hundred steps of fastai: fourteen rates in each. The upper end costs nothing where the loss diverges before.

    Raises:
        ConfigError: for a range that does not rise.
    """

    min_rate: Annotated[float, "(0, inf)", "model.lr of the first step"] = 1e-6
    max_rate: Annotated[
        float, "(0, inf)", "model.lr of the last step, if the loss has not diverged before"
    ] = 10.0
    steps: Annotated[int, "[10, inf)", "optimizer steps from the one rate to the other"] = 100

    def __post_init__(self) -> None:
        if self.min_rate >= self.max_rate:
            raise ConfigError(
                f"tune.min_rate={self.min_rate:g} must be less than tune.max_rate={self.max_rate:g}",
                see="docs/use.md",
            )

    def rate(self, step: float) -> float:
        """`model.lr` of a step, from 0: min (max / min)^(step / (steps - 1))."""
        return self.min_rate * (self.max_rate / self.min_rate) ** (step / (self.steps - 1))

    def schedule(self, lr: float) -> Rising:
        """The schedule of the test, for the stage of that name.

        Args:
            lr: that of the optimizer, which the schedule scales: groups of parameters keep their rates' ratios.
        """
        return Rising(self, lr)


@dataclass(frozen=True)
class Rising:
    """In place of a run's schedule: `rate(step) / lr`."""

    options: RangeOptions
    lr: float

    def __call__(self, factor: Factor, epochs: float) -> Factor:
        """The factor as a function of progress in epochs; the training of `epochs` is the test's steps."""
        return lambda progress: self.options.rate(progress / epochs * self.options.steps) / self.lr


class RangeTest(Callback):
    """Keeps the loss of each step, and ends the training where it diverges.

    The loss is what the step minimises, the terms of techniques included: the mean over its samples, of all accumulated
    batches and of all ranks, before the step has moved a weight. Losses stay on the device and are read together, once
    in 10 steps; so a training that diverges goes on for at most 9 more.

    It has diverged where the smoothed loss is not finite, or is 4 times its lowest and above where it began.

    Attributes:
        losses: (n,) of the steps, on the host; the last one is the first that has diverged, if one has.
        diverged: whether one has.
    """

    def __init__(self, options: RangeOptions) -> None:
        self.options = options
        self.losses: list[float] = []
        self.diverged = False
        self._sums = torch.empty(0)  # (steps, 3) on the device: of loss, hits and samples
        self._before = torch.empty(0)
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        self._sums = torch.zeros(self.options.steps, 3, dtype=wide(device), device=device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step, self._before = trainer.global_step, watched(pl_module).running_sums().clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sums[self._step] += watched(pl_module).running_sums() - self._before
        done = trainer.global_step
        if done != self._step and (done % READ_EVERY == 0 or done == self.options.steps):
            self._read(trainer, done)

    def _read(self, trainer: Trainer, done: int) -> None:
        """Collective. All ranks read the same numbers, and stop at the same step."""
        sums: Tensor = self._sums[len(self.losses) : done]
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        known = len(self.losses)
        self.losses += [loss / samples for loss, _, samples in sums.tolist()]
        smooth = smoothed(self.losses, self.options.steps)
        least = min(smooth[: known + 1])
        for step in range(known, done):
            least = min(least, smooth[step])
            if not math.isfinite(smooth[step]) or smooth[step] > max(DIVERGED * least, smooth[0]):
                self.diverged = trainer.should_stop = True
                del self.losses[step + 1 :]
                return


def smoothed(values: Sequence[float], steps: int) -> list[float]:
    """Each value's exponential moving average, corrected for its start: sum_i b^(t - i) v_i / sum_i b^(t - i), i <= t.

    b = 1 - 1/h, with a horizon h of a twentieth of the test's `steps`.
    """
    keep = 1 - 1 / horizon(steps)
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def horizon(steps: int) -> float:
    """Of the smoothing, in steps; at least 1, which smooths nothing."""
    return max(1.0, steps / _HORIZONS)
