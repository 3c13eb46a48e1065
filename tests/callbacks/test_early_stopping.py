"""Early stopping and the plateau schedule: when they act, that a resumed run goes on counting, what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, runs_in, summary_of
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from callbacks.early_stopping import EarlyStopping
from callbacks.recorder import Interrupted
from crucible.options import ConfigError
from crucible.patience import Patience
from datasets.synthetic import SyntheticDataModule
from models.base_model import BaseModel
from optimizers.schedules import Plateau, ScheduleOptions, schedule

NOTHING = 1e-30  # a rate at which no weight moves, so that no validation is better than the first


class Small(BaseModel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=4, input_channels=1, warmstart=0, lr=NOTHING, **kwargs)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, self.num_outputs))


class Rates(Callback):
    def __init__(self) -> None:
        self.of_epochs: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.of_epochs.append(trainer.optimizers[0].param_groups[0]["lr"] / NOTHING)


class SaveAfter(Callback):
    def __init__(self, file: Path, epoch: int) -> None:
        self.file, self.epoch = file, epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.file)
            raise Interrupted(15)


def fit(*callbacks: Callback, resume: Path | None = None, epochs: int = 7, **options: Any) -> Trainer:
    torch.manual_seed(0)
    data = SyntheticDataModule(
        name="synthetic", num_samples=40, batch_size=8, num_classes=4, size=8, input_channels=1
    )  # fmt: skip
    data.check()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=epochs,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(Small(**options), datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def waits(values: list[float], higher: bool, min_delta: float = 0.0) -> list[int]:
    watch, found = Patience(higher, min_delta), []
    for value in values:
        watch.observe(value)
        found.append(watch.waited)
    return found


def test_what_is_not_better_than_the_best_by_more_than_the_margin_is_waited_for() -> None:
    assert waits([1.0, 0.9, 0.95, 0.9, 0.8], higher=False) == [0, 0, 1, 2, 0]
    assert waits([0.5, 0.6, 0.6, 0.7], higher=True) == [0, 0, 1, 0]
    assert waits([1.0, 0.95, 0.85], higher=False, min_delta=0.1) == [0, 1, 0]
    assert waits([math.nan, 1.0, math.inf, math.nan], higher=False) == [1, 0, 1, 2]


def test_a_training_ends_at_the_validation_at_which_patience_is_over_and_says_why() -> None:
    stopping = EarlyStopping(patience=2, monitor="val/loss")
    assert fit(stopping).current_epoch == 3  # the first is the best, two are not better
    assert stopping.reason.startswith("val/loss was not better in 2 validations; the best was ")
    patient = EarlyStopping(patience=7, monitor="val/loss")
    assert fit(patient).current_epoch == 7 and patient.reason == ""


@pytest.mark.parametrize(("saved", "more"), [(0, 2), (1, 1), (2, 0)])
def test_a_resumed_training_goes_on_counting_and_one_that_was_over_ends_at_once(
    tmp_path: Path, saved: int, more: int
) -> None:
    file, rates = tmp_path / "state.ckpt", Rates()
    with pytest.raises(Interrupted):
        fit(EarlyStopping(patience=2, monitor="val/loss"), SaveAfter(file, saved))
    fit(EarlyStopping(patience=2, monitor="val/loss"), rates, resume=file)
    assert len(rates.of_epochs) == more


def test_the_rate_falls_after_each_wait_and_never_below_its_least() -> None:
    rates = Rates()
    fit(rates, scheduler="Plateau", lr_patience=2, lr_multiplier=0.5, lr_min=0.25, epochs=9)
    assert rates.of_epochs == pytest.approx([1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("saved", [0, 2, 3])
def test_a_resumed_plateau_has_the_rates_of_one_that_was_not_stopped(tmp_path: Path, saved: int) -> None:
    options = {"scheduler": "Plateau", "lr_patience": 2, "lr_multiplier": 0.5}
    whole, first, rest = Rates(), Rates(), Rates()
    fit(whole, **options)
    with pytest.raises(Interrupted):
        fit(first, SaveAfter(tmp_path / "state.ckpt", saved), **options)
    fit(rest, resume=tmp_path / "state.ckpt", **options)
    assert first.of_epochs + rest.of_epochs == whole.of_epochs and len(set(whole.of_epochs)) == 3


def test_a_plateau_warms_up_and_needs_no_end() -> None:
    options = ScheduleOptions(scheduler="Plateau", warmstart=2)
    plateau = Plateau(options)
    factor = schedule(options, math.inf, plateau=plateau)
    assert [factor(epoch) for epoch in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    plateau.falls = 2
    assert factor(5) == pytest.approx(0.01)
    with pytest.raises(ConfigError, match=r"model\.lr_patience=3 needs model\.scheduler=Plateau"):
        ScheduleOptions(lr_patience=3)


LIGHTNINGS = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["technique=early_stopping", "callbacks.early_stopping.monitor=val/ac"], "did you mean val/acc"),
        (["technique=early_stopping", "callbacks.early_stopping.monitor=train/loss"], "never logs it"),
        (["technique=early_stopping", "checkpoint.monitor=val/los"], "checkpoint.monitor=val/los"),
        (["technique=early_stopping", "trainer.limit_val_batches=0"], "leaves nothing to validate on"),
        (["metrics=[acc,f1_per_class]", "checkpoint.monitor=val/f1_per_class"], "mean val/f1_per_class/<class>?"),
        (["checkpoint.monitor=val/acc/cat"], "checkpoint.monitor=val/acc/cat: this run never logs it"),
        (["model.scheduler=Plateau", "model.lr_monitor=val/los"], "model.lr_monitor=val/los: this run never logs it"),
        ([f"+callbacks.stop={{_target_:{LIGHTNINGS},monitor:trainloss}}"], "callbacks.stop.monitor=trainloss"),
    ],
)  # fmt: skip
def test_what_is_never_logged_is_refused_before_anything_is_made(
    cli: Any, tmp_path: Path, overrides: list[str], said: str
) -> None:
    outcome = cli(*TINY, *overrides)
    assert outcome.status == 2 and said in outcome.err, outcome.err
    assert not runs_in(tmp_path)


@pytest.mark.slow
def test_a_run_says_that_it_ended_early_and_the_report_that_lengths_differ(cli: Any, tmp_path: Path) -> None:
    often = ["trainer.max_epochs=4", "model.lr=1.0e-30", "data.module.num_samples=48"]
    assert cli(*TINY, *often).status == 0
    outcome = cli(*TINY, *often, "technique=early_stopping", "callbacks.early_stopping.patience=1")
    assert outcome.status == 0 and "ended after epoch 2 of 4: val/acc was not better in 1" in outcome.out
    summaries = [summary_of(run) for run in runs_in(tmp_path / "experiments")]
    assert sorted(summary["epochs"] for summary in summaries) == [2, 4]
    assert cli("runs=experiments/synthetic", script="report.py").status == 0
    (page,) = tmp_path.rglob("report.md")
    text = page.read_text()
    assert "ended early, after 2 epochs: val/acc" in text and "lengths differ" in text
