"""Averages of the weights over the training: EMA, and SWA (Izmailov et al., arXiv 1803.05407)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from crucible.options import ConfigError

__all__ = ["AveragingOptions", "WeightAverage", "attach_average"]


@dataclass(frozen=True)
class AveragingOptions:
    """The options of weight averaging: one of the two averages, or none.

    Raises:
        ConfigError: for both, or an option of one that is off.
    """

    ema_decay: Annotated[
        float | None, "(0, 1)", "decay a step of an exponential moving average of the weights; null: none"
    ] = None
    ema_warmup: Annotated[bool, "smaller decay at the start: at most (1 + t) / (10 + t) at step t"] = True
    swa_start: Annotated[
        float | None,
        "[0, 1)",
        "part of the training after which each epoch's weights are averaged; null: none",
    ] = None
    swa_lr: Annotated[
        float | None, "(0, 1]", "from swa_start on the rate is this fraction of lr; null: the schedule's"
    ] = None

    def __post_init__(self) -> None:
        if self.ema_decay is not None and self.swa_start is not None:
            raise ConfigError(
                f"model.ema_decay={self.ema_decay} and model.swa_start={self.swa_start}: the weights that are"
                " evaluated are one average; set one of the two to null"
            )
        if not self.ema_warmup and self.ema_decay is None:
            raise ConfigError("model.ema_warmup=false needs model.ema_decay")
        if self.swa_lr is not None and self.swa_start is None:
            raise ConfigError(f"model.swa_lr={self.swa_lr} needs model.swa_start")

    @property
    def on(self) -> bool:
        """Whether an average is kept."""
        return self.ema_decay is not None or self.swa_start is not None

    def hold(self, epochs: float) -> tuple[float, float] | None:
        """From which epoch on which fraction of the rate is held; None: the schedule goes on."""
        if self.swa_start is None or self.swa_lr is None:
            return None
        return math.floor(self.swa_start * epochs), self.swa_lr


class WeightAverage:
    """An average of a network's parameters and buffers, fed after optimizer steps.

    With t = 1, 2, ... counting the updates, an update with the weights w is

        EMA:  average <- d average + (1 - d) w,   d = min(decay, (1 + t) / (10 + t)) with warm-up, else decay
        SWA:  average <- average + (w - average) / t

    The EMA starts at the weights before the first step, SWA at its first update. Floating buffers (running
    statistics) are averaged alike, counters are copied. The sums are in the tensors' own dtype.

    Args:
        network: what is averaged; the average is no part of it, nor of its `state_dict()`.
        decay: of the EMA; None: SWA's equal weights.
        warmup: see above.
    """

    def __init__(self, network: nn.Module, decay: float | None = None, warmup: bool = True) -> None:
        self.network = network
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._average: dict[str, Tensor] = {}

    @property
    def started(self) -> bool:
        """Whether there is an average; before, the weights themselves stand for it."""
        return bool(self._average)

    @torch.no_grad()
    def start(self) -> None:
        """Set the average to the weights as they are; once."""
        if not self._average:
            self._average = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights into the average."""
        self.start()
        self.updates += 1
        share = 1 / self.updates
        if self.decay is not None:
            warm = (1 + self.updates) / (10 + self.updates) if self.warmup else 1.0
            share = 1 - min(self.decay, warm)
        present = self._tensors()
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, tensor in present.items():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(name)
        for (dtype, _), names in kinds.items():
            average, now = [self._average[n] for n in names], [present[n].detach() for n in names]
            if dtype.is_floating_point:
                torch._foreach_lerp_(average, now, share)
            else:
                torch._foreach_copy_(average, now)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the averaged weights inside, and its own again afterwards.

        The two sets trade their storage: nothing is copied, and every reference to a parameter stays valid.
        What changes the network's tensors inside (norm statistics, say) changes the average.
        """
        self._trade()
        try:
            yield
        finally:
            self._trade()

    def _trade(self) -> None:
        for name, tensor in self._tensors().items() if self._average else ():
            tensor.data, self._average[name].data = self._average[name].data, tensor.data

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the network's keys; the network's own before there is an average."""
        return dict(self._average) if self._average else self.network.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on with a saved average, `updates` old."""
        self.updates = updates
        self._average = {
            name: torch.empty_like(tensor).copy_(state[name]) for name, tensor in self._tensors().items()
        }

    def _tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict(keep_vars=True)


def attach_average(
    optimizer: Optimizer, average: WeightAverage, is_due: Callable[[], bool] | None = None
) -> None:
    """Feed `average` after the steps that `optimizer` performs; one that a loss scaler skips is no step.

    Attach it after Lookahead, whose weights it is to average.

    Args:
        optimizer: of the network's parameters.
        average: an EMA or SWA.
        is_due: whether the step just done is one to average after; None: every step, and the average starts
            at the weights before the first one.
    """

    def before_step(*_: Any) -> None:
        average.start()

    def after_step(*_: Any) -> None:
        if is_due is None or is_due():
            average.update()

    if is_due is None:
        optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
