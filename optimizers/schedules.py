"""Learning-rate schedules: the factor on the rate as a function of progress, in closed form but for a plateau."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from crucible.configuration import select
from crucible.corrections import Correction
from crucible.metrics import higher_is_better
from crucible.options import ConfigError
from crucible.patience import Patience
from crucible.technique import Factor
from optimizers import OptimizerOptions

Scheduler = Literal["CosineAnneal", "MultiStep", "Step", "Plateau"]


def _warms_up_by_the_step(config: Mapping[str, Any]) -> bool:
    return select(config, "model.lr_interval") == "step" and bool(select(config, "model.warmstart"))


@dataclass(frozen=True)
class ScheduleOptions:
    """The options of the learning-rate schedule; lengths are in epochs.

    Raises:
        ConfigError: for an option that the chosen scheduler does not have.
    """

    corrections: ClassVar = (
        Correction(
            "model.lr_interval", 2, _warms_up_by_the_step,
            "a warm-up by the step began at 1 / (model.warmstart + 1) of the rate",
        ),
    )  # fmt: skip

    scheduler: Annotated[Scheduler | None, "how the learning rate falls; null: it stays"] = "CosineAnneal"
    warmstart: Annotated[int | float, "[0, inf)", "epochs of linear warm-up (arXiv 1706.02677)"] = 1
    warmstart_from: Annotated[
        float | None,
        "[0, 1]",
        "where the warm-up begins, as a fraction of model.lr; null: at the share of one epoch, or step",
    ] = None
    warmstart_inside: Annotated[
        bool,
        "the warm-up covers the cosine's first epochs, as timm's does, instead of coming before it (CosineAnneal)",
    ] = False
    cooldown: Annotated[int | float, "[0, inf)", "last epochs, spent at the lowest rate"] = 0
    lr_min: Annotated[
        float,
        "[0, 1]",
        "where the cosine ends, as a fraction of model.lr (CosineAnneal); the lowest (Plateau)",
    ] = 0.0
    lr_milestones: Annotated[
        list[int | float] | None,
        "(0, inf)",
        "epochs at which the rate falls; null: at half and three quarters of the training (MultiStep)",
    ] = None
    lr_step_size: Annotated[
        int | float | None, "(0, inf)", "epochs between falls; null: a quarter of the training (Step)"
    ] = None
    lr_multiplier: Annotated[
        float | None, "(0, 1]", "factor of each fall; null: 0.1 (MultiStep, Step, Plateau)"
    ] = None
    lr_patience: Annotated[
        int | None, "[1, inf)", "validations without a better lr_monitor before a fall; null: 10 (Plateau)"
    ] = None
    lr_monitor: Annotated[
        str | None, "value of the validation that the rate falls by; null: val/loss (Plateau)"
    ] = None
    lr_restarts: Annotated[
        list[int | float] | None,
        "(0, inf)",
        "epochs at which the cosine starts again from the full rate (arXiv 1608.03983); null: none (CosineAnneal)",
    ] = None
    lr_scale_batch: Annotated[
        int | None,
        "[1, inf)",
        "lr is that of this batch size, and scaled with the global one's (arXiv 1706.02677); null: as given",
    ] = None
    lr_scale_momentum: Annotated[
        bool,
        "with lr_scale_batch: momentum^(B/B0) too, which goes on averaging over as many samples (arXiv 1905.05894)",
    ] = False
    lr_ahead: Annotated[
        int | float, "[0, inf)", "from the second epoch on, the rate is the one of so many epochs later"
    ] = 0
    lr_interval: Annotated[
        Literal["epoch", "step"],
        "when the rate changes: with the epoch, as published recipes mostly do, or with every optimizer step",
    ] = "epoch"

    def __post_init__(self) -> None:
        owners: dict[str, tuple[Scheduler, ...]] = {
            "cooldown": ("CosineAnneal", "MultiStep", "Step"),
            "lr_min": ("CosineAnneal", "Plateau"),
            "lr_patience": ("Plateau",),
            "lr_monitor": ("Plateau",),
            "warmstart_inside": ("CosineAnneal",),
            "lr_ahead": ("CosineAnneal", "MultiStep", "Step"),
            "lr_restarts": ("CosineAnneal",),
            "lr_milestones": ("MultiStep",),
            "lr_step_size": ("Step",),
            "lr_multiplier": ("MultiStep", "Step", "Plateau"),
        }
        for name, schedulers in owners.items():
            value = getattr(self, name)
            if value not in (None, 0, False) and self.scheduler not in schedulers:
                raise ConfigError(
                    f"model.{name}={value!r} needs model.scheduler={' or '.join(schedulers)},"
                    f" got {self.scheduler or 'null'}"
                )
        for name in ("warmstart_from", "warmstart_inside"):
            if (value := getattr(self, name)) not in (None, False) and not self.warmstart:
                raise ConfigError(f"model.{name}={value!r} needs model.warmstart, got {self.warmstart}")
        if self.lr_scale_momentum and self.lr_scale_batch is None:
            raise ConfigError("model.lr_scale_momentum=True needs model.lr_scale_batch, got null")
        if any(later <= earlier for earlier, later in pairwise(self.lr_restarts or ())):
            raise ConfigError(f"model.lr_restarts must be in rising order, got {self.lr_restarts}")

    def check_changing_steps(self, max_steps: int) -> None:
        """Refuse what counts on epochs of equally many steps, where a callback changes the batches of a step.

        Args:
            max_steps: of the trainer.

        Raises:
            ConfigError: naming the option.
        """
        problem = None
        if self.lr_scale_batch is not None:
            problem = f"model.lr_scale_batch={self.lr_scale_batch} scales the rate with one batch size for all steps"
        elif self.lr_interval == "step" and (self.scheduler is not None or self.warmstart):
            problem = "model.lr_interval=step counts the steps of an epoch once (epoch goes)"
        elif max_steps > 0 and self.scheduler is not None:
            problem = (
                f"trainer.max_steps={max_steps} is so many epochs only where all have the same number of steps "
                "(trainer.max_epochs goes)"
            )
        if problem:
            raise ConfigError(
                f"{problem}: it does not go with a GradientAccumulationScheduler; for steps of several batches "
                "throughout, trainer.accumulate_grad_batches"
            )

    def for_batch(self, options: OptimizerOptions, global_batch: int) -> OptimizerOptions:
        """The optimizer's options for B = `global_batch` samples a step; l, m: rate, momentum; B0: `lr_scale_batch`.

            l' = l B / B0                       (arXiv 1706.02677)
            m' = m^(B / B0), l' = l B / B0 (1 - m') / (1 - m)   with `lr_scale_momentum`

        of which the second keeps the moving average over samples, and a sample's whole part in the weights
        (github.com/Cerebras/online-normalization, experiments/resnet/utils.py).
        """
        if self.lr_scale_batch is None:
            return options
        ratio = global_batch / self.lr_scale_batch
        old = options.momentum_in_use
        if not self.lr_scale_momentum or old is None:
            return replace(options, lr=options.lr * ratio)
        new = old**ratio
        return replace(options, lr=options.lr * ratio * (1 - new) / (1 - old), momentum=new)


def training_length(max_epochs: int | None, max_steps: int | None, steps_per_epoch: int) -> float:
    """The length of a training in epochs, of which the last may be a part: what ends first.

    A bound that is not positive or None is none; without any the length is infinite. What ends a training early (a time
    limit, early stopping) does not change the length that the schedule and the averages count on.
    """
    bounds = [float(max_epochs)] if max_epochs is not None and max_epochs > 0 else []
    if max_steps is not None and max_steps > 0:
        bounds.append(max_steps / steps_per_epoch)
    return min(bounds, default=math.inf)


class Plateau:
    """Falls of the rate, one after each `lr_patience` validations in a row that were not better than the best before.

    Args:
        options: `lr_patience`, and `lr_monitor`, the value that is watched.
    """

    def __init__(self, options: ScheduleOptions) -> None:
        self.monitor = options.lr_monitor or "val/loss"
        self.patience = 10 if options.lr_patience is None else options.lr_patience
        self.falls = 0
        self._watch = Patience(higher_is_better(self.monitor))
        self._observed = -1  # after which batch of the training

    def observe(self, trainer: Any) -> None:
        """Take in the validation that has ended, once; its fall counts from the next step on."""
        place_of_it = trainer.fit_loop.epoch_loop.total_batch_idx
        if place_of_it == self._observed:
            return
        self._observed = place_of_it
        self._watch.observe(float(trainer.callback_metrics[self.monitor]))
        if self._watch.waited >= self.patience:
            self._watch.waited, self.falls = 0, self.falls + 1
            for known in trainer.lr_scheduler_configs:
                place(known.scheduler, known.scheduler.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Falls so far, and what the next one depends on."""
        return {"falls": self.falls, **self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.falls = state["falls"]
        self._watch.load_state_dict(state)


def schedule(
    options: ScheduleOptions, epochs: float, unit: float = 1.0, plateau: Plateau | None = None
) -> Callable[[float], float]:
    """The factor on the learning rate as a function of progress, in epochs since the start of training.

    It is defined for any progress from 0 on, depends on nothing else and rises in the warm-up and at
    `lr_restarts` only. With e the progress, u = `unit`, w = `warmstart`, f = `warmstart_from`, E = `epochs` -
    `cooldown`, and a the last and b the next of w (0 with `warmstart_inside`), the restarts and E:

        warm-up, e < w:        (e + u) / (w + u), or f + (1 - f) e / w
        CosineAnneal, e < E:   lr_min + (1 - lr_min) (1 + cos(pi (e - a) / (b - a))) / 2
        CosineAnneal, e >= E:  lr_min
        MultiStep, e < E:      lr_multiplier ^ (number of milestones <= e)
        Step, e < E:           lr_multiplier ^ floor(e / lr_step_size)
        both, e >= E:          the rate just before E
        Plateau:               max(lr_min, lr_multiplier ^ falls), which `plateau` counts

    From e = 1 on, e is `lr_ahead` epochs more than the progress, and E for the last line too. Milestones and step sizes
    that are null are fractions of E. A fall that comes before the warm-up ends acts on the warm-up too; a milestone at
    the end of the training acts on nothing; a warm-up longer than the training is cut off by its end. The function can
    be pickled.

    Args:
        options: the options of the schedule.
        epochs: length of the training in epochs (`training_length`).
        unit: epochs from one change of the rate to the next: 1, or the part of an epoch that a step is. The
            warm-up begins at the share of one of them.
        plateau: of `Plateau`; None: it has not fallen.

    Raises:
        ConfigError: for lengths that do not fit into `epochs`, and for a fall over a training without an end.
    """
    if math.isinf(epochs) and options.scheduler not in (None, "Plateau"):
        raise ConfigError(
            f"model.scheduler={options.scheduler} needs the length of the training: set trainer.max_epochs or "
            "trainer.max_steps"
        )
    end = epochs - options.cooldown
    if options.cooldown and end < options.warmstart:
        raise ConfigError(
            f"model.warmstart={options.warmstart} and model.cooldown={options.cooldown} together"
            f" must be at most {_named(epochs)}"
        )
    for name in ("lr_milestones", "lr_restarts"):
        at_most = (
            name == "lr_milestones" and not options.cooldown
        )  # published schedules name the last epoch too
        late = [m for m in getattr(options, name) or () if m > end or (m == end and not at_most)]
        if late:
            less = f" - model.cooldown={options.cooldown}" if options.cooldown else ""
            bound = "at most" if at_most else "less than"
            raise ConfigError(f"model.{name} must be {bound} {_named(epochs)}{less}, got {late[0]}")
    warm_up, restarts = float(options.warmstart), options.lr_restarts or []
    if restarts and restarts[0] <= warm_up:
        raise ConfigError(
            f"model.lr_restarts must be greater than model.warmstart={options.warmstart}, got {restarts[0]}"
        )
    rise = partial(_warm_up, warm_up, unit, options.warmstart_from)
    if options.scheduler is None:
        return rise
    if options.scheduler == "Plateau":
        falls = 0.1 if options.lr_multiplier is None else options.lr_multiplier
        return partial(_plateau, rise, plateau or Plateau(options), falls, options.lr_min)
    multiplier = 0.1 if options.lr_multiplier is None else options.lr_multiplier
    factor: Callable[[float], float]
    if options.scheduler == "CosineAnneal":
        marks = (0.0 if options.warmstart_inside else warm_up, *restarts, end)
        factor = partial(_cosine, rise, warm_up, marks, options.lr_min)
    elif options.scheduler == "Step":
        size = options.lr_step_size or end / 4
        falls = math.ceil((end + options.lr_ahead) / size) - 1  # those before the end
        factor = partial(_step, rise, size, falls, multiplier)
    else:
        milestones = options.lr_milestones
        milestones = [end / 2, end * 3 / 4] if milestones is None else milestones
        factor = partial(_multi_step, rise, tuple(milestones), multiplier)
    return partial(_ahead, factor, options.lr_ahead) if options.lr_ahead else factor


def build_scheduler(
    optimizer: Optimizer,
    options: ScheduleOptions,
    *,
    epochs: float,
    steps_per_epoch: int,
    changes: Sequence[Callable[[Factor, float], Factor]] = (),
    plateau: Plateau | None = None,
) -> dict[str, Any] | None:
    """The schedule as Lightning's `lr_scheduler` configuration, or None where the rate never changes.

    The scheduler is a `LambdaLR` whose only state is a count of epochs or steps.

    Args:
        optimizer: its learning rates are what the factor scales.
        options: the options of the schedule.
        epochs: length of the training in epochs.
        steps_per_epoch: optimizer steps in an epoch, after gradient accumulation.
        changes: what techniques make of the factor, each with the length of the training (the stage `schedule`).
        plateau: of `Plateau`.

    Raises:
        ConfigError: as `schedule`.
    """
    by_step = options.lr_interval == "step"
    factor = schedule(options, epochs, 1 / steps_per_epoch if by_step else 1.0, plateau)
    if options.scheduler is None and not options.warmstart and not changes:
        return None
    for change in changes:
        factor = change(factor, epochs)
    if by_step:
        factor = partial(_of_step, factor, steps_per_epoch)
    return {"scheduler": LambdaLR(optimizer, factor), "interval": options.lr_interval}


def _named(epochs: float) -> str:
    return f"the training's {epochs:.4g} epochs (trainer.max_epochs, trainer.max_steps)"


def resume_schedule(trainer: Any, state: Mapping[str, Any], steps_per_epoch: int) -> None:
    """Set the rates that this configuration has where a training state ended.

    Args:
        trainer: at the start of its training, its progress restored.
        state: of which `steps_per_epoch` counts, where batches had another size.
        steps_per_epoch: of this training.
    """
    epoch = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    done, inside = trainer.current_epoch, epoch.started > epoch.processed
    if inside and batches >= trainer.num_training_batches:  # saved while its validation ran
        done, inside = done + 1, False
    steps = trainer.global_step
    if state.get("steps_per_epoch", steps_per_epoch) != steps_per_epoch:
        steps = done * steps_per_epoch + (batches // trainer.accumulate_grad_batches if inside else 0)
    for known in trainer.lr_scheduler_configs:
        if isinstance(known.scheduler, LambdaLR):
            place(known.scheduler, steps if known.interval == "step" else done)


def place(scheduler: LambdaLR, count: int) -> None:
    """Set the rates as they are after `count` epochs or steps of the configured schedule, whatever was loaded."""
    groups = scheduler.optimizer.param_groups
    base = [group["initial_lr"] for group in groups]
    rates = [lr * factor(count) for lr, factor in zip(base, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    known = {**scheduler.state_dict(), "last_epoch": count, "base_lrs": base, "_last_lr": list(rates)}
    scheduler.load_state_dict(known)


# Functions of the last argument, bound with `partial`: they pickle, and LambdaLR stores nothing of them, so
# that a resumed run follows its own options.


def _of_step(factor: Callable[[float], float], steps_per_epoch: int, step: int) -> float:
    return factor(step / steps_per_epoch)


def _ahead(factor: Callable[[float], float], by: float, epoch: float) -> float:
    return factor(epoch if epoch < 1 else epoch + by)


def _warm_up(warm_up: float, unit: float, start: float | None, epoch: float) -> float:
    if epoch >= warm_up:
        return 1.0
    return (epoch + unit) / (warm_up + unit) if start is None else start + (1 - start) * epoch / warm_up


def _cosine(rise: Factor, warm_up: float, marks: tuple[float, ...], minimum: float, epoch: float) -> float:
    """`marks`: where the first fall begins, the restarts, the end."""
    if epoch < warm_up:
        return rise(epoch)
    if epoch >= marks[-1]:
        return minimum
    behind = bisect_right(marks, epoch)
    start, end = marks[behind - 1], marks[behind]
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * (epoch - start) / (end - start))) / 2


def _plateau(rise: Factor, plateau: Plateau, multiplier: float, minimum: float, epoch: float) -> float:
    return rise(epoch) * max(minimum, multiplier**plateau.falls)


def _multi_step(rise: Factor, milestones: tuple[float, ...], multiplier: float, epoch: float) -> float:
    return rise(epoch) * multiplier ** sum(m <= epoch for m in milestones)


def _step(rise: Factor, size: float, falls: int, multiplier: float, epoch: float) -> float:
    return rise(epoch) * multiplier ** min(epoch // size, falls)
