"""Typed against recorded: what somebody else's folder names is not run; what Crucible itself records is."""

from __future__ import annotations

import csv
import importlib
import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, Outcome, runs_in, summary_of

from crucible import load_run
from crucible.cells import cell, text_of
from crucible.command_line import quoted
from crucible.handover import HandOver
from crucible.masking import masked, masked_in
from crucible.options import ConfigError
from crucible.run import RunDirectory
from crucible.trust import judge
from reporting.page import Code, Fold, Grid, Heading, Items, Page, Text
from reporting.rendering import to_markdown

CANARY = "canary"
TARGETS = (
    "os.system", "posix.system", "subprocess.run", "builtins.exec", "builtins.eval", "builtins.__import__",
    "hydra.utils.get_method", "hydra.utils.instantiate", "functools.partial", "importlib.import_module",
    "torch.hub.load", "torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.nn.os.system",
    "torchvision.transforms.functional.os.system", "timm.create_model", "timm.models.load_checkpoint",
    "lightning.pytorch.callbacks.os.system", "lightning.pytorch.cli.LightningCLI", "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.call._call_and_handle_interrupt", "models.base_model.torch.hub.load",
    "callbacks.checkpoints.shutil.rmtree", "crucible.configuration.importlib.import_module", "evil.Evil",
    "timm_evil.Evil", "models.dynamic_resnet", "models.dynamic_resnet.ResNet18", "..", "os", "", 3, ["os.system"],
)  # fmt: skip
# where a name may stand; each is followed when the run is built
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "callbacks.x": lambda target: {"callbacks": {"x": {"_target_": target, "_args_": []}}},
    "nested in a callback": lambda target: {
        "callbacks": {
            "x": {"_target_": "lightning.pytorch.callbacks.Timer", "duration": {"_target_": target}}
        }
    },
    "logger.x": lambda target: {"logger": {"x": {"_target_": target}}},
    "data.module": lambda target: {"data": {"module": {"_target_": target}}},
    "a transform": lambda target: {"data": {"module": {"train_transforms": {"_target_": target}}}},
    "nested in a list of transforms": lambda target: {
        "data": {
            "module": {
                "train_transforms": {
                    "_target_": "torchvision.transforms.v2.Compose",
                    "transforms": [{"_target_": target, "_partial_": True}],
                }
            }
        }
    },
    "model.stages": lambda target: {"model": {"stages": {"x": target}}},
    "metrics": lambda target: {"metrics": [{"_target_": target}]},
    "optimizer_kwargs": lambda target: {"model": {"optimizer_kwargs": {"x": {"_target_": target}}}},
    "trainer": lambda target: {"trainer": {"strategy": {"_target_": target}}},
}
HARMLESS_ELSEWHERE = {("models.dynamic_resnet.ResNet18", place) for place in (
    "a transform", "nested in a callback", "nested in a list of transforms", "optimizer_kwargs",
)}  # fmt: skip  # a module, which they would refuse to be given


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_does_not_belong_at_its_place_is_refused_before_it_is_followed(place: str) -> None:
    for target in TARGETS:
        if (str(target), place) in HARMLESS_ELSEWHERE:
            continue
        with pytest.raises(ConfigError) as refused:
            judge({**PLACES[place](target), "user_dir": "/theirs"}, "run=RUN")
        line = str(refused.value)
        assert "run=RUN" in line and "user_dir=/theirs again" in line and str(target) in line, line


def test_the_way_on_can_be_pasted() -> None:
    with pytest.raises(ConfigError) as refused:
        judge({"model": {"_target_": "own.Net"}, "user_dir": "/it's, [mine]"}, "run=RUN")
    typed = str(refused.value).partition("type ")[2].partition(" again")[0]
    assert shlex.split(typed) == ["user_dir=" + quoted("/it's, [mine]")]


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"_target_": "models.dynamic_resnet.ResNet18", "_partial_": True}},
        {"model": {"_target_": "models.dynamic_resnet.ResNet18", "_call_": "os.system"}},
        {"data": {"module": {"data_root_dir": "${oc.env:HOME}"}}},
        {"callbacks": {"x": "${oc.decode:x}"}},
        {"exp_dir": ["${now:%Y}"]},
    ],
)
def test_what_is_called_otherwise_or_filled_in_from_outside_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing of it was run"):
        judge(config, "run=RUN")


def honest() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted((ROOT / "cli_configs").rglob("*.yaml")):
        for target in set(_targets(yaml.safe_load(file.read_text(encoding="utf-8")))):
            yield target, {}
    for name in ("EarlyStopping", "LearningRateMonitor", "GradientAccumulationScheduler", "Timer",
                 "StochasticWeightAveraging", "DeviceStatsMonitor"):  # fmt: skip
        yield f"lightning.pytorch.callbacks.{name}", {}
    for name in ("CSVLogger", "WandbLogger", "TensorBoardLogger", "MLFlowLogger"):
        yield f"lightning.pytorch.loggers.{name}", {}
    yield "crucible.loggers.TensorBoard", {}


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def test_all_that_crucible_ships_is_accepted_at_its_place() -> None:
    places = {
        "models": lambda t: {"model": {"_target_": t}}, "datasets": PLACES["data.module"],
        "augmentation": PLACES["a transform"], "callbacks": PLACES["callbacks.x"], "crucible": PLACES["logger.x"],
    }  # fmt: skip
    seen = set()
    for target, _ in honest():
        room = target.split(".")[0]
        place = places.get(room) or PLACES["callbacks.x" if ".callbacks." in target else "logger.x"]
        judge(place(target), "run=RUN")
        seen.add(target)
    assert len(seen) > 40 and "models.timm.TimmModel" in seen


@pytest.mark.parametrize(
    "target",
    [
        "torchvision.transforms.v2.RandomCrop", "torchvision.transforms.Compose", "torchvision.transforms.ToTensor",
        "torch.nn.Dropout", "torch.nn.modules.activation.ReLU", "timm.data.auto_augment.RandAugment",
        "timm.data.random_erasing.RandomErasing", "timm.layers.DropPath", "torch.optim.SGD", "albumentations.Compose",
        "albumentations.pytorch.ToTensorV2", "augmentation.policies.cifar.AutoAugmentTransform",
    ],
)  # fmt: skip
def test_parts_of_the_libraries_are_accepted_where_parts_belong(target: str) -> None:
    judge(PLACES["a transform"](target), "run=RUN")
    judge(PLACES["nested in a list of transforms"](target), "run=RUN")


def test_a_technique_is_accepted_as_a_stage() -> None:
    judge(PLACES["model.stages"]("optimizers.sam.Sam"), "run=RUN")


# at the command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of someone's, to be changed by someone else."""
    from technique_runs import make_teacher

    return make_teacher(tmp_path_factory.mktemp("someone"))


def planted(finished: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose recorded configuration was changed, and that is not finished."""
    run = folder / "theirs"
    shutil.copytree(finished, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = summary_of(run)
    del summary["options"]  # which would say that there were more of them
    (run / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    return run


def evil_folder(folder: Path) -> Path:
    evil = folder / "evil"
    evil.mkdir()
    touch = f"open({str(folder / CANARY)!r}, 'w').close()\n"
    for name in ("evil", "timm", "hubconf"):
        (evil / f"{name}.py").write_text(f"{touch}class Evil: pass\ndef Net(*a, **k): pass\n")
    return evil


def hostile(evil: Path, canary: Path) -> dict[str, Callable[[dict[str, Any]], None]]:
    """Changes of a recorded configuration, each of which ran code once."""
    touch = f"touch {canary}"

    def at(*place: str, value: Any) -> Callable[[dict[str, Any]], None]:
        def change(config: dict[str, Any]) -> None:
            node = config
            for name in place[:-1]:
                if not isinstance(node.get(name), dict):
                    node[name] = {}
                node = node[name]
            node[place[-1]] = value
            config["user_dir"] = str(evil)

        return change

    system = {"_target_": "os.system", "_args_": [touch]}
    return {
        "hub": at("model", value={"_target_": "torch.hub.load", "repo_or_dir": str(evil), "model": "Net",
                                  "source": "local"}),
        "user_dir": at("model", "_target_", value="evil.Evil"),
        "shadow": at("model", "_target_", value="timm.Evil"),
        "system": at("model", "optimizer_kwargs", value={"x": system}),
        "exec": at("model", "norm_kwargs", value={"x": {"_target_": "builtins.exec", "_args_": [
            f"open({str(canary)!r}, 'w')"]}}),
        "run": at("model", "init_from", value={"_target_": "subprocess.run", "args": ["touch", str(canary)]}),
        "stage": at("model", "stages", value={"x": "evil.Evil"}),
        "walk": at("model", "optimizer_kwargs", value={"x": {
            "_target_": "models.base_model.torch.os.system", "_args_": [touch]}}),
    }  # fmt: skip


CASES = ("hub", "user_dir", "shadow", "system", "exec", "run", "stage", "walk")


@pytest.mark.parametrize("case", [*CASES[:3], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[3:])])
def test_a_hostile_run_runs_nothing_wherever_it_is_read(
    cli: Callable[..., Outcome], finished: Path, tmp_path: Path, case: str
) -> None:
    evil, path = evil_folder(tmp_path), list(sys.path)
    canary = tmp_path / CANARY
    run = planted(finished, tmp_path, hostile(evil, canary)[case])
    for command in ([f"run={run}"], [f"run={run}", "task=test"], [f"run={run}", "task=predict"]):
        outcome = cli(*command)
        assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
        assert "nothing of it was run" in outcome.err and f"user_dir={evil}" in outcome.err
    with pytest.raises(ConfigError, match="nothing of it was run"):
        load_run(run)
    outcome = cli(*TINY, "technique=distillation", f"model.teacher={run}")
    assert outcome.status == 2 and "model.teacher=" in outcome.err and "nothing of it was run" in outcome.err
    assert not canary.exists() and sys.path == path and not list(tmp_path.rglob("experiments/*/*-s*"))


def test_a_callback_or_data_module_of_theirs_runs_nothing_even_where_another_is_typed(
    cli: Callable[..., Outcome], finished: Path, tmp_path: Path
) -> None:
    evil = evil_folder(tmp_path)

    def change(config: dict[str, Any]) -> None:
        config["callbacks"]["x"] = {"_target_": "os.system", "_args_": [f"touch {tmp_path / CANARY}"]}
        config["user_dir"] = str(evil)

    run = planted(finished, tmp_path, change)
    assert cli(f"run={run}", "task=test").status == 2
    dropped = cli(f"run={run}", "task=test", "callbacks.x=null")
    assert dropped.status == 0, dropped.err
    assert not (tmp_path / CANARY).exists()


NETWORK = """
from models.dynamic_resnet import ResNet18
from os import system
class Net(ResNet18):
    pass
"""


def test_a_typed_user_dir_is_followed_and_a_recorded_one_only_when_typed_again(
    cli: Callable[..., Outcome], shell: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "net_of_mine.py").write_text(NETWORK)
    own = [
        *TINY,
        "user_dir=mine",
        "model=resnet",
        "model._target_=net_of_mine.Net",
        "data.module.num_samples=32",
    ]
    made = cli(*own)
    assert made.status == 0, made.err
    (run,) = runs_in(tmp_path / "experiments")
    assert sys.path[-1] == str(tmp_path / "mine")
    refused = shell(f"run={run}", "task=test")
    assert refused.status == 2 and f"type user_dir={tmp_path / 'mine'} again" in refused.err, refused.err
    assert cli(f"run={run}", "task=test", "user_dir=mine").status == 0
    assert load_run(run, user_dir=tmp_path / "mine").model is not None
    config = RunDirectory(run).config()
    config["model"]["_target_"] = "net_of_mine.system"
    with pytest.raises(ConfigError, match="leads out of user_dir"):
        judge(config, "run=RUN", tmp_path / "mine")
    config["model"]["_target_"] = "net_of_mine.system.os"
    with pytest.raises(ConfigError, match="has no module"):
        judge(config, "run=RUN", tmp_path / "mine")
    with pytest.raises(ConfigError, match="nothing of it was run"):
        judge(PLACES["callbacks.x"]("os.system"), "run=RUN", tmp_path / "mine")


def test_what_was_typed_is_followed_by_the_processes_that_were_told_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PLACES["callbacks.x"]("somebody.Elses")
    with pytest.raises(ConfigError):
        judge(config, "run=RUN")
    told = HandOver(typed=["callbacks.x._target_=somebody.Elses"])
    monkeypatch.setenv(*next(iter(told.environment().items())))
    judge(config, "run=RUN")
    with pytest.raises(ConfigError):
        judge(PLACES["logger.x"]("somebody.Elses"), "run=RUN")


@pytest.mark.slow
def test_a_sweep_and_two_ranks_follow_what_their_parent_was_told(
    shell: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net_of_mine.py").write_text(NETWORK)
    own = [
        *TINY,
        "user_dir=mine",
        "model=resnet",
        "model._target_=net_of_mine.Net",
        "data.module.num_samples=32",
    ]
    outcome = shell("-m", *own, "trainer.accelerator=cpu", "trainer.devices=2", "seed=0")
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path / "experiments")
    assert summary_of(run)["status"] == "finished"


def test_a_file_of_ones_own_with_the_name_of_a_package_is_said_to_be_shadowed(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "timm.py").write_text(NETWORK)
    outcome = cli(*TINY, "user_dir=mine", "model._target_=timm.Net")
    assert outcome.status == 2 and "is shadowed" in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert importlib.import_module("timm").__file__ != str(tmp_path / "mine" / "timm.py")


# checkpoints


class Touch:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.mark.slow
def test_hostile_checkpoints_run_nothing(cli: Callable[..., Outcome], finished: Path, tmp_path: Path) -> None:
    canary = tmp_path / CANARY
    run = planted(finished, tmp_path, lambda config: None)
    bad = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {"x": Touch(str(canary))}}, bad)
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps(Touch(str(canary)), protocol=2))
    legacy = tmp_path / "legacy.pt"
    torch.save(Touch(str(canary)), legacy, _use_new_zipfile_serialization=False)
    for file in (bad, bare, legacy):
        for name in ("best.ckpt", "last.ckpt"):
            shutil.copy(file, run / "checkpoints" / name)
        for command in ([f"run={run}"], [f"run={run}", "task=test"], [f"run={run}", "task=predict"]):
            assert cli(*command).status != 0, (file, command)
        with pytest.raises(ConfigError):
            load_run(run)
        for option in (
            f"ckpt_path={file}", f"model.init_from={file}", f"model.teacher={run}",
            f"model.teacher=timm:resnet18@{file}",
        ):  # fmt: skip
            technique = ["technique=distillation"] if "teacher" in option else []
            outcome = cli(*TINY, *technique, option)
            assert outcome.status == 2 and outcome.err.count("\n") == 1, (option, outcome.err)
    assert not canary.exists()


def test_a_hostile_record_of_right_answers_runs_nothing(finished: Path, tmp_path: Path) -> None:
    from reporting.records import _read_correctness

    run, canary = tmp_path / "run", tmp_path / CANARY
    run.mkdir()
    content = np.array([Touch(str(canary))], dtype=object)
    np.savez(run / "test_correct.npz", correct=content, count=content, samples=content, calibration=content)
    found, remark = _read_correctness(run, 0.5, best=False)
    assert found is None and "cannot be read" in remark and not canary.exists()


# secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@host/db", "postgresql://me:***@host/db"),
        ("search.storage=mysql://me:a:b@h", "search.storage=mysql://me:***@h"),
        ("s3://bucket/data", "s3://bucket/data"),
        ("ssh://git@host/x", "ssh://git@host/x"),
        ("+logger.x.api_key=abc123 seed=1", "+logger.x.api_key=*** seed=1"),
        ("'logger.x.token=\"a b\"'", "'logger.x.token=***'"),
        ("model.tokens=3", "model.tokens=3"),
        ("api_key=null", "api_key=null"),
    ],
)
def test_a_secret_is_masked_in_a_text(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_secret_is_masked_in_containers() -> None:
    config = {"logger": {"x": {"api_key": "abc", "project": "p"}}, "urls": ["s3://a:b@c"], "tokens": 3}
    assert masked_in(config) == {
        "logger": {"x": {"api_key": "***", "project": "p"}}, "urls": ["s3://a:***@c"], "tokens": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    "typed",
    ["data.module.name=s3://key:hunter2@bucket",
        "+logger.x={_target_:lightning.pytorch.loggers.CometLogger,api_key:hunter2}"],
)  # fmt: skip
def test_a_secret_that_a_record_would_hold_is_refused_in_one_line(
    cli: Callable[..., Outcome], tmp_path: Path, typed: str
) -> None:
    outcome = cli(*TINY, typed)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "hunter2" not in outcome.err + outcome.out
    assert not any(b"hunter2" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


# tables and pages


@pytest.mark.parametrize(
    "text", ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "'=x", "''@", "'x", "x", "", "-0.5", "+1e3", "nan"]
)
def test_a_cell_is_no_formula_and_is_read_as_it_was(text: str) -> None:
    written = cell(text)
    assert text_of(written) == text
    assert written == text or not written.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert cell(-0.5) == -0.5 and cell("-0.5") == "-0.5"


def test_metrics_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_metrics([{"epoch": 0, "=cmd()": -0.25}])
    head, row = list(csv.reader((tmp_path / "metrics.csv").open()))
    assert head == ["epoch", "'=cmd()"] and row == ["0", "-0.25"]
    assert run.metrics() == [{"epoch": "0", "=cmd()": "-0.25"}]


def test_a_name_in_the_report_is_no_mark() -> None:
    name = "<img src=x onerror=y>|`b`\n# h [l](http://evil.org) *x* _y_ &lt;"
    page = Page("Comparison")
    page.add(
        Heading(name, 2), Text(name), Items([name]), Grid([name], [[(name, name)]], frozenset({name})),
        Fold(name, [Text("`code` and *emphasis*")]), Code(["echo '```'", "rm"]),
    )  # fmt: skip
    text = to_markdown(page)
    assert "<img" not in text and "](http" not in text and "\n# h" not in text and "http:" not in text
    assert "`code` and *emphasis*" in text and "````sh" in text
    assert all(
        line.count("|") - line.count("\\|") == 2 for line in text.splitlines() if line.startswith("| ")
    )


def test_files_keep_the_umask(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert cli(*TINY, "data.module.num_samples=32").status == 0
    finally:
        os.umask(before)
    (run,) = runs_in(tmp_path / "experiments")
    modes = {file.name: file.stat().st_mode & 0o777 for file in run.rglob("*") if file.is_file()}
    assert set(modes.values()) == {0o640}, modes
