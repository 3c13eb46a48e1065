"""task=tune: a range test whose answer is known, of the training that the command would be, and which leaves no run."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import TINY, runs_in
from cuda_runs import Phases
from lightning.pytorch import Callback
from simulated_cuda import simulated_cuda
from technique_runs import composed
from torch import nn
from torch.utils.data import TensorDataset

from callbacks.range_test import READ_EVERY, RangeOptions, smoothed
from crucible.configuration import find_target
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from lab import tuning
from lab.build import build_data
from lab.config import model_options, resolve
from lab.tuning import Curve, range_test
from models.base_model import BaseModel

STEEPEST_CURVATURE = 8.0  # of LineData's loss


class LineData(BaseDataModule):
    """Eight points of a linear function, one batch: the Hessian of the squared error is diag(8, 2) in its weights."""

    def setup(self, stage: str) -> None:
        corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).repeat(2, 1)
        points = corners * torch.tensor([2.0, 1.0])  # 2 X^T X / n
        targets = points @ torch.tensor([1.0, 0.0])
        self.train_dataset = TensorDataset(points.view(8, 1, 1, 2), targets)
        self.val_dataset = self.test_dataset = self.train_dataset


class Line(BaseModel):
    """A linear function of its input, without a bias, from zero weights."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
        nn.init.zeros_(self.model[1].weight)


class Rates(Callback):
    """Keeps the rates that the groups of the optimizer step with; `batches` counts those that were trained on."""

    seen: ClassVar[list[list[float]]] = []
    batches: ClassVar[int] = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        type(self).batches += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


LINE = (
    "data.module._target_=test_tuning.LineData", "~data.module.train_transforms", "~data.module.test_transforms",
    "data.module.batch_size=8", "data.task=regression", "data.input_channels=1", "metrics=[mse]",
    "checkpoint.monitor=null", "model.momentum=0", "model.weight_decay=0", "trainer.precision=64-true",
)  # fmt: skip


def resolved(*techniques: str, target: str = "", options: tuple[str, ...] = ()) -> dict[str, Any]:
    config = composed(*techniques, options=options)
    if target:
        known = model_options(find_target(target, "model._target_"))
        model = {name: value for name, value in config["model"].items() if name in known}
        config["model"] = {**model, "_target_": target}
    data = build_data(config)
    data.check()
    resolve(config, data)
    return config


def line(target: str = "test_tuning.Line") -> dict[str, Any]:
    return resolved(target=target, options=LINE)


def test_gradient_descent_blows_up_where_the_rate_exceeds_two_over_the_curvature(tmp_path: Path) -> None:
    options, config = RangeOptions(min_rate=1e-3, max_rate=10), line()
    curve = range_test(config, options, tmp_path)
    limit = 2 / STEEPEST_CURVATURE
    assert curve.diverged and len(curve.losses) < options.steps
    assert limit < curve.rates[-1] < 10 * limit, (
        "where it is stopped: from next to nothing up to where it began"
    )
    rising = np.flatnonzero(np.diff(curve.losses) > 0)
    assert limit < curve.rates[rising[0]] < 1.1 * limit, "the first step that makes it worse"
    assert curve.steepest is not None and limit / 100 < curve.steepest < limit
    assert curve.tenth is not None and limit / 20 < curve.tenth < limit
    # each step multiplies the error by 1 - rate * curvature
    factors = 1 - STEEPEST_CURVATURE * curve.rates
    expected = STEEPEST_CURVATURE / 2 * np.concatenate(([1.0], np.cumprod(factors)[:-1])) ** 2
    assert curve.losses == pytest.approx(expected, rel=1e-4)
    assert curve.losses == range_test(config, options, tmp_path).losses, "the same test again"
    assert config == line(), "nothing of the configuration is changed"


def test_the_rates_are_the_runs_own_but_for_one_rising_factor(tmp_path: Path) -> None:
    Rates.seen, Rates.batches = [], 0
    config = resolved(
        "layer_decay", "ema", options=("trainer.accumulate_grad_batches=2", "model.warmstart=3")
    )
    config["callbacks"]["mine"] = {"_target_": "test_tuning.Rates"}
    options = RangeOptions(steps=10)
    curve = range_test(config, options, tmp_path)
    groups, decay = np.array(Rates.seen), config["model"]["layer_decay"]
    assert Rates.batches == 20 and groups.shape[0] == 10 and groups.shape[1] > 2
    np.testing.assert_allclose(groups[:, 0], [options.rate(step) for step in range(10)], rtol=1e-6)
    np.testing.assert_allclose(
        groups[:, 1:], groups[:, :1] * decay ** np.arange(1, groups.shape[1]), rtol=1e-6
    )
    assert groups[-1, 0] == pytest.approx(options.max_rate) and len(curve.losses) == 10


def test_the_loss_is_the_one_that_the_techniques_make(tmp_path: Path) -> None:
    options = RangeOptions(steps=10)

    def first(*typed: str) -> float:
        return range_test(resolved(options=typed), options, tmp_path).losses[0]

    assert first("model.sam=true") == first(), "that of the first pass"
    assert first("model.augmix_weight=10000") > first("model.augmix_weight=1") + 0.1


def test_the_device_is_waited_for_once_in_ten_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tuning.build_trainer
    with simulated_cuda() as device:
        watching = lambda config, folder, callbacks, loggers: build(  # noqa: E731
            config, folder, [Phases(device), *callbacks], loggers
        )
        monkeypatch.setattr(tuning, "build_trainer", watching)
        range_test(resolved("mixup"), RangeOptions(steps=20), tmp_path)
        waits = {step: device.waited(f"step{step}") for step in range(3, 19)}
    assert [step for step, found in waits.items() if found] == [READ_EVERY - 1]


def test_a_loss_that_is_no_number_from_the_start_is_said(tmp_path: Path) -> None:
    config = line("test_tuning.Nothing")
    with pytest.raises(ConfigError, match="first step is not finite, before any weight has moved"):
        range_test(config, RangeOptions(), tmp_path)


class Nothing(Line):
    """A network that has gone wrong."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        nn.init.constant_(self.model[1].weight, torch.nan)


@pytest.mark.parametrize("at", [3e-3, 0.2])
def test_the_steepest_descent_of_a_curve_that_is_drawn_is_found(at: float) -> None:
    """The loss falls as a logistic function of the logarithm of the rate, is lowest and rises again, under noise."""
    options = RangeOptions()
    rates = np.array([options.rate(step) for step in range(100)])
    noise = np.random.default_rng(0).normal(0, 0.02, 100)
    losses = 2.3 - 1.5 / (1 + (at / rates) ** 1.5) + np.maximum(0, np.log10(rates / at) - 1) * 3 + noise
    curve = Curve(options, losses.tolist(), False)
    assert curve.steepest == pytest.approx(at, rel=0.6)
    assert curve.tenth == pytest.approx(at, rel=0.6), "the lowest point is a power of ten above"
    assert not curve.remarks
    rates, smooth = curve.smooth
    assert np.interp(np.log(at), np.log(rates), smooth) == pytest.approx(2.3 - 0.75, abs=0.1), "nothing lags"
    flat = Curve(options, (2.3 + noise).tolist(), False)
    assert flat.steepest is None and flat.tenth is None and "does not fall" in flat.remarks[0]
    falling = Curve(options, (2.3 - 0.02 * np.arange(100) + noise / 10).tolist(), False)
    assert any("still falls at tune.max_rate=10" in remark for remark in falling.remarks)


def test_smoothing_is_corrected_for_its_start() -> None:
    assert smoothed([2.0] * 50, 100) == pytest.approx([2.0] * 50)
    assert smoothed([1.0, 3.0], 100) == pytest.approx([1.0, (0.8 + 3.0) / 1.8])


def test_a_command_writes_a_curve_and_no_run(cli, tmp_path: Path) -> None:
    outcome = cli(*TINY, "task=tune", "tune.steps=20", "technique=mixup", "model.lr=0.05")
    assert outcome.status == 0, outcome.err
    last = outcome.out.strip().splitlines()[-1]
    folder = Path(last.rpartition("->  ")[2])
    assert "yours is 0.05" in last and folder.name.endswith("-s0-tune")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "curve.csv", "plots/rate.png", "tune.json",
    ]  # fmt: skip
    with (folder / "curve.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    record = json.loads((folder / "tune.json").read_text())
    assert READ_EVERY < len(rows) <= 20 and (len(rows) == 20 or record["diverged_at"])
    assert record["arm"] == "mixup lr=0.05" and record["yours"] == 0.05
    assert {f.name for f in dataclasses.fields(RangeOptions)} <= record.keys()
    assert not runs_in(tmp_path) and len(list((tmp_path / "experiments" / "synthetic").iterdir())) == 1
    assert "no run" in cli("runs=experiments", script="report.py").err, "the report takes it for none"


def test_what_has_no_range_test_is_refused_in_one_line(cli, tmp_path: Path) -> None:
    state = tmp_path / "last.ckpt"
    for typed, said in {
        ("tune.min_rate=1", "tune.max_rate=0.1"): "tune.min_rate=1 must be less than tune.max_rate=0.1",
        ("run=some/run",): "no recorded run",
        ("model.freeze=backbone", "model.unfreeze_at=1"): "what is trained would change at step",
    }.items():
        outcome = cli(*(TINY if "run=some/run" not in typed else ()), "task=tune", *typed)
        assert outcome.status == 2 and said in outcome.err and len(outcome.err.splitlines()) == 1, typed
    assert not (tmp_path / "experiments").exists() and not state.exists()


@pytest.mark.slow
def test_two_processes_make_one_curve(shell, tmp_path: Path) -> None:
    common = (*TINY, "task=tune", "tune.steps=10", "model.norm=none", "trainer.accelerator=cpu")
    two = shell(*common, "trainer.devices=2", "data.module.batch_size=8", "exp_dir=two")
    one = shell(*common, "exp_dir=one")
    assert two.status == one.status == 0, two.err + one.err
    assert two.out.count("suggested") + two.out.count("no model.lr suggested") == 1, "rank 0 says it"
    curves = [
        np.loadtxt(file, delimiter=",", skiprows=1) for file in sorted(tmp_path.glob("*/*/*/curve.csv"))
    ]
    np.testing.assert_allclose(curves[0][:, 2], curves[1][:, 2], rtol=1e-3)


@pytest.mark.nightly
def test_a_multirun_tests_one_after_the_other(shell, tmp_path: Path) -> None:
    outcome = shell("-m", *TINY, "task=tune", "tune.steps=10", "model.depth=8,14", "user_dir=.")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("range test of") == 2
    assert len(list(tmp_path.glob("experiments/*/*-tune/tune.json"))) == 2
