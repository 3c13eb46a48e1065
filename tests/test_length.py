"""How long a training is, and how it ends: one length, true last rows, said what was seen."""

from __future__ import annotations

import json
import math
import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, nightly, runs_in
from lightning.pytorch import Callback, Trainer
from small_models import small
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.logit_stats import LogitStats
from callbacks.recorder import Recorder
from crucible.corrections import versions_of
from crucible.run import RunDirectory
from datasets.base_datamodule import BaseDataModule
from datasets.images import Arrays
from datasets.sampling import EvalSampler, representative
from lab.build import build_data
from lab.config import CORRECTIONS, smallest_batch
from models.base_model import BaseModel
from optimizers.schedules import ScheduleOptions, training_length

BATCH = 4


class Linear(BaseModel):
    """The smallest network there is."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=3, input_channels=1, **kwargs)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(4, self.num_outputs))


class SortedData(BaseDataModule):
    """Samples in the order of their classes, as folders have them."""

    def __init__(self, batches: int = 5, **kwargs: Any) -> None:
        super().__init__(**{"name": "sorted", "batch_size": BATCH, "input_channels": 1, **kwargs})
        self.batches = batches

    def setup(self, stage: str) -> None:
        draw = torch.Generator().manual_seed(1)

        def part(count: int) -> Arrays:
            label = np.sort(np.arange(count) % 3)
            if self.task == "regression":
                return Arrays(torch.randn(count, 1, 2, 2, generator=draw), label.astype(np.float32))
            return Arrays(torch.randn(count, 1, 2, 2, generator=draw), label, ["a", "b", "c"])

        self.train_dataset = part(self.batches * BATCH)
        self.val_dataset, self.test_dataset = part(60), part(90)


def data(**options: Any) -> SortedData:
    module = SortedData(**options)
    module.check()
    return module


def fit(model: BaseModel, module: SortedData, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=module)
    return trainer


# One length


def test_the_length_is_what_ends_first() -> None:
    assert training_length(10, 66, 22) == training_length(3, -1, 22) == training_length(-1, 66, 22) == 3
    assert training_length(3, 1000, 22) == training_length(3, None, 22) == 3
    assert training_length(10, 11, 22) == training_length(None, 11, 22) == 0.5
    assert training_length(None, -1, 22) == training_length(-1, -1, 22) == math.inf


class Rates(Callback):
    """The learning rate of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def closed_form(step: int, a_epoch: int, length: float, drawn: dict[str, Any]) -> float:
    """The factor on the rate of one step, counted from 0, from the definitions alone."""
    warm, cool = drawn["warmstart"], drawn["cooldown"]
    if drawn["lr_interval"] == "step":
        done, rising = step / a_epoch, (step + 1) / (warm * a_epoch + 1)
    else:
        done, rising = float(step // a_epoch), (step // a_epoch + 1) / (warm + 1)
    end = length - cool
    if drawn["scheduler"] == "MultiStep":
        falls = sum(done >= mark for mark in (end / 2, end * 3 / 4))
        return (rising if done < warm else 1.0) * 0.1**falls
    if done < warm:
        return rising
    return 0.0 if done >= end else (1 + math.cos(math.pi * (done - warm) / (end - warm))) / 2


@pytest.mark.parametrize("draws", [20, pytest.param(60, marks=pytest.mark.slow), *nightly(200, 2000)])
def test_every_step_of_drawn_trainings_has_the_rate_of_the_closed_form(draws: int) -> None:
    draw = random.Random(draws)
    tried = 0
    while tried < draws:
        batches = draw.randint(1, 7)
        limit = draw.choice([None, None, 1, 3, 0.5, 0.99, 1.0])
        taken = (
            batches
            if limit is None
            else int(batches * limit)
            if isinstance(limit, float)
            else min(limit, batches)
        )
        accumulate = draw.randint(1, 4)
        drawn = {
            "warmstart": draw.choice([0, 1, 2, 0.5]),
            "cooldown": draw.choice([0, 0, 1]),
            "lr_interval": draw.choice(["epoch", "step"]),
            "scheduler": draw.choice(["CosineAnneal", "CosineAnneal", "MultiStep"]),
        }
        epochs, steps = draw.choice([-1, 1, 3, 6]), draw.choice([-1, 1, 4, 7, 12])
        if taken < 1 or (epochs < 0 and steps < 0):
            continue
        a_epoch = math.ceil(taken / accumulate)
        length = min([e for e in (epochs, steps / a_epoch) if e > 0])
        if drawn["cooldown"] and length - drawn["cooldown"] < drawn["warmstart"]:
            continue
        tried += 1
        rates, model = Rates(), Linear(lr=0.5, **drawn)
        trainer = fit(
            model, data(batches=batches), rates, max_epochs=epochs, max_steps=steps, limit_train_batches=limit,
            accumulate_grad_batches=accumulate, check_val_every_n_epoch=draw.randint(1, 3),
            limit_val_batches=draw.choice([0, 1]),
        )  # fmt: skip
        assert model.epochs == pytest.approx(length)
        assert len(rates.seen) == trainer.global_step == round(length * a_epoch)
        expected = [0.5 * closed_form(s, a_epoch, length, drawn) for s in range(len(rates.seen))]
        assert rates.seen == pytest.approx(expected, abs=1e-9), (
            batches,
            limit,
            accumulate,
            epochs,
            steps,
            drawn,
        )


@pytest.mark.parametrize("warmstart", [0.5, 1, 3])
def test_a_warm_up_by_the_step_begins_at_one_steps_share_and_rises_evenly(warmstart: float) -> None:
    rates = Rates()
    model = Linear(lr=1.0, scheduler=None, warmstart=warmstart, lr_interval="step")
    fit(model, data(batches=6), rates, max_epochs=4)
    rising = round(6 * warmstart)
    assert rates.seen == pytest.approx([min(1.0, (s + 1) / (rising + 1)) for s in range(24)])


@pytest.mark.parametrize(
    ("epochs", "steps", "updates"), [(10, 20, 2), (4, -1, 2), (10, 18, 3), (3, 2, 1), (4, 900, 2)]
)
def test_swa_averages_in_the_last_part_of_the_training_whatever_ends_it(
    epochs: int, steps: int, updates: int
) -> None:
    model = Linear(lr=0.1, swa_start=0.5)
    fit(model, data(), max_epochs=epochs, max_steps=steps, limit_val_batches=0)
    assert model.step.weights[0].updates == updates


def test_a_run_that_steps_end_has_the_rates_of_one_that_epochs_end(cli, tmp_path: Path) -> None:
    tiny = [*TINY, "data.module.num_samples=64", "test_after_training=false", "model.lr=0.02"]
    for name, length in {
        "epochs": ["trainer.max_epochs=3"],
        "steps": ["trainer.max_epochs=10", "trainer.max_steps=9"],
    }.items():
        outcome = cli(*tiny, *length, f"exp_dir={tmp_path / name}")
        assert outcome.status == 0, outcome.err
    by_epochs, by_steps = (
        RunDirectory(runs_in(tmp_path / name)[0]).metrics() for name in ("epochs", "steps")
    )
    assert [row["lr"] for row in by_steps] == [row["lr"] for row in by_epochs] == ["0.01", "0.02", "0.01"]
    assert [row["train/loss"] for row in by_steps] == [row["train/loss"] for row in by_epochs]


# An epoch that was cut


class Stop(Callback):
    """Ends the training in its second epoch: after a batch, as a time limit does, or after a validation."""

    def __init__(self, where: str, batch: int) -> None:
        self.where, self.batch = where, batch
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.losses = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.where == "batch" and trainer.current_epoch == 1 and batch_idx == self.batch:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        if self.where == "validation" and trainer.current_epoch == 1 and batch >= self.batch:
            trainer.should_stop = True


@pytest.mark.parametrize("where", ["batch", "validation"])
@pytest.mark.parametrize("batch", [0, 2, 4])
def test_the_row_of_an_epoch_that_was_cut_is_of_its_own_batches(
    tmp_path: Path, where: str, batch: int
) -> None:
    run, stop = RunDirectory(tmp_path), Stop(where, batch)
    often = {"val_check_interval": 1} if where == "validation" else {"limit_val_batches": 0}
    fit(
        Linear(lr=0.3, warmstart=0),
        data(),
        Recorder(run),
        LogitStats(),
        stop,
        max_epochs=9,
        min_epochs=0,
        **often,
    )
    first, cut = run.metrics()
    assert len(stop.losses) == batch + 1 and int(cut["epoch"]) == 1
    assert float(cut["train/loss"]) == pytest.approx(sum(stop.losses) / len(stop.losses), rel=1e-6)
    assert cut.keys() == first.keys() and all(cut.values())
    for name in ("logits/norm", "train/grad_norm"):
        assert cut[name] != first[name]
    assert run.summary()["final"]["train/loss"] == float(cut["train/loss"])


def test_a_time_limit_in_the_first_epoch_leaves_a_row_of_it(tmp_path: Path) -> None:
    run, model = RunDirectory(tmp_path), Linear(lr=0.1)
    trainer = fit(model, data(), Recorder(run), max_epochs=9, max_time=timedelta(microseconds=1))
    (row,) = run.metrics()
    assert trainer.global_step == 1 and float(row["train/loss"]) > 0
    assert "train/loss" in trainer.callback_metrics


def test_the_summary_says_of_which_epoch_its_final_values_are(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    fit(Linear(lr=0.1), data(), Recorder(run), max_epochs=5, check_val_every_n_epoch=2)
    assert run.summary()["final_epochs"] == {"train": 4, "val": 3}


# The last group of an epoch


class Gradients(Callback):
    """The gradient of each optimizer step beside the mean over the step's own batches, computed at its weights."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        weight = pl_module.model[1].weight
        losses = [F.cross_entropy(pl_module(b.input), b.target) for b in self.batches]
        (mean,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
        self.pairs.append((weight.grad.clone(), mean))
        self.batches = []


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("batches", range(1, 7))
def test_every_step_takes_the_mean_gradient_of_its_own_batches(batches: int, accumulate: int) -> None:
    seen = Gradients()
    fit(
        Linear(lr=0.2),
        data(batches=batches),
        seen,
        max_epochs=2,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
    )
    assert len(seen.pairs) == 2 * math.ceil(batches / accumulate)
    for got, mean in seen.pairs:
        torch.testing.assert_close(got, mean)


# Limited evaluation


class Seen(Callback):
    """The numbers of the samples of each validation and test."""

    def __init__(self) -> None:
        self.index: list[int] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.index += batch.index.tolist()

    on_test_batch_end = on_validation_batch_end


@pytest.mark.parametrize("limit", [1, 3, 0.5, 0.21, 1.0, 15, 99, None])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_limited_evaluation_is_drawn_by_class_and_alike_for_every_seed(limit: Any, task: str) -> None:
    found = []
    for seed in (0, 1):
        module, seen = data(seed=seed, task=task), Seen()
        trainer = fit(
            Linear(task=task), module, seen, max_epochs=1, limit_train_batches=1, limit_val_batches=limit
        )
        assert len(seen.index) == len(set(seen.index)) == module.seen("val")
        strata = np.arange(60) * (3 if task == "classification" else 10) // 60  # of sorted targets
        counts = np.bincount(strata[seen.index], minlength=strata[-1] + 1)
        assert counts.max() - counts.min() <= 1, counts
        if module.seen("val") == 60:
            assert seen.index == list(range(60)), "an evaluation of all is in order"
        found.append(seen.index)
    assert found[0] == found[1]
    assert trainer.num_val_batches[0] * BATCH >= len(found[0])


def test_drawn_orders_have_each_class_in_proportion_in_every_beginning_on_any_ranks() -> None:
    draw = np.random.default_rng(0)
    for seed in range(60):
        classes = int(draw.integers(2, 9))
        targets = np.sort(draw.integers(0, classes, int(draw.integers(20, 200))))
        order = representative(targets, "classification", seed)
        assert sorted(order.tolist()) == list(range(len(targets)))
        assert order.tolist() == representative(targets, "classification", seed).tolist()
        share = np.bincount(targets, minlength=classes) / len(targets)
        for length in range(1, len(targets) + 1):
            counts = np.bincount(targets[order[:length]], minlength=classes)
            assert np.abs(counts - share * length).max() <= classes / 2 + 1e-9
        world, size, limit = int(draw.integers(1, 4)), int(draw.integers(1, 6)), int(draw.integers(1, 5))
        samplers = [
            EvalSampler(len(targets), size, rank=rank, world_size=world, order=order) for rank in range(world)
        ]
        seen = [i for sampler in samplers for _, batch in list(sampler)[:limit] for i in batch]
        assert sorted(seen) == sorted(order[: samplers[0].seen(limit)].tolist())
    assert representative(targets, "classification", 1).tolist() != order.tolist()


def test_a_limited_run_says_how_many_samples_it_saw(cli, tmp_path: Path) -> None:
    outcome = cli(
        *TINY, "trainer.limit_train_batches=1", "trainer.limit_test_batches=1", "data.module.batch_size=8"
    )
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    assert "test on 8 drawn of 24 samples" in RunDirectory(run).summary()["resolved"]
    outcome = cli(f"run={run}", "task=test")
    assert outcome.status == 0 and "test on 8 drawn of 24 samples" in outcome.out
    assert json.loads((run / "test.json").read_text())["samples"] == 8


# Boundaries


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0"),
        (["trainer.limit_train_batches=0.0"], "trainer.limit_train_batches=0"),
        (["trainer.limit_train_batches=0.01"], "trainer.limit_train_batches=0.01"),
        (["trainer.overfit_batches=0.01"], "trainer.overfit_batches=0.01"),
        (["trainer.limit_val_batches=0.01"], "trainer.limit_val_batches=0.01"),
        (["trainer.limit_test_batches=0.01"], "trainer.limit_test_batches=0.01"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["+trainer.val_check_interval=1000"], "trainer.val_check_interval=1000"),
        (["trainer.max_epochs=9", "trainer.max_steps=2", "model.warmstart=1", "model.cooldown=1"], "model.cooldown=1"),
        (
            ["trainer.max_epochs=9", "trainer.max_steps=5", "model.scheduler=MultiStep", "model.lr_milestones=[4]"],
            "model.lr_milestones",
        ),
        (["model.scheduler=MultiStep", "model.lr_milestones=[2]"], "model.lr_milestones"),
        (["data.task=regression", "metrics=[r2]", "data.module.num_samples=7"], "r2 needs 2 samples"),
        (
            ["data.task=regression", "metrics=[r2]", "data.module.batch_size=1", "trainer.limit_val_batches=1"],
            "r2 needs 2 samples",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_lengths_that_leave_nothing_are_refused_before_a_folder_is_made(
    cli, tmp_path: Path, overrides: list[str], says: str
) -> None:
    outcome = cli(*TINY, *overrides)
    assert outcome.status == 2
    (line, *see) = outcome.err.strip().splitlines()
    assert says in line and len(see) <= 1, outcome.err
    assert not (tmp_path / "experiments").exists()


ONE_POSITION = ["model._target_=models.dynamic_vgg.VGG16", "model=vgg", "model.cifar_size=true"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["data.module.drop_last=false", "data.module.num_samples=90"],
            "data.module.drop_last=false with data.module.batch_size=16 leaves a last batch of one sample a device",
        ),
        (
            ["data.module.batch_size=1"],
            "data.module.batch_size=1: VGG16 cannot train on that (Expected more than 1",
        ),
    ],
)
def test_a_batch_of_one_sample_that_norms_cannot_take_is_refused_before_a_folder_is_made(
    cli, tmp_path: Path, overrides: list[str], says: str
) -> None:
    outcome = cli(*TINY, *ONE_POSITION, *overrides)
    assert outcome.status == 2 and says in outcome.err, outcome.err
    assert not (tmp_path / "experiments").exists()


@pytest.mark.parametrize(
    ("overrides", "smallest"),
    [
        ([], 1),
        (["data.module.drop_last=true"], 16),
        (["trainer.limit_train_batches=5"], 16),
        (["trainer.max_epochs=-1", "trainer.max_steps=5"], 16),
        (["trainer.max_epochs=-1", "trainer.max_steps=6"], 1),
        (["data.module.batch_size=80"], 1),
        (["data.module.batch_size=81"], 81),
    ],
)
def test_the_smallest_batch_is_the_last_that_the_training_comes_to(
    overrides: list[str], smallest: int
) -> None:
    config = small(
        "cifar_resnet", *TINY, "data.module.num_samples=90", "data.module.drop_last=false", *overrides
    )
    data = build_data(config)
    data.check()
    assert smallest_batch(config, data) == smallest


# Other runs


def test_only_trainings_whose_numbers_changed_have_another_version() -> None:
    def versions(
        callbacks: dict[str, Any] | None = None, scheduler: Any = "Step", **trainer: Any
    ) -> set[str]:
        usual = {"max_epochs": 5, "max_steps": -1, "accumulate_grad_batches": 1, **trainer}
        config = {"trainer": usual, "model": {"scheduler": scheduler}, "callbacks": callbacks or {}}
        return set(versions_of(CORRECTIONS, config))

    stopping = {"stop": {"_target_": "lightning.pytorch.callbacks.EarlyStopping"}}
    for unchanged in (
        {}, {"max_epochs": -1, "max_steps": 9}, {"limit_val_batches": 0}, {"limit_val_batches": 1.0},
        {"overfit_batches": 0.0}, {"max_steps": 9, "scheduler": None}, {"callbacks": stopping},
        {"limit_train_batches": 3},
    ):  # fmt: skip
        assert versions(**unchanged) == set(), unchanged
    assert versions(max_steps=9) == {"trainer.max_steps"}
    assert versions(accumulate_grad_batches=2) == {"trainer.accumulate_grad_batches"}
    assert versions(limit_val_batches=1) == versions(overfit_batches=2) == {"trainer.limit_val_batches"}
    assert versions(limit_test_batches=0.5) == {"trainer.limit_test_batches"}
    assert versions(max_time="00:00:01:00") == {"trainer.max_time"}
    assert versions(stopping, val_check_interval=0.5) == {"trainer.max_time"}
    (own,) = ScheduleOptions.corrections
    for interval, warmstart, concerned in (("step", 1, True), ("step", 0, False), ("epoch", 1, False)):
        assert own.concerns({"model": {"lr_interval": interval, "warmstart": warmstart}}) is concerned
