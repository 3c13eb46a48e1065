"""Averages of the weights over the training: EMA, and SWA (Izmailov et al., arXiv 1803.05407)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from crucible.options import ConfigError
from crucible.technique import Factor, Setting, Step, Technique
from norms import average_running_statistics

NORM_BATCHES = 100  # that SWA's norm statistics come from


@dataclass(frozen=True)
class Averaging(Technique):
    """One of two averages of the weights, or none."""

    needs: ClassVar = {"ema_warmup": ("ema_decay",), "swa_lr": ("swa_start",)}

    ema_decay: Annotated[
        float | None, "(0, 1)", "decay a step of an exponential moving average of the weights; null: none"
    ] = None
    ema_warmup: Annotated[bool, "smaller decay at the start: at most (1 + t) / (10 + t) at step t"] = True
    swa_start: Annotated[
        float | None,
        "[0, 1)",
        "part of the training after which each epoch's weights are averaged (arXiv 1803.05407); null: none",
    ] = None
    swa_lr: Annotated[
        float | None, "(0, 1]", "from swa_start on the rate is this fraction of lr; null: the schedule's"
    ] = None

    def check(self, setting: Setting) -> None:
        if self.ema_decay is not None and self.swa_start is not None:
            raise ConfigError(
                f"model.ema_decay={self.ema_decay} and model.swa_start={self.swa_start}: the weights that are"
                " evaluated are one average; set one of the two to null"
            )

    def attach(self, step: Step) -> None:
        if self.swa_start is None:
            step.weights.append(AveragedWeights(self.ema_decay, self.ema_warmup))
            return
        step.weights.append(AveragedWeights(is_due=self._ends_a_late_epoch, refresh_norms=True))
        if self.swa_lr is not None:
            step.schedule.append(self._hold)

    def _ends_a_late_epoch(self, module: Any) -> bool:
        assert self.swa_start is not None
        trainer = module.trainer
        last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
        return last and module.current_epoch + 1 > self.swa_start * module.epochs

    def _hold(self, factor: Factor, epochs: float) -> Factor:
        assert self.swa_start is not None and self.swa_lr is not None
        return partial(_held, factor, math.floor(self.swa_start * epochs), self.swa_lr)


def _held(factor: Factor, start: float, value: float, epoch: float) -> float:
    return value if epoch >= start else factor(epoch)


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


class AveragedWeights:
    """A `WeightAverage` as the weights that are evaluated and shipped (the stage `weights` of a step).

    Args:
        decay: as of `WeightAverage`.
        warmup: as of `WeightAverage`.
        is_due: whether the step just done is one to average after, asked with the model; None: every step.
        refresh_norms: take batch norms' statistics anew before an evaluation.
    """

    def __init__(
        self,
        decay: float | None = None,
        warmup: bool = True,
        is_due: Callable[[Any], bool] | None = None,
        refresh_norms: bool = False,
    ) -> None:
        self.kind = "EMA" if is_due is None else "SWA"  # for training states: one is no start of the other
        self._decay, self._warmup, self._is_due, self._refreshes = decay, warmup, is_due, refresh_norms
        self._saved: tuple[Mapping[str, Tensor], int] | None = None
        self.average: WeightAverage | None = None

    @property
    def active(self) -> bool:
        return self.average is not None

    @property
    def updates(self) -> int | None:
        return self.average.updates if self.average is not None and self.average.started else None

    def start(self, module: Any, optimizer: Optimizer) -> None:
        self.average = WeightAverage(module.model, self._decay, self._warmup)
        if self._saved is not None:
            self.average.load_state_dict(*self._saved)
        is_due = self._is_due
        attach_average(optimizer, self.average, None if is_due is None else lambda: is_due(module))

    def applied(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def refresh(self, module: Any) -> None:
        if self._refreshes and self.updates is not None:
            refresh_norms(module)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        self._saved = state, updates


def refresh_norms(module: Any) -> None:
    """Batch norms' statistics anew, as those of averaged weights are no average (arXiv 1803.05407, 3.2).

    From NORM_BATCHES training batches, normalised but neither mixed nor distorted.

    Args:
        module: the model, attached to a trainer.
    """
    data, epoch = module.trainer.datamodule, module.current_epoch
    module.reseed("norm statistics", epoch)

    def inputs() -> Iterator[Tensor]:
        for batch in data.training_batches(epoch, NORM_BATCHES):
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            yield module.as_the_weights(data.batch_transform(batch, "train", epoch)).input

    network = module.model
    training = network.training
    with torch.inference_mode(False), module.trainer.precision_plugin.forward_context():
        update_bn(inputs(), network)
    network.train(training)
    average_running_statistics(network)
