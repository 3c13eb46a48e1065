"""Any configuration of a tiny run trains its steps, or is refused in one line before it has a folder."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from declared import Option, all_options, composed, read, right_values
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict

from crucible.command_line import describe
from crucible.configuration import find_target
from lab.config import model_options
from lab.experiment import Examiner
from lab.jobs import execute
from models.techniques import technique_kinds
from norms.convert import NORMS, norm_options

Choose = Callable[[Sequence[Any]], Any]

# seconds for two steps on two CPU cores at most
MODELS: dict[str, dict[str, Any]] = {
    "cifar_resnet.CifarResNet": {"model.depth": [8, 8, 14, 20, 8, 9]},
    "wide_resnet.WRN2810": {"model.depth": [10, 16], "model.widen_factor": [1, 2]},
    "dynamic_resnet.ResNet18": {},
    "preact_resnet.PreActResNet18": {},
    "fixup_resnet.ResNet18WithoutNorm": {},
    "oct_resnet.OctResNet18": {},
    "pyramidnet.PyramidNet110": {},
    "dynamic_vgg.VGG16": {},
    "se_resnet.SEResNet18": {},
    "convnext.ConvNext": {"model.type": ["atto"]},
    "timm.MobileNet": {"model.type": ["v3-small"]},
    "timm.TimmModel": {"model.type": ["resnet10t", "vit_tiny_patch16_224", "mixer_s32_224", "no_such_name"]},
}
POLICIES = ("default.IdentityTransform", "digits.BaselineTransform", "cifar.BaselineCutoutTransform",
            "cifar.RandAugmentTransform", "imagenet.BaselineTransform")  # fmt: skip
DATA: dict[str, list[Any]] = {
    "data.input_size": [8, 16, 1, 2, 3, 7, 33],
    "data.input_dim": [2, 2, 2, 1, 3],
    "data.input_channels": [1, 3, 2],
    "data.num_classes": [3, 1, 2, 7, 30],
    "data.module.num_samples": [16, 4, 5, 40],
    "data.module.batch_size": [4, 1, 2, 100],
    "data.module.noise": [1.0, 0.0],
    "data.module.val_split": [0.25, "test", 0.01, 0.99],
    "data.cv.k": [1, 2, 5],
    "data.module.fold": [0, 1],
    "data.module.random_batches": [False, True],
    "data.module.drop_last": [True, False],
}
METRICS = [["acc"], ["acc", "f1", "ece"], ["auroc", "precision", "recall", "f1_per_class", "top5"], [], ["mse", "mae"],
           ["r2"]]  # fmt: skip
TRAINER: dict[str, list[Any]] = {
    "trainer.max_epochs": [1, 2, -1],
    "trainer.max_steps": [2, 3, 1, -1],
    "trainer.accumulate_grad_batches": [1, 2, 5],
    "trainer.precision": [None, "bf16-mixed", "64-true", "16-mixed", "bf16-true", 32],
    "trainer.gradient_clip_val": [None, 1.0, 1e-9],
    "trainer.gradient_clip_algorithm": [None, "norm", "value"],
    "trainer.limit_train_batches": [None, 1, 0.5, 1e-3],
    "trainer.limit_val_batches": [None, 0, 1, 0.5, 0.0],
    "trainer.limit_test_batches": [None, 0, 1],
    "trainer.overfit_batches": [0.0, 1, 0.5],
    "trainer.val_check_interval": [None, 1, 0.5, 3],
    "trainer.check_val_every_n_epoch": [1, 2],
    "trainer.num_sanity_val_steps": [0, 1],
    "trainer.detect_anomaly": [False, True],
    "checkpoint.every_steps": [None, 1],
    "checkpoint.keep": ["best", "last", "none"],
    "checkpoint.monitor": [None, "val/loss", "val/acc", "val/f1"],
    "test_after_training": [False, True],
}
_NOT_DRAWN = ("model.stages", "model.teacher", "model.init_from", "model.pretrained", "model.timm_kwargs",
              "model.compile",
              "model.norm_kwargs", "model.optimizer", "model.optimizer_kwargs", "model.depth", "model.type",
              "model.widen_factor", "model.distillation_weight", "model.temperature")  # fmt: skip
OPTIMIZERS = [
    "SGD",
    "adam",
    "AdamW",
    "Rmsprop",
    "lamb",
    "lion",
    "sgdp",
    "nadamw",
    "adafactor",
    "muon",
    "kron",
    "lars",
]
OPTIMIZER_KWARGS = [
    None, {"eps": 1e-6}, {"betas": [0.9, 0.99]}, {"betas": [0.9]}, {"betas": 0.9}, {"eps": -1.0}, {"dampening": "a"},
    {"foreach": 3}, {"dampening": 0.1}, {"alpha": [1]}, {"eps": None}, {"capturable": True}, {"fused": True},
]  # fmt: skip


@cache
def _of_models() -> dict[str, list[Option]]:
    """The options that are drawn, by the path of the model's class; those of every model under an empty one."""
    found: dict[str, list[Option]] = {"": []}
    for option in all_options():
        if not option.name.startswith("model.") or option.name in _NOT_DRAWN or option.room == "norms":
            continue
        path = option.room if option.base and option.base[0].startswith("model._target_") else ""
        if path or not option.base:
            found.setdefault(path, []).append(option)
    return found


def drawn(choose: Choose) -> dict[str, Any]:
    """Options of a tiny run, by dotted name."""
    options: dict[str, Any] = {"trainer.max_steps": 2, "trainer.max_epochs": 3, "data.num_classes": 3}
    options |= {"data.module.num_samples": 16, "data.module.batch_size": 6, "data.module.val_split": 0.25}
    target = f"models.{choose([*['cifar_resnet.CifarResNet'] * 12, *MODELS])}"
    options["model._target_"] = target
    options |= {name: choose(values) for name, values in MODELS[target.removeprefix("models.")].items()}
    of_models = _of_models()
    pool = [*of_models[""], *of_models.get(target, [])]
    for _ in range(choose(range(5))):
        option = choose(pool)
        options[option.name] = choose(_tried(option) or [None])
        if option.name in _needs() and choose([True, True, False]):
            options |= _needs()[option.name]
    for table in (DATA, TRAINER):
        for _ in range(choose(range(5))):
            name = choose(list(table))
            options[name] = choose(table[name])
    if choose([False] * 4 + [True]):
        options["metrics"] = choose(METRICS)
    if choose([False] * 8 + [True]):
        options |= {"data.task": "regression", "metrics": choose([["mse"], ["mae", "r2"], ["acc"]])}
    if choose([False, True]):
        options["model.optimizer"] = choose(OPTIMIZERS)
        options["model.optimizer_kwargs"] = choose([None] * 12 + OPTIMIZER_KWARGS)
    if choose([False, False, True]):
        norm = options["model.norm"] = choose(list(NORMS))
        if choose([False, True]) and (known := norm_options(norm)):
            name = choose(list(known))
            values = right_values(read(known[name][0]))
            options["model.norm_kwargs"] = {name: choose(values or [None])}
    if choose([False, False, True]):
        options["data.module.train_transforms._target_"] = f"augmentation.policies.{choose(POLICIES)}"
    return options


@cache
def _needs() -> dict[str, dict[str, Any]]:
    """What an option means something beside."""
    found: dict[str, dict[str, Any]] = {
        "model.lr_milestones": {"model.scheduler": "MultiStep", "model.warmstart": 0},
        "model.lr_step_size": {"model.scheduler": "Step"},
        "model.lr_multiplier": {"model.scheduler": "Step"},
        "model.se_rd_ratio": {"model.squeeze_excitation": True},
    }
    for kind in technique_kinds():
        for name, others in kind.needs.items():
            default = kind.__dataclass_fields__[others[0]].default
            found[f"model.{name}"] = {f"model.{others[0]}": True if default is False else 0.5}
    return found


def _tried(option: Option) -> list[Any]:
    allowed = option.allowed
    lists = [[0.5], [1, 1.5], [1], [2, 1], [100]] if allowed.members is not None else []
    return [*right_values(allowed), *lists]


def run(options: dict[str, Any], folder: Path) -> tuple[str, str]:
    """What became of it, and what was said: trained, refused, or diverged; whatever else is raised or an assertion."""
    config = composed(()).copy()
    with open_dict(config):
        for name, value in options.items():
            OmegaConf.update(config, name, value, merge=False, force_add=True)
        known = model_options(find_target(options["model._target_"], ""))
        for name in [
            n for n in config.model if n not in known and n != "_target_" and f"model.{n}" not in options
        ]:
            del config.model[name]
        if read(known.get("squeeze_excitation", (bool,))[0]).choices:
            config.model.squeeze_excitation = True
        config.exp_dir, config.callbacks.progress = str(folder), None
    try:
        job = Examiner().examine(config, [])
    except Exception as error:
        if (line := describe(error)[0]) is None:
            raise
        assert "\n" not in line and len(line) < 700, line
        return "refused", line
    assert not list(folder.rglob("config.yaml"))
    directory = job.record()
    before = list(sys.argv), sys.stderr
    try:
        status = execute(directory, job.config)
    finally:
        sys.argv = before[0]
    reason = json.loads((directory.path / "summary.json").read_text())["reason"]
    if status and "finite" in reason:
        return "diverged", reason
    assert status == 0, f"{status}: {reason}"
    return "trained", ""


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "examples", [pytest.param(8, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.nightly)]
)
def test_a_drawn_configuration_trains_or_is_refused_in_one_line(
    examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outcomes: list[str] = []

    @hypothesis.settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink) if examples > 8 else (hypothesis.Phase.generate,),
    )  # fmt: skip
    @hypothesis.given(st.data())
    def check(data: st.DataObject) -> None:
        options = drawn(lambda values: data.draw(st.sampled_from(list(values))))
        hypothesis.note(" ".join(f"{n}={v}" for n, v in options.items()))
        outcomes.append(run(options, tmp_path_factory.mktemp("drawn"))[0])

    check()
    assert outcomes.count("trained") >= examples // 8, outcomes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model.color_jitter": 0.1}, "model.color_jitter=0.1 needs images"),
        ({"data.module.train_transforms.mean": [0.1, 0.2, 0.3]}, "mean and std have 3 values"),
        (
            {"data.module.test_transforms._target_": "augmentation.policies.digits.TestTransform",
             "data.module.test_transforms.channels": 3},
            "data.module.test_transforms: TestTransform",
        ),
    ],
)  # fmt: skip
def test_what_the_first_samples_show_is_said_before_there_is_a_run(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tiny = {"model._target_": "models.cifar_resnet.CifarResNet", "model.depth": 8}
    outcome, line = run(tiny | options, tmp_path)
    assert outcome == "refused" and says in line, line
    assert not list(tmp_path.iterdir())
