"""Mistakes end a run at once, with one line that says what to change."""

from __future__ import annotations

import csv
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, nightly, runs_in, write_images
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from crucible import command_line
from crucible.command_line import command, option, parse, quoted, readable, unquoted
from crucible.run import RunDirectory

sys.path.append(str(ROOT / "benchmarks"))
from wrong_inputs import WRONG, Wrong, arguments_of, faults, prepare

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
    for argument in ("logger.wandb.mode=online", "logger.tensorboard=true", "logger.mlflow=true"):
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


def test_weights_that_do_not_fit_the_network_leave_no_folder(cli, tmp_path: Path) -> None:
    outcome = cli(*TINY, "model=resnet", "model.pretrained=true", "model.cifar_size=true")
    assert outcome.status == 2 and outcome.err.startswith("error: model.pretrained=true does not go with")
    assert not runs_in(tmp_path)


def test_a_choice_that_is_not_there_is_a_mistake_and_no_fault_of_the_system(cli) -> None:
    outcome = cli("data=nowhere")
    assert outcome.status == 2 and "no such choice" in outcome.err


@pytest.mark.slow
def test_the_tracebacks_are_there_for_who_wants_them(shell) -> None:
    outcome = shell("model.lr=-1", "data=synthetic", env={"HYDRA_FULL_ERROR": "1"})
    assert outcome.status != 0
    assert "Traceback" in outcome.err and "ConfigError" in outcome.err


# the table of wrong inputs (benchmarks/results/wrong_inputs.md): a dozen of different kinds, all of them nightly
_DOZEN = (1, 4, 8, 10, 15, 20, 24, 43, 48, 51, 53, 57)
_CHOSEN = [*(WRONG[i] for i in _DOZEN), *nightly(*(w for i, w in enumerate(WRONG) if i not in _DOZEN))]


@pytest.mark.parametrize("wrong", _CHOSEN, ids=lambda wrong: wrong.command)
def test_a_wrong_input_of_the_table_is_one_line_with_the_way_on(cli, tmp_path: Path, wrong: Wrong) -> None:
    prepare(tmp_path)
    script, arguments = arguments_of(wrong.command)
    outcome = cli(*arguments, script=script)
    assert not list(faults(wrong, outcome.status, outcome.err, tmp_path)), outcome.err


ODD = (
    "a,b", "a]b", "[a", "a=b", "it's", 'say "x"', "two words", " a ", "Größe", "$HOME", "#1", "{}", "${x}", "\\", "a\\",
    "a\\'b", "-a", "~a", "~/x", "true", "Null", "1e-3", "nan", "inf", "", "*?", "a:b", "(a)", "a;b&c|d<e>", "1_000",
    "a\nb", "a\tb", "\\${x}", ".5", "0x1",
)  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_any_text_is_passed_on_as_it_is(text: str) -> None:
    typed = option("key", text)
    value = OverridesParser.create().parse_override(typed).value()
    assert OmegaConf.to_container(OmegaConf.create({"key": value}), resolve=True) == {"key": text}
    if "${" not in text:
        assert unquoted(quoted(text)) == text == parse(typed).value
    assert shlex.split(command(typed)) == ["python", "main.py", typed]


def test_plain_words_and_paths_are_passed_on_without_quotes() -> None:
    for text in ("baseline", "mixup+sam", "/data/runs/1a2b3c4d-s0", "experiments/x.y", "SGD"):
        assert quoted(text) == text


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("exp_dir=~/x", "exp_dir", "~/x"), ("exp_dir=/data/Größe #2", "exp_dir", "/data/Größe #2"),
        ("arm=a=b", "arm", "a=b"), ("arm=ü,b", "arm", ["ü", "b"]), ("model.lr=1e-3", "model.lr", 1e-3),
        ("x=[1,{a: null}]", "x", [1, {"a": None}]), ("x='a,b'", "x", "a,b"),
        ("~callbacks.plots", "callbacks.plots", None),
        ("x=TRUE", "x", True), ("x=0012", "x", "0012"),
    ],
)  # fmt: skip
def test_arguments_are_read_as_hydra_does_and_what_it_has_no_place_for_as_text(
    argument: str, name: str, value: Any
) -> None:
    assert parse(argument) == (name, value)
    assert OverridesParser.create().parse_override(readable(argument)).key_or_group == name


@pytest.mark.parametrize(
    "typed",
    [
        "user_dir=mine data=synthetic --cfg job model.lr=0.3",
        "--cfg job user_dir=mine data=synthetic model.lr=0.3",
    ],
)
def test_flags_stand_anywhere(cli, tmp_path: Path, typed: str) -> None:
    (tmp_path / "mine").mkdir()
    outcome = cli(*typed.split())
    assert outcome.status == 0 and "lr: 0.3" in outcome.out, outcome.err


def test_an_option_that_the_class_takes_needs_no_plus(cli) -> None:
    outcome = cli(
        "data=digits", "data.module.train_transforms.padding=2", "model.norm_kwargs.alpha=1", "--cfg", "job"
    )
    assert outcome.status == 0 and "padding: 2" in outcome.out and "alpha: 1" in outcome.out, outcome.err


def test_groups_that_are_null_by_default_may_be_typed_so(cli) -> None:
    outcome = cli("data=synthetic", "debug=null", "recipe=null", "technique=null", "--cfg", "job")
    assert outcome.status == 0, outcome.err


def test_a_run_in_a_folder_of_any_name_trains_resumes_and_is_tested(cli, tmp_path: Path) -> None:
    odd = "a,b [b] it's=$#{} Größe"
    typed = [
        *TINY,
        option("exp_dir", tmp_path / odd),
        option("data.module.name", "x,y [ü]"),
        option("arm", "a=b,'c'"),
    ]
    outcome = cli(*typed, "trainer.limit_train_batches=1")
    assert outcome.status == 0, outcome.err
    (run,) = runs_in(tmp_path)
    assert run.parent.name == "x,y [ü]" and run.parent.parent.name == odd
    assert "".join(outcome.out.split()).count("a,b[b]it's=") == 2, "in the banner, too"
    assert "finished before" in cli(option("run", run)).out
    assert "finished before" in cli(f"run={run}").out, "as it is, too"
    assert (
        cli(
            f"run={run}", "task=test", "metrics=[acc]", "~callbacks.plots", "trainer.limit_test_batches=1"
        ).status
        == 0
    )
    assert cli(option("run", f"{run.parent}/*-s[0-3]"), "task=test", "out='x, y.json'").status == 0
    assert (tmp_path / "x, y.json").is_file()


def test_names_stay_within_exp_dir(cli, tmp_path: Path) -> None:
    for name in ("../../x", "/x", ".", "..", " ", "a/b", "x" * 300):
        outcome = cli("data=synthetic", "exp_dir=within/it", option("data.module.name", name))
        assert outcome.status == 2 and "data.module.name" in outcome.err, outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_predict_loses_one_row_for_one_image_that_cannot_be_read(cli, tmp_path: Path, monkeypatch) -> None:
    images = tmp_path / "images"
    write_images(images, ["a", "b"], 10)
    data = [
        "data=image_folder",
        f"data.module.data_root_dir={images}",
        "data.input_size=32",
        "data.module.num_workers=0",
    ]
    rest = [a for a in TINY if not a.startswith(("data", "trainer.max"))]
    made = cli(*data, *rest, "trainer.max_steps=1", "trainer.max_epochs=-1", "model.scheduler=null", "seed=0")
    assert made.status == 0, made.err
    (run,) = runs_in(tmp_path)
    new = tmp_path / "new"
    write_images(new, ["."], 5)
    (new / "2.jpg").write_bytes(b"no image")
    (new / "gone.jpg").symlink_to(new / "nowhere")
    (new / "odd\udcff.jpg").symlink_to(new / "0.jpg")
    (new / "=a,\n'.jpg").symlink_to(new / "0.jpg")
    for runs, out in ((f"{run}", "one.csv"), (f"[{run},{run}]", "two.csv")):
        outcome = cli(f"run={runs}", "task=predict", f"data.module.predict_dir={new}", f"out={out}")
        assert outcome.status == 1, outcome.err
        assert "2 of 8 samples could not be read" in outcome.out
        assert "2.jpg" in outcome.out and "gone.jpg" in outcome.out
        with (tmp_path / out).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == 6 and not any(row["sample"] in ("2.jpg", "gone.jpg") for row in rows)
        assert all(float(row["p(a)"]) + float(row["p(b)"]) == pytest.approx(1, abs=1e-4) for row in rows)
    # where nothing can be recorded, the values are said
    monkeypatch.setattr("lab.tasks.why_not_writable", lambda folder: "Read-only file system")
    before = sorted(run.rglob("*"))
    outcome = cli(f"run={run}", "task=test")
    assert outcome.status == 0 and "test/acc" in outcome.out and "not recorded: Read-only" in outcome.out
    assert sorted(run.rglob("*")) == before


def test_a_download_that_cannot_be_leaves_no_folder(cli, tmp_path: Path, monkeypatch) -> None:
    def no_network(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("datasets.cifar.CIFAR10DataModule.source.__init__", no_network)
    (tmp_path / "here").mkdir()
    for root in ("here/typo", "nowhere/cifar10", "data/cifar10"):
        outcome = cli("data=cifar10", f"data.module.data_root_dir={root}")
        assert outcome.status == 2 and f"data_root_dir={root}" in outcome.err, outcome.err
        assert not (tmp_path / root).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]


def test_without_our_bar_there_is_no_other(cli) -> None:
    outcome = cli(
        *[a for a in TINY if "progress" not in a], "callbacks.progress=null", "trainer.limit_train_batches=1"
    )
    assert outcome.status == 0, outcome.err
    assert "Epoch 0" not in outcome.out + outcome.err and "it/s" not in outcome.out + outcome.err


ODD_OPTIONS = {
    "exp_dir": "a,b [b] it's=$#{} Größe",
    "data.module.name": "x,y [ü]",
    "user_dir": "mi,ne [ö]=it's",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            ["trainer.devices=2", "trainer.accelerator=cpu"], id="two devices", marks=pytest.mark.nightly
        ),
        pytest.param(["sweep=submitit", "cluster.executor=local"], id="submitit"),
    ],
)
def test_odd_names_reach_every_process_of_a_sweep(how: list[str], shell, tmp_path: Path) -> None:
    """folder, data, own code and arms: handed to jobs, ranks and submitit, which find and finish what there is"""
    if "sweep=submitit" in how:
        pytest.importorskip("submitit")
    own = tmp_path / ODD_OPTIONS["user_dir"]
    own.mkdir()
    (own / "odd_model.py").write_text(
        "from models.cifar_resnet import CifarResNet\n\n\nclass OddModel(CifarResNet):\n    pass\n"
    )
    named = [option(name, tmp_path / text if "dir" in name else text) for name, text in ODD_OPTIONS.items()]
    command = [
        "-m",
        *TINY,
        *named,
        "model._target_=odd_model.OddModel",
        "trainer.limit_train_batches=1",
        option("arm", "é, [1]='x'"),
        "seed=0,1",
        *how,
    ]
    outcome = shell(*command)
    assert outcome.status == 0 and "2 of 2 runs are finished" in outcome.out, outcome
    runs = runs_in(tmp_path)
    assert {run.parent.name for run in runs} == {"x,y [ü]"} and len(runs) == 2
    assert {RunDirectory(run).summary()["arm"] for run in runs} == {"é, [1]='x'"}
    again = shell(*command)
    assert again.status == 0 and not runs_in(tmp_path)[2:], again


def test_what_a_record_says_was_typed_has_no_folder_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cli_configs").mkdir()
    for name in ("CRUCIBLE", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = "hydra.searchpath=[file:///theirs]"
    for arguments in (["model=resnet", f"user_dir={tmp_path}"], ["model=resnet"], ["model=resnet", own]):
        monkeypatch.setattr(sys, "argv", ["main.py", *command_line.prepare(arguments, ROOT)])
        assert command_line.typed_here() == arguments
