"""Mistakes end a run at once, with one line that says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, runs_in

BAD = {
    "model.lrr=1": ["model.lrr", "did you mean lr"],
    "trainer.max_epoch=3": ["trainer.max_epoch", "did you mean max_epochs"],
    "modle=resnet": ["modle", "did you mean model"],
    "model=resnett": ["model=resnett", "did you mean resnet"],
    "data=cifar": ["data=cifar", "cifar10"],
    "technique=mixupp": ["technique=mixupp", "mixup"],
    "model.lr=abc": ["model.lr", "'abc'", "number"],
    "model.lr=-1": ["model.lr", "-1", "(0, inf)"],
    "model.powergrad_alpha=3.0": ["model.powergrad_alpha", "(0, 1]", "3.0"],
    "model.powergrad_alpha=0": ["model.powergrad_alpha", "(0, 1]"],
    "model.label_smoothing=1.5": ["model.label_smoothing", "[0, 1)", "1.5"],
    "model.optimizer=SDG": ["model.optimizer", "SDG", "SGD"],
    "model.scheduler=Cosine": ["model.scheduler", "CosineAnneal"],
    "model.warmstart=-1": ["model.warmstart", "[0, inf)", "-1"],
    "model.cooldown=2 model.scheduler=null": ["model.cooldown", "model.scheduler"],
    "model.mixup=maybe": ["model.mixup", "maybe", "true or false"],
    "model._target_=models.dynamic_resnet.ResNet19": ["model._target_", "ResNet19", "ResNet18"],
    "model._target_=models.resnet.ResNet18": ["model._target_", "models.resnet"],
    "+model.shake=true": ["model.shake", "no such option"],
    "trainer.precision=bf16-mixd": ["trainer.precision", "bf16-mixd", "bf16-mixed"],
    "trainer.precision=16-mixed": ["trainer.precision=16-mixed", "GPU", "bf16-mixed"],
    "trainer.max_epochs=3.5": ["trainer.max_epochs", "3.5", "whole number"],
    "trainer.max_epochs=0": ["trainer.max_epochs", "[1, inf)"],
    "trainer.devices=0": ["trainer.devices"],
    "trainer.accelerator=gpu": ["trainer.accelerator", "gpu"],
    "trainer.limit_val_batches=1.5": ["trainer.limit_val_batches", "1.5"],
    "trainer.sync_batchnorm=true": ["trainer.sync_batchnorm", "GPU"],
    "+trainer.foo=1": ["trainer.foo", "no such option"],
    "data.module.batch_size=0": ["data.module.batch_size", "[1, inf)"],
    "data.module.num_workers=-1": ["data.module.num_workers"],
    "data.module.val_split=2": ["data.module.val_split", "2"],
    "metrics=[accuracy]": ["metrics", "accuracy", "acc"],
    "metrics=[acc,r2]": ["metrics", "r2"],
    "seed=-1": ["seed", "-1"],
    "task=trian": ["task", "train"],
    "checkpoint.keep=all": ["checkpoint.keep", "best"],
    "user_dir=nowhere": ["user_dir=nowhere", "no such folder"],
    "ckpt_path=nowhere.ckpt": ["ckpt_path=nowhere.ckpt", "no such file"],
    "model.init_from=nowhere.pt": ["model.init_from=nowhere.pt", "no such file"],
    "run=nowhere": ["run=nowhere", "no run"],
    "callbacks.progress=5": ["callbacks.progress"],
    "model.adaptive_sam=true": ["model.adaptive_sam", "model.sam"],
    "checkpoint.mode=lowest": ["checkpoint.mode", "min, max"],
    "checkpoint.monitor=val/accuracy": ["checkpoint.monitor=val/accuracy", "did you mean val/acc"],
    "+trainer.default_root_dir=here": ["trainer.default_root_dir", "exp_dir"],
    "+trainer.callbacks=[]": ["trainer.callbacks", "callbacks.NAME"],
    "+trainer.enable_checkpointing=false": ["trainer.enable_checkpointing", "checkpoint.keep=none"],
    "+trainer.max_time=soon": ["trainer", "soon"],
    "+trainer.barebones=true": ["trainer", "barebones"],
}  # fmt: skip


@pytest.mark.parametrize("argument", BAD)
def test_a_mistake_is_one_line_that_names_the_option_and_what_is_allowed(
    cli, tmp_path: Path, argument: str
) -> None:
    base = [] if argument.split("=")[0] in ("run", "data") else ["data=synthetic", "logger.wandb=null"]
    outcome = cli(*base, *argument.split())
    lines = outcome.err.strip().splitlines()
    assert outcome.status != 0
    assert len(lines) == 1, outcome.err
    for part in BAD[argument]:
        assert part in lines[0], lines[0]
    assert "Traceback" not in outcome.err
    assert not runs_in(tmp_path), "a run that cannot start must leave nothing behind"


REGRESSION = ("data.task=regression", "data.num_classes=null")
COMBINATIONS = {
    (*REGRESSION, "metrics=[mse]", "model.mixup=true"): ["model.mixup", "regression"],
    (*REGRESSION, "metrics=[mse]", "model.label_smoothing=0.1"): ["label_smoothing"],
    (*REGRESSION, "metrics=[mse]", "model.powergrad_alpha=0.3"): ["powergrad_alpha"],
    (*REGRESSION,): ["metrics", "acc", "regression"],
    ("model.optimizer=Adam", "model.nesterov=true"): ["model.nesterov", "Adam"],
    ("model.sam=true", "trainer.accumulate_grad_batches=2"): ["model.sam", "trainer.accumulate_grad_batches"],
    ("model=timm", "+model.zero_init_residual=true"): ["model.zero_init_residual", "TimmModel"],
    ("model=timm", "model.type=resnet19"): ["model.type", "resnet19"],
    ("model=timm", "model.type=resnet18", "data.input_dim=1", "data.module.input_dim=1"): ["input_dim"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", COMBINATIONS, ids=" ".join)
def test_a_combination_without_meaning_is_refused_in_one_line(
    cli, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    outcome = cli("data=synthetic", "logger.wandb=null", *arguments)
    lines = outcome.err.strip().splitlines()
    assert outcome.status != 0
    assert len(lines) == 1, outcome.err
    for part in COMBINATIONS[arguments]:
        assert part in lines[0], lines[0]
    assert not runs_in(tmp_path)


def test_a_missing_data_folder_names_the_option(cli, tmp_path: Path) -> None:
    outcome = cli("data=imagenet", "data.module.data_root_dir=/nowhere/imagenet")
    assert outcome.status != 0
    assert "data.module.data_root_dir" in outcome.err and "/nowhere/imagenet" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_num_classes_that_contradict_the_folder_are_refused(cli, imagenet_folder: Path) -> None:
    outcome = cli("data=imagenet", f"data.module.data_root_dir={imagenet_folder}", "data.num_classes=7")
    assert outcome.status != 0
    assert "data.num_classes" in outcome.err and "7" in outcome.err and "3" in outcome.err


def test_the_cluster_environment_names_the_variable_that_is_not_set(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATASET_LOCATION", raising=False)
    monkeypatch.setenv("EXPERIMENT_LOCATION", "x")
    outcome = cli("env=cluster", *TINY)
    assert outcome.status != 0
    assert "DATASET_LOCATION" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_help_shows_groups_options_and_examples_without_heavy_imports(shell) -> None:
    outcome = shell("--help", env={"PYTHONPROFILEIMPORTTIME": "1"}, real=True)
    assert outcome.status == 0
    for part in ("model:", "technique:", "mixup", "model.lr", "Examples", "python main.py -m"):
        assert part in outcome.out, outcome.out
    assert " hydra\n" in outcome.err, "the imports are really listed"
    assert " torch\n" not in outcome.err


def test_a_typing_error_beside_ones_own_configs_is_one_line_too(cli, tmp_path: Path) -> None:
    models = tmp_path / "mine" / "cli_configs" / "model"
    models.mkdir(parents=True)
    (models / "own.yaml").write_text("_target_: models.dynamic_resnet.ResNet18\nfavourite: 3\n")
    outcome = cli("user_dir=mine", "model=own", "technique=[mixup]", "data=synthetic", "model.favorite=4")
    assert outcome.status == 2
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert "model.favorite" in outcome.err and "did you mean favourite" in outcome.err


def test_a_tracker_that_cannot_start_is_refused_before_there_is_a_run(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("crucible.loggers.has_wandb_key", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    for argument in ("logger.wandb.mode=online", "logger.tensorboard=true"):
        outcome = cli("data=synthetic", argument)
        assert outcome.status == 2 and argument.split("=")[0] in outcome.err, outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
    assert not runs_in(tmp_path)


def test_two_techniques_that_fight_over_an_option_are_refused(cli, tmp_path: Path) -> None:
    techniques = tmp_path / "mine" / "cli_configs" / "technique"
    techniques.mkdir(parents=True)
    for name, value in (("weak", 0.05), ("strong", 0.3)):
        (techniques / f"{name}.yaml").write_text(
            f"# @package _global_\nmodel:\n  label_smoothing: {value}\n"
            f"techniques:\n  {name}:\n    model.label_smoothing: {value}\n"
        )
    outcome = cli("user_dir=mine", "technique=[weak,strong]", *TINY)
    assert outcome.status != 0
    assert "model.label_smoothing" in outcome.err and "weak" in outcome.err and "strong" in outcome.err


def test_the_tracebacks_are_there_for_who_wants_them(shell) -> None:
    outcome = shell("model.lr=-1", "data=synthetic", env={"HYDRA_FULL_ERROR": "1"}, real=True)
    assert outcome.status != 0
    assert "Traceback" in outcome.err and "ConfigError" in outcome.err
