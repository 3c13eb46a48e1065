"""Learning-rate schedules: closed forms, warm-up, resume."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, MultiStepLR, StepLR

from crucible.options import ConfigError, read_options
from datasets.synthetic import SyntheticDataModule
from models.base_model import BaseModel
from optimizers import OptimizerOptions
from optimizers.schedules import ScheduleOptions, build_scheduler, schedule

EVERY = [
    ScheduleOptions(
        warmstart=3, warmstart_from=0.1, warmstart_inside=True, lr_ahead=1, cooldown=2, lr_min=0.01
    ),
    ScheduleOptions(scheduler="Step", warmstart=2, warmstart_from=0.2, lr_step_size=3, lr_ahead=1),
    ScheduleOptions(),
    ScheduleOptions(warmstart=3, cooldown=2, lr_min=0.01),
    ScheduleOptions(warmstart=2.5),
    ScheduleOptions(scheduler="MultiStep", warmstart=3, lr_milestones=[2, 6.5], lr_multiplier=0.3),
    ScheduleOptions(scheduler="Step", warmstart=1, lr_step_size=3, cooldown=2),
    ScheduleOptions(scheduler=None, warmstart=4),
]
RESTARTING = ScheduleOptions(warmstart=1, cooldown=1, lr_min=0.05, lr_restarts=[2.5, 6])


def optimizer() -> SGD:
    return SGD(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.3}], 0.1
    )


def rates(options: ScheduleOptions, epochs: float, steps_per_epoch: int, count: int) -> list[list[float]]:
    """The learning rates of the two groups at each of the first `count` counts of the scheduler."""
    built = optimizer()
    scheduler = build_scheduler(built, options, epochs=epochs, steps_per_epoch=steps_per_epoch)["scheduler"]
    seen = []
    for _ in range(count):
        seen.append([group["lr"] for group in built.param_groups])
        built.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("warmstart", [0, 1, 5])
@pytest.mark.parametrize("epochs", [8, 200])
def test_cosine_per_epoch_is_the_published_closed_form(epochs, warmstart):
    expected = [
        (e + 1) / (warmstart + 1)
        if e < warmstart
        else (1 + math.cos(math.pi * (e - warmstart) / (epochs - warmstart))) / 2
        for e in range(epochs)
    ]
    got = rates(ScheduleOptions(warmstart=warmstart), epochs, steps_per_epoch=7, count=epochs)
    assert got == [[0.1 * f, 0.3 * f] for f in expected]


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        (ScheduleOptions(warmstart=0), lambda o: CosineAnnealingLR(o, T_max=12)),
        (ScheduleOptions(scheduler="Step", warmstart=0), lambda o: StepLR(o, step_size=3, gamma=0.1)),
        (ScheduleOptions(scheduler="MultiStep", warmstart=0), lambda o: MultiStepLR(o, [6, 9], gamma=0.1)),
        (
            ScheduleOptions(scheduler="MultiStep", warmstart=0, lr_milestones=[2, 5], lr_multiplier=0.5),
            lambda o: MultiStepLR(o, [2, 5], gamma=0.5),
        ),
        (
            ScheduleOptions(scheduler="Step", warmstart=0, lr_step_size=5, lr_multiplier=0.5),
            lambda o: StepLR(o, step_size=5, gamma=0.5),
        ),
    ],
)
def test_per_epoch_equals_torchs_scheduler(options, reference):
    other = optimizer()
    scheduler = reference(other)
    expected = []
    for _ in range(12):
        expected.append([group["lr"] for group in other.param_groups])
        other.step()
        scheduler.step()
    torch.testing.assert_close(torch.tensor(rates(options, 12, 7, 12)), torch.tensor(expected))


@pytest.mark.parametrize(("growth", "restarts", "epochs"), [(1, [4, 8, 12, 16, 20], 24), (2, [4, 12], 28)])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_restarts_equal_torchs_cosine_with_warm_restarts(growth, restarts, epochs, interval):
    options = ScheduleOptions(warmstart=0, lr_restarts=restarts, lr_min=0.1, lr_interval=interval)
    steps = 5 if interval == "step" else 1
    got = [rate for rate, _ in rates(options, epochs, steps, epochs * steps)]
    other = SGD([nn.Parameter(torch.ones(1))], 0.1)
    scheduler = CosineAnnealingWarmRestarts(other, T_0=4, T_mult=growth, eta_min=0.01)
    expected = []
    for step in range(epochs * steps):
        scheduler.step(step / steps)
        expected.append(other.param_groups[0]["lr"])
    assert got == pytest.approx(expected)


def test_restarts_come_after_the_warm_up_and_leave_the_cool_down_alone():
    factor = schedule(RESTARTING, 10)

    def cosine(part: float) -> float:
        return 0.05 + 0.95 * (1 + math.cos(math.pi * part)) / 2

    expected = {
        0: 0.5,
        1: 1,
        2: cosine(1 / 1.5),
        2.5: 1,
        5: cosine(2.5 / 3.5),
        6: 1,
        8: cosine(2 / 3),
        9: 0.05,
        12: 0.05,
    }
    assert {e: factor(e) for e in expected} == pytest.approx(expected)


def test_per_step_the_same_curve_is_followed_in_fractions_of_an_epoch():
    options = ScheduleOptions(warmstart=2, cooldown=1, lr_min=0.1, lr_interval="step")
    got = [rate / 0.1 for rate, _ in rates(options, epochs=10, steps_per_epoch=4, count=40)]
    for step, factor in enumerate(got):
        e = step / 4
        if e < 2:
            expected = (step + 1) / 9  # one step's share at the start
        elif e < 9:
            expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (e - 2) / 7)) / 2
        else:
            expected = 0.1
        assert factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", EVERY)
def test_nothing_rises_after_the_warm_up_and_the_end_is_no_end(options):
    factor = schedule(options, 10)
    curve = [factor(e / 16) for e in range(int(16 * options.warmstart + 0.5), 16 * 40)]
    assert all(later <= earlier for earlier, later in pairwise(curve))
    assert 0 <= curve[-1] <= 1


@pytest.mark.parametrize("options", [*EVERY, RESTARTING])
def test_a_pickled_schedule_is_the_same(options):
    factor = schedule(options, 10)
    again = pickle.loads(pickle.dumps(factor))
    assert [again(e / 8) for e in range(100)] == [factor(e / 8) for e in range(100)]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("stopped", [1, 3, 7, 11])
def test_a_resumed_run_goes_on_exactly(interval, stopped):
    options = ScheduleOptions(warmstart=2, lr_interval=interval)
    arguments = {"epochs": 12 if interval == "epoch" else 4, "steps_per_epoch": 3}
    whole = rates(options, **arguments, count=12)
    first = optimizer()
    scheduler = build_scheduler(first, options, **arguments)["scheduler"]
    for _ in range(stopped):
        first.step()
        scheduler.step()
    states = pickle.loads(pickle.dumps((first.state_dict(), scheduler.state_dict())))
    second = optimizer()
    resumed = build_scheduler(second, options, **arguments)["scheduler"]
    second.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    got = []
    for _ in range(stopped, 12):
        got.append([group["lr"] for group in second.param_groups])
        second.step()
        resumed.step()
    assert got == whole[stopped:]


def test_looking_ahead_changes_nothing():
    options = ScheduleOptions(warmstart=2)
    built = optimizer()
    scheduler = build_scheduler(built, options, epochs=12, steps_per_epoch=3)["scheduler"]
    for _ in range(12):
        ahead = [scheduler.lr_lambdas[0](e) for e in range(12)]
        assert built.param_groups[0]["lr"] == 0.1 * ahead[scheduler.last_epoch]
        built.step()
        scheduler.step()


def test_a_resumed_run_may_be_given_another_length():
    options = ScheduleOptions(warmstart=0)
    scheduler = build_scheduler(optimizer(), options, epochs=4, steps_per_epoch=3)["scheduler"]
    longer = build_scheduler(optimizer(), options, epochs=8, steps_per_epoch=3)["scheduler"]
    longer.load_state_dict(scheduler.state_dict())
    assert longer.lr_lambdas[0](4) == pytest.approx(0.5)


def test_no_scheduler_is_none_and_a_warm_up_alone_is_honoured():
    assert (
        build_scheduler(
            optimizer(), ScheduleOptions(scheduler=None, warmstart=0), epochs=5, steps_per_epoch=3
        )
        is None
    )
    got = rates(ScheduleOptions(scheduler=None, warmstart=3), epochs=5, steps_per_epoch=3, count=5)
    assert [rate / 0.1 for rate, _ in got] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_lightning_is_told_the_interval(interval):
    config = build_scheduler(optimizer(), ScheduleOptions(lr_interval=interval), epochs=5, steps_per_epoch=3)
    assert config["interval"] == interval


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("scheduler", ["Step", "MultiStep"])
def test_short_runs_start_at_the_full_rate(scheduler, epochs):
    assert schedule(ScheduleOptions(scheduler=scheduler, warmstart=0), epochs)(0) == 1


def test_a_run_shorter_than_its_warm_up_ends_within_it():
    factor = schedule(ScheduleOptions(warmstart=10), 1)
    assert factor(0) == pytest.approx(1 / 11)


@pytest.mark.parametrize("scheduler", ["Step", "MultiStep"])
def test_the_cool_down_keeps_the_lowest_rate_of_the_rest(scheduler):
    rest = schedule(ScheduleOptions(scheduler=scheduler, warmstart=0), 8)
    whole = schedule(ScheduleOptions(scheduler=scheduler, warmstart=0, cooldown=2), 10)
    assert [whole(e) for e in range(8)] == [rest(e) for e in range(8)]
    assert whole(8) == whole(9) == rest(7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"warmstart": 8, "cooldown": 3},
            "model.warmstart=8 and model.cooldown=3 .* the training's 10 epochs",
        ),
        (
            {"scheduler": "MultiStep", "lr_milestones": [3, 10.5]},
            "model.lr_milestones must be at most the training's 10 epochs .*, got 10.5",
        ),
        (
            {"lr_restarts": [3, 8], "cooldown": 2},
            "model.lr_restarts must be less than the training's 10 epochs .* - model.cooldown=2, got 8",
        ),
        (
            {"lr_restarts": [3], "warmstart": 3},
            "model.lr_restarts must be greater than model.warmstart=3, got 3",
        ),
    ],
)
def test_lengths_that_do_not_fit_the_training_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        schedule(read_options(ScheduleOptions, values), 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lr_milestones": [3]},
            r"model.lr_milestones=\[3\] needs model.scheduler=MultiStep, got CosineAnneal",
        ),
        (
            {"lr_restarts": [3], "scheduler": "Step"},
            r"model.lr_restarts=\[3\] needs model.scheduler=CosineAnneal",
        ),
        ({"lr_restarts": [6, 3]}, r"model.lr_restarts must be in rising order, got \[6, 3\]"),
        ({"lr_scale_batch": 0}, "model.lr_scale_batch must be .* got 0"),
        ({"lr_step_size": 3}, "model.lr_step_size=3 needs model.scheduler=Step, got CosineAnneal"),
        ({"lr_multiplier": 0.2}, "model.lr_multiplier=0.2 needs model.scheduler=MultiStep or Step"),
        (
            {"scheduler": None, "cooldown": 2},
            "model.cooldown=2 needs model.scheduler=CosineAnneal or MultiStep or Step, got null",
        ),
        (
            {"scheduler": None, "lr_min": 0.1},
            "model.lr_min=0.1 needs model.scheduler=CosineAnneal or Plateau, got null",
        ),
        (
            {"scheduler": "Cosine"},
            "model.scheduler must be one of .* got 'Cosine'; did you mean CosineAnneal?",
        ),
        ({"warmstart": -1}, "model.warmstart must be .* got -1"),
        ({"lr_multiplier": 0, "scheduler": "Step"}, "model.lr_multiplier must be .* got 0"),
        ({"scheduler": "MultiStep", "lr_milestones": [0]}, r"model.lr_milestones must be .* got \[0\]"),
    ],
)
def test_an_option_without_effect_or_out_of_range_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        read_options(ScheduleOptions, values)


# the rates of github.com/bishshoy/power-grad-transform, as a factor, by the epoch: its schedulers stepped as its
# train.py does, from a warm-up rate of 0.01 to 0.1
FORK = {"warmstart": 5, "warmstart_from": 0.1, "lr_ahead": 1}


def timm_of_the_fork(scheduler: str, epochs: int) -> list[float]:
    """The factors of its CosineLRScheduler and StepLRScheduler: of t = 0 first, then of t = epoch + 1."""

    def factor(t: int) -> float:
        if t < 5:
            return (0.01 + t * (0.1 - 0.01) / 5) / 0.1
        if scheduler == "Step":
            return 0.1 ** (t // 30)
        return (1e-4 + 0.5 * (0.1 - 1e-4) * (1 + math.cos(math.pi * t / 90))) / 0.1 if t < 90 else 1e-3

    return [factor(0), *(factor(epoch + 1) for epoch in range(1, epochs))]


def test_the_cosine_of_the_power_grad_repository_epoch_by_epoch():
    options = ScheduleOptions(**FORK, warmstart_inside=True, cooldown=10, lr_min=0.001)
    factor = schedule(options, 100)
    assert [factor(e) for e in range(100)] == pytest.approx(timm_of_the_fork("CosineAnneal", 100), abs=1e-12)
    assert [round(factor(e), 3) for e in (0, 1, 5, 30, 60)] == [0.1, 0.46, 0.989, 0.735, 0.236]


def test_the_steps_of_the_power_grad_repository_epoch_by_epoch():
    factor = schedule(ScheduleOptions(scheduler="Step", lr_step_size=30, lr_multiplier=0.1, **FORK), 90)
    found = [factor(e) for e in range(90)]
    assert found == pytest.approx(timm_of_the_fork("Step", 90), abs=1e-12)
    falls = [e for e, (a, b) in enumerate(pairwise(found), start=1) if b < a]
    assert falls == [29, 59, 89], "the third fall is read ahead into the last epoch"


def test_a_milestone_at_the_end_of_the_training_changes_nothing():
    options = {"scheduler": "MultiStep", "warmstart": 0}
    named = schedule(ScheduleOptions(**options, lr_milestones=[30, 60, 80, 90]), 90)
    without = schedule(ScheduleOptions(**options, lr_milestones=[30, 60, 80]), 90)
    assert [named(e / 4) for e in range(360)] == [without(e / 4) for e in range(360)]
    with pytest.raises(ConfigError, match=r"must be less than .* - model.cooldown=5, got 85"):
        schedule(ScheduleOptions(**options, lr_milestones=[30, 85], cooldown=5), 90)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmstart": 0, "warmstart_from": 0.1}, "model.warmstart_from=0.1 needs model.warmstart, got 0"),
        ({"warmstart": 0, "warmstart_inside": True}, "model.warmstart_inside=True needs model.warmstart"),
        ({"scheduler": "Step", "warmstart_inside": True}, "model.warmstart_inside=True needs .*CosineAnneal"),
        ({"scheduler": None, "lr_ahead": 1}, "model.lr_ahead=1 needs model.scheduler=.*, got null"),
        ({"lr_scale_momentum": True}, "model.lr_scale_momentum=True needs model.lr_scale_batch, got null"),
    ],
)
def test_what_shifts_or_scales_nothing_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        read_options(ScheduleOptions, values)


def test_the_momentum_rule_of_online_normalization_gives_its_published_numbers():
    """Its example trains 32 images a step by `--lr 0.001635 --momentum 0.98691628`, made of 0.1 and 0.9 at 256."""
    rule = ScheduleOptions(lr_scale_batch=256, lr_scale_momentum=True)
    found = rule.for_batch(OptimizerOptions(lr=0.1, momentum=0.9), 32)
    assert found.momentum == pytest.approx(0.98691628, abs=5e-9)
    assert found.lr == pytest.approx(0.001635465, abs=5e-9)
    assert rule.for_batch(OptimizerOptions(lr=0.1), 32) == found, "SGD's own momentum is 0.9"
    assert rule.for_batch(OptimizerOptions(lr=0.1, momentum=0.9), 256).lr == pytest.approx(0.1)
    # what a gradient adds in all to the weights, and how many samples its half life is, stay what they were
    assert found.lr / (1 - found.momentum) * 256 == pytest.approx(0.1 / 0.1 * 32)
    assert math.log(0.5) / math.log(found.momentum) * 32 == pytest.approx(math.log(0.5) / math.log(0.9) * 256)


class Tiny(BaseModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=4, input_channels=1, lr=0.1, scheduler=None, warmstart=0, **kwargs)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))


def learning_rates(options: dict[str, Any], **settings: Any) -> list[float]:
    """The rates of the optimizer's groups after a step on batches of 8."""
    data = SyntheticDataModule(
        name="s", num_samples=80, batch_size=8, num_classes=4, size=8, input_channels=1
    )
    data.check()
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **settings,
    )  # fmt: skip
    trainer.fit(Tiny(**options), datamodule=data)
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize(
    ("options", "settings", "expected"),
    [
        ({}, {}, [0.1]),
        ({"lr_scale_batch": 8}, {}, [0.1]),
        ({"lr_scale_batch": 256}, {}, [0.1 * 8 / 256]),
        ({"lr_scale_batch": 16}, {"accumulate_grad_batches": 4}, [0.1 * 32 / 16]),
        ({"lr_scale_batch": 16, "layer_decay": 0.5}, {}, [0.05, 0.025]),
        ({"lr_scale_batch": 64, "lr_scale_momentum": True}, {}, [0.1 / 8 * (1 - 0.9 ** (1 / 8)) / 0.1]),
    ],
)
def test_the_rate_is_proportional_to_the_global_batch(options, settings, expected):
    assert learning_rates(options, **settings) == pytest.approx(expected)
