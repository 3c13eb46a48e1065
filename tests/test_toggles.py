"""A toggle without effect is an error: an option without the one that it needs, and a name that nobody reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, runs_in
from lightning.pytorch import Callback
from small_models import small

from crucible.configuration import Config, select
from crucible.options import ConfigError
from lab import config as checking
from lab.config import NEEDED, SWEEP_OPTIONS, check

OWN = {"own": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}}
# for each option: a value of it, what takes away all that it may need, and each of the things that it may need
ALONE: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]] = {
    "trainer.gradient_clip_algorithm": ("value", {}, [{"trainer.gradient_clip_val": 1.0}]),
    "trainer.min_epochs": (2, {}, [{"callbacks": OWN}, {"trainer.max_time": "00:01:00:00"}]),
    "trainer.min_steps": (2, {}, [{"callbacks": OWN}, {"trainer.max_time": "00:01:00:00"}]),
    "model.lr_interval": (
        "step", {"model.scheduler": None, "model.warmstart": 0},
        [{"model.scheduler": "CosineAnneal"}, {"model.warmstart": 1}, {"model.swa_start": 0.5, "model.swa_lr": 0.1}],
    ),
    "model.lr_scale_momentum": (
        True, {"model.optimizer": "Adam", "model.lr_scale_batch": 256}, [{"model.optimizer": "SGD"}],
    ),
    "rollback_lr": (0.5, {}, [{"on_nonfinite": "rollback"}]),
    "rollback_limit": (2, {}, [{"on_nonfinite": "rollback"}]),
    "summary_depth": (3, {}, [{"task": "summary"}]),
    "out": ("PACK", {}, [{"task": "pack"}, {"task": "test"}, {"task": "card"}]),
    "calibrate": (True, {}, [{"task": "test"}, {"task": "export"}]),
    "format": ("torchscript", {}, [{"task": "export"}]),
    "export.normalize": (True, {}, [{"task": "export"}]),
    "export.layout": ("NHWC", {}, [{"task": "export"}]),
    "export.softmax": (True, {}, [{"task": "export"}]),
    "export.half": (True, {}, [{"task": "export"}]),
    "tta": ("flip", {}, [{"task": "predict"}]),
    "tune.min_rate": (0.001, {}, [{"task": "tune"}]),
    "tune.max_rate": (2.0, {}, [{"task": "tune"}]),
    "tune.steps": (50, {}, [{"task": "tune"}]),
    "pack.verify": (True, {}, [{"task": "pack"}]),
    "pack.size": (64, {}, [{"task": "pack"}]),
    "pack.quality": (80, {}, [{"task": "pack"}]),
}  # fmt: skip


def configured(**changes: Any) -> Config:
    config = small("cifar_resnet")
    for name, value in changes.items():
        room, _, option = name.rpartition(".")
        (select(config, room) if room else config)[option] = value
    return config


def test_every_option_of_the_table_is_tried() -> None:
    assert ALONE.keys() == {row.option for row in NEEDED}


@pytest.mark.parametrize("option", ALONE)
def test_an_option_without_the_one_that_it_needs_is_refused_by_name(option: str) -> None:
    value, without, needed = ALONE[option]
    check(configured(**without), [])
    with pytest.raises(ConfigError, match=rf"^{re.escape(option)}={value} needs "):
        check(configured(**without, **{option: value}), [])
    for present in needed:
        check(configured(**{**without, option: value, **present}), [])


@pytest.mark.parametrize("option", ALONE)
def test_what_an_earlier_version_recorded_is_resumed_and_what_is_typed_beside_it_refused(option: str) -> None:
    value, without, _ = ALONE[option]
    recorded = configured(**without, **{option: value})
    check(recorded, [], typed=["run", "data.module.num_workers"])
    with pytest.raises(ConfigError, match=rf"^{re.escape(option)}={value} needs "):
        check(recorded, [], typed=["run", option])


@pytest.mark.parametrize(
    "run", sorted((ROOT / "tests" / "recorded_runs").iterdir()), ids=lambda run: run.name
)
def test_recorded_runs_with_steps_between_logs_still_resume(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["log_every_n_steps"] == 50
    check(config, [], typed=["run"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("+mdoel.lr=0.5", r"mdoel=.*no such option; did you mean model\?"),
        ("+optimizer=Adam", r"optimizer='Adam': no such option"),
        ("+lr=0.5", r"lr=0\.5: no such option"),
        ("+callback.own._target_=x.Y", r"callback=.*; did you mean callbacks\?"),
        ("+data.cv.folds=3", r"data\.cv\.folds=3: no such option; known: k"),
        (
            "trainer.gradient_clip_algorithm=value",
            r"trainer\.gradient_clip_algorithm=value needs trainer\.gradient",
        ),
        ("model.mixup_alpha=0.4", r"model\.mixup_alpha=0\.4 needs model\.mixup=true"),
    ],
)
@pytest.mark.parametrize(
    "task", [[], ["task=summary"], ["-m", "seed=0,1"]], ids=["train", "summary", "sweep"]
)
def test_the_command_line_refuses_it_in_one_line_before_a_run_folder_exists(
    cli, tmp_path: Path, argument: str, said: str, task: list[str]
) -> None:
    outcome = cli(*task, *TINY, argument)
    (line,) = outcome.err.strip().splitlines()
    assert outcome.status != 0 and re.search(said, line), line
    assert not runs_in(tmp_path)


def test_the_names_at_the_top_are_those_of_the_configuration() -> None:
    names = {"data_dir", "exp_dir"}  # of cli_configs/env
    names |= yaml.safe_load((ROOT / "cli_configs" / "train.yaml").read_text()).keys() - {"defaults", "hydra"}
    assert set(checking.ROOT) | set(SWEEP_OPTIONS) == names


# batches that a callback makes a step of


class Accumulating(Callback):
    """Sets what a callback may set at any time."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        trainer.accumulate_grad_batches = 2


SCHEDULER = "lightning.pytorch.callbacks.GradientAccumulationScheduler"


def test_sam_refuses_a_callback_that_accumulates_before_anything_runs() -> None:
    def config(**changes: Any) -> Config:
        return configured(
            **changes, callbacks={"accumulate": {"_target_": SCHEDULER, "scheduling": {0: 1, 4: 2}}}
        )

    check(config(), [])
    with pytest.raises(
        ConfigError, match=r"^callbacks\.accumulate\.scheduling: model\.sam=true needs .* got 2: "
    ):
        check(config(**{"model.sam": True}), [])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.lr_interval": "step"}, r"model\.lr_interval=step"),
        ({"model.lr_scale_batch": 128}, r"model\.lr_scale_batch=128"),
        ({"trainer.max_steps": 100}, r"trainer\.max_steps=100"),
    ],
    ids=str,
)
def test_lengths_in_steps_refuse_a_callback_that_accumulates(changes: dict[str, Any], named: str) -> None:
    def config(scheduling: dict[int, int]) -> Config:
        changed = {"model.scheduler": "CosineAnneal", **changes}
        return configured(**changed, callbacks={"own": {"_target_": SCHEDULER, "scheduling": scheduling}})

    check(config({0: 1}), [])
    for scheduling in ({0: 2}, {0: 1, 4: 2}):
        with pytest.raises(
            ConfigError, match=rf"^callbacks\.own\.scheduling: {named}.*accumulate_grad_batches"
        ):
            check(config(scheduling), [])


def test_sam_refuses_a_callback_that_accumulates_without_saying_so(cli, tmp_path: Path) -> None:
    own = f"+callbacks.own._target_={__name__}.Accumulating"
    outcome = cli(*TINY, own, "model.sam=true", "trainer.limit_train_batches=2", f"exp_dir={tmp_path}")
    assert outcome.status != 0
    assert "model.sam=true needs trainer.accumulate_grad_batches=1, got 2" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
