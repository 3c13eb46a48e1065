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

from augmentation.manifold_mixup import ManifoldMixup
from crucible.configuration import select
from crucible.corrections import Correction, all_of, option_is
from crucible.machine import world_size
from crucible.options import ConfigError
from crucible.private import storage_identity
from crucible.technique import Factor, Setting, Step, Technique, is_on
from norms import refresh_statistics

NORM_BATCHES = 100  # that SWA's norm statistics come from


def _in_half_precision(config: Mapping[str, Any]) -> bool:
    return str(select(config, "trainer.precision")) in ("bf16-true", "16-true")


def _ema_had_other_numbers(config: Mapping[str, Any]) -> bool:
    """In half precision, and where each process had the average of running statistics of its own."""
    if select(config, "model.ema_decay") is None:
        return False
    synchronised = bool(select(config, "trainer.sync_batchnorm"))
    apart = ("ghost", "switchable") if synchronised else (None, "batch", "ghost", "switchable")
    several = world_size(config["trainer"]) > 1 and select(config, "model.norm") in apart
    return several or _in_half_precision(config)


def _swa_had_other_statistics(config: Mapping[str, Any]) -> bool:
    """Where the last average was not validated, or its norms were not torch's, or its sums rounded."""
    if select(config, "model.swa_start") is None:
        return False
    last_validated = (
        select(config, "trainer.check_val_every_n_epoch") in (None, 1)
        and select(config, "trainer.val_check_interval") in (None, 1.0)
        and select(config, "trainer.limit_val_batches") not in (0, 0.0)
        and select(config, "trainer.max_steps") in (None, -1)
    )
    other_norms = select(config, "model.norm") in ("switchable", "online")
    return not last_validated or other_norms or _in_half_precision(config)


def _swa_was_of_another_order(config: Mapping[str, Any]) -> bool:
    drawn = ("data.module.random_batches", "trainer.overfit_batches")
    return option_is("model.swa_start")(config) and any(option_is(option)(config) for option in drawn)


def _swa_was_of_other_images(config: Mapping[str, Any]) -> bool:
    """Where the network's precision reached the making of its images: crops on a device, else colours."""
    precision = str(select(config, "trainer.precision"))
    if not option_is("model.swa_start")(config) or precision in ("32-true", "32"):
        return False
    policy = str(select(config, "data.module.train_transforms._target_"))
    cropped = ".imagenet." in policy and select(config, "trainer.accelerator") != "cpu"
    coloured = any(kind in policy for kind in ("AutoAugment", "RandAugment", "TrivialAugment", "AugMix"))
    return cropped or (coloured and not precision.endswith("-mixed"))


@dataclass(frozen=True)
class Averaging(Technique):
    """One of two averages of the weights, or none."""

    needs: ClassVar = {"ema_warmup": ("ema_decay",), "swa_lr": ("swa_start",)}
    corrections: ClassVar = (
        Correction(
            "model.ema_decay", 2, _ema_had_other_numbers,
            "a slow average in half precision did not move, and processes evaluated with statistics of their own",
        ),
        Correction("model.swa_start", 2, _swa_had_other_statistics, "norm statistics of the average were stale"),
        Correction(
            "model.swa_start", 3, all_of(option_is("model.swa_start"), is_on(ManifoldMixup)),
            "norm statistics of the average were of features mixed as those of the last batch",
        ),
        Correction(
            "model.swa_start", 3, _swa_was_of_another_order,
            "norm statistics of the average were of batches in another order than the training's",
        ),
        Correction(
            "model.swa_start", 4, _swa_was_of_other_images,
            "norm statistics of the average were of images made in the network's precision",
        ),
    )  # fmt: skip

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
            ema = AveragedWeights(self.ema_decay, self.ema_warmup)
            step.weights.append(ema)
            step.kept.append(ema.tensors)  # SWA takes an epoch's weights, whatever its last step was
            return
        step.weights.append(AveragedWeights(is_due=self._ends_a_late_epoch))
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
    statistics) are averaged alike, counters are copied. The sums are float32 or wider, whatever the network's
    dtype, of which the weights that `applied` shows are. A tensor under several names is one.

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
        self._first: dict[
            str, str
        ] = {}  # of each name the first one of its tensor, which the average goes by
        self._sums: dict[str, Tensor] = {}
        self._cast: dict[str, Tensor] = {}  # what `applied` shows where it cannot show the sum itself

    @property
    def started(self) -> bool:
        """Whether there is an average; before, the weights themselves stand for it."""
        return bool(self._sums)

    @torch.no_grad()
    def start(self) -> None:
        """Set the average to the weights as they are; once."""
        if not self._sums:
            self._first = _first_names(self._tensors())
            self._sums = {n: torch.empty_like(t, dtype=_wide(t)).copy_(t) for n, t in self._present().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights into the average."""
        self.start()
        self.updates += 1
        self._cast = {}
        share = 1 / self.updates
        if self.decay is not None:
            warm = (1 + self.updates) / (10 + self.updates) if self.warmup else 1.0
            share = 1 - min(self.decay, warm)
        present = self._present()
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, total in self._sums.items():
            kinds.setdefault((total.dtype, total.device), []).append(name)
        for (dtype, _), names in kinds.items():
            average, now = [self._sums[n] for n in names], [present[n].detach().to(dtype) for n in names]
            if dtype.is_floating_point:
                torch._foreach_lerp_(average, now, share)
            else:
                torch._foreach_copy_(average, now)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the averaged weights inside, in its own dtype, and its own again afterwards.

        Nothing is copied where the sums are of that dtype, and every reference to a parameter stays valid. What
        changes the network's tensors inside (norm statistics, say) changes what is shown until the next update.
        """
        tensors = self._tensors() if self._sums else {}
        own = [(tensor, tensor.data) for tensor in tensors.values()]
        for name, tensor in tensors.items():
            tensor.data = self._shown(self._first[name], tensor)
        try:
            yield
        finally:
            for tensor, data in own:
                tensor.data = data

    def _shown(self, name: str, tensor: Tensor) -> Tensor:
        total, cast = self._sums[name], self._cast.get(name)
        if cast is None and total.dtype == tensor.dtype and total.device == tensor.device:
            return total
        if cast is None or cast.dtype != tensor.dtype or cast.device != tensor.device:
            with torch.inference_mode(False), torch.no_grad():
                cast = self._cast[name] = (total if cast is None else cast).to(tensor.device, tensor.dtype)
        return cast

    def state_dict(self) -> dict[str, Tensor]:
        """As `applied` shows it, under the network's keys; the network's own before there is an average."""
        with self.applied():
            return self.network.state_dict()

    def sums(self) -> dict[str, Tensor]:
        """The sums that are wider than the network's tensors, by the first name of each tensor."""
        return {n: self._sums[n] for n, t in self._present().items() if self._sums[n].dtype != t.dtype}

    @torch.no_grad()
    def load_state_dict(
        self, state: Mapping[str, Tensor], updates: int, sums: Mapping[str, Tensor] | None = None
    ) -> None:
        """Go on with a saved average, `updates` old; `sums` as the method of that name gave them."""
        self.updates, sums = updates, sums or {}
        self._first = _first_names(self._tensors())
        for name, tensor in self._present().items():
            total = torch.empty_like(tensor, dtype=_wide(tensor))
            self._sums[name] = total.copy_(sums.get(name, state[name]))
            if name in sums:
                self._cast[name] = torch.empty_like(tensor).copy_(state[name])

    def tensors(self) -> list[Tensor]:
        """The sums themselves, which an update changes."""
        return list(self._sums.values())

    def _tensors(self) -> dict[str, Tensor]:
        state = self.network.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

    def _present(self) -> dict[str, Tensor]:
        """Each tensor once, under its first name."""
        return {name: tensor for name, tensor in self._tensors().items() if self._first.get(name) == name}


def _wide(tensor: Tensor) -> torch.dtype:
    """Of a sum: in half precision a share of a thousandth is lost in the rounding."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each name the first one that means the same elements of the same storage."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((storage_identity(t), t.storage_offset(), t.shape, t.stride()), name)
        for name, t in tensors.items()
    }


def attach_average(optimizer: Optimizer, average: WeightAverage) -> None:
    """Feed `average` after each step that `optimizer` performs; one that a loss scaler skips is no step.

    The average starts at the weights before the first step. Attach it after Lookahead, whose weights it is to average.
    """

    def before_step(*_: Any) -> None:
        average.start()

    def after_step(*_: Any) -> None:
        average.update()

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


class AveragedWeights:
    """A `WeightAverage` as the weights that are evaluated and shipped (the stage `weights` of a step).

    Args:
        decay: as of `WeightAverage`.
        warmup: as of `WeightAverage`.
        is_due: whether the step just done is one to average after, asked with the model, also of a step that a loss
            scaler skips; None: every one that is performed.
        refresh_norms: take the norms' statistics anew before they are evaluated or saved; None: for an average of
            equal weights, as an EMA's statistics are EMAs too.
    """

    def __init__(
        self,
        decay: float | None = None,
        warmup: bool = True,
        is_due: Callable[[Any], bool] | None = None,
        refresh_norms: bool | None = None,
    ) -> None:
        self.kind = "EMA" if is_due is None else "SWA"  # for training states: one is no start of the other
        self._decay, self._warmup, self._is_due = decay, warmup, is_due
        self._refreshes = decay is None if refresh_norms is None else refresh_norms
        self._saved: tuple[Mapping[str, Tensor], int, Mapping[str, Tensor]] | None = None
        self._seen, self._epoch = 0, 0  # updates, and the epoch of the last one
        self._refreshed: int | None = None  # updates at the last refresh
        self.average: WeightAverage | None = None

    @property
    def active(self) -> bool:
        return self.average is not None

    @property
    def updates(self) -> int | None:
        return self.average.updates if self.average is not None and self.average.started else None

    def start(self, module: Any, optimizer: Optimizer) -> None:
        average = self.average = WeightAverage(module.model, self._decay, self._warmup)
        if self._saved is not None:
            average.load_state_dict(*self._saved)
            self._refreshed = average.updates  # a saved one is
        self._seen = average.updates
        if self._is_due is None:
            attach_average(optimizer, average)

    def after_step(self, module: Any) -> None:
        """A step was done, or left out by a loss scaler: an epoch's weights are due whatever became of its last."""
        average = self.average
        if average is None:
            return
        if self._is_due is not None and self._is_due(module):
            average.update()
        if average.updates != self._seen:
            self._seen, self._epoch = average.updates, module.current_epoch

    def applied(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def refresh(self, module: Any) -> None:
        if self._refreshes and self.updates is not None and self.updates != self._refreshed:
            self._refreshed = self.updates
            refresh_norms(module, self._epoch)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.state_dict()

    def sums(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.sums()

    def tensors(self) -> list[Tensor]:
        """The sums themselves; none before there are any."""
        return [] if self.average is None else self.average.tensors()

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int, sums: Mapping[str, Tensor]) -> None:
        self._saved = state, updates, sums


def refresh_norms(module: Any, epoch: int) -> None:
    """All norms' statistics anew, as those of averaged weights are no average (arXiv 1803.05407, 3.2).

    From the first NORM_BATCHES batches of an epoch, normalised but neither mixed nor distorted. A function of the
    weights, the epoch and the seed alone, whenever it is called.

    Args:
        module: the model, attached to a trainer.
        epoch: of the training.
    """
    data = module.trainer.datamodule
    module.reseed("norm statistics", epoch)

    def inputs() -> Iterator[Tensor]:
        if data is None:
            raise ConfigError("model: the norms of averaged weights need trainer.fit(model, datamodule=...)")
        for batch in data.training_batches(epoch, NORM_BATCHES):
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            if module.skips_nonfinite:
                # left out by all processes or by none: some norms exchange their statistics in the forward pass
                finite = bool(batch.input.isfinite().all())
                if not module.trainer.strategy.reduce_boolean_decision(finite, all=True):
                    continue
            yield module.as_the_weights(data.batch_transform(batch, "train", epoch)).input

    with torch.inference_mode(False):
        for mixing in module.step.inside:
            mixing.rest()
        refresh_statistics(module.model, inputs(), module.trainer.precision_plugin.forward_context)
