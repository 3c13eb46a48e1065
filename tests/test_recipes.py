"""Every recipe composes with its own command, keeps its settings, says what it reproduces, and trains."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, nightly, write_images
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch import Callback, Trainer
from small_models import SMALL
from technique_runs import built

from benchmarks.recipes import row
from crucible import configuration
from crucible.configuration import select
from crucible.options import read_options
from docs.reproducing_page import FAMILIES, PAGE, RECIPES, Recipe, measured, recipes, reproducing_page
from lab.config import check
from optimizers.schedules import ScheduleOptions, schedule, training_length

KNOWN = recipes()
NAMES = [recipe.name for recipe in KNOWN]
STEPS = 2
CLASSES = 4
# what the small network of a recipe needs besides its family's, and one setting that needs GPUs
SMALLER = {
    "cifar/pyramidnet110": ["model.depth=11"],
    "cifar/pyramidnet272": ["model.depth=11"],
    "model_zoo/sync_bn": ["trainer.sync_batchnorm=false"],
}


def jobs(command: str) -> list[list[str]]:
    """The overrides of the jobs of a command; of a sweep so many that each swept value appears."""
    program, *arguments = shlex.split(command)[1:]
    assert (program, shlex.split(command)[0]) == ("main.py", "python")
    swept = []
    for override in OverridesParser.create().parse_overrides([a for a in arguments if a != "-m"]):
        if override.is_sweep_override():
            assert arguments[0] == "-m", command
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_element_as_str()]
        swept.append([f"{override.key_or_group}={value}" for value in values])
    rows = zip_longest(*swept)
    return [[a or choices[0] for a, choices in zip(row, swept, strict=True)] for row in rows]


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        return configuration.to_plain(compose("train", list(overrides)))


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """`{dotted name: value}` of nested mappings."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, n in node.items() for k, v in leaves(n, f"{prefix}.{name}".lstrip(".")).items()}


def settings(name: str) -> dict[str, Any]:
    """What a recipe file and those it builds on set, by dotted name; the file's own win."""
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    bases = [d.removeprefix("/recipe/") for d in content.pop("defaults", []) if "/recipe/" in d]
    return {**{k: v for base in bases for k, v in settings(base).items()}, **leaves(content)}


@pytest.mark.parametrize("recipe", KNOWN, ids=lambda r: r.name)
def test_a_recipe_composes_by_its_commands_and_keeps_its_settings(recipe: Recipe) -> None:
    assert recipe.commands
    for command in recipe.commands:
        assert f"recipe={recipe.name}" in shlex.split(command)
        for overrides in jobs(command):
            config = _composed(tuple(overrides))
            check(config, overrides)
            typed = {o.split("=")[0] for o in overrides}
            for name, value in settings(recipe.name).items():
                assert name in typed or select(config, name) == value, f"{command}: {name}"


def under(debug: str, config: dict[str, Any]) -> dict[str, Any]:
    """A composed configuration with what a file of cli_configs/debug sets."""
    content = yaml.safe_load((ROOT / "cli_configs" / "debug" / f"{debug}.yaml").read_text())

    def merged(node: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        return node | {
            k: merged(node[k], v) if isinstance(v, dict) and k in node else v for k, v in more.items()
        }

    return merged(config, content)


def rates(config: dict[str, Any]) -> list[float]:
    """The factors of the first two epochs, and what is refused of the schedule."""
    trainer = config["trainer"]
    length = training_length(trainer["max_epochs"], trainer["max_steps"], 2)
    return [schedule(read_options(ScheduleOptions, config["model"]), length)(epoch) for epoch in (0.0, 1.0)]


@pytest.mark.parametrize("recipe", KNOWN, ids=lambda r: r.name)
def test_every_recipe_has_its_own_first_steps_under_two_steps(recipe: Recipe) -> None:
    """Whatever milestones, warm-up and cool-down it has: the length is the recipe's, and a callback ends it."""
    overrides = jobs(recipe.commands[0])[0]
    whole = _composed(tuple(overrides))
    for debug in ("two_steps", "profile", "overfit"):
        config = under(debug, whole)
        check(config, overrides)
        if debug == "overfit":
            assert rates(config) == [1.0, 1.0]
        else:
            assert rates(config) == rates(whole)
            assert config["callbacks"]["end"]["epochs"] == 1


def test_a_debugged_recipe_ends_after_an_epoch_of_two_steps(cli, tmp_path: Path) -> None:
    """Milestones at 100 to 200 of 250 epochs; the first epoch at its full rate, then the test."""
    outcome = cli(
        "recipe=online_norm/cifar10_batch", "debug=two_steps", "data=synthetic", "model.depth=8",
        "data.module.batch_size=8", "logger.wandb=null", "callbacks.plots=null",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (run,) = tmp_path.glob("experiments/*/*/summary.json")
    summary = json.loads(run.read_text())
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("finished", 1, 2)
    assert "test/acc" in summary["final"]
    assert "epoch 1 of 250" in outcome.out and "lr 0.1" in outcome.out


@pytest.mark.parametrize("recipe", KNOWN, ids=lambda r: r.name)
def test_the_header_says_what_to_reach_and_with_what(recipe: Recipe) -> None:
    for part in (recipe.description, recipe.source, recipe.published, recipe.hardware, recipe.differs):
        assert part.endswith((".", ".)")) and "|" not in part
    assert "%" in recipe.published or recipe.published.startswith(("not found", "none of its own"))
    assert recipe.family in FAMILIES


def test_a_technique_wins_over_the_recipe_and_what_is_typed_over_both() -> None:
    row = "recipe=powergrad/resnet50_cosine_powergrad"
    assert _composed((row,))["model"]["powergrad_alpha"] == 0.3
    both = ("recipe=powergrad/resnet18_cosine_powergrad", "technique=[powergrad,mixup]")
    assert _composed(both)["model"]["powergrad_alpha"] == 0.3  # the recipe's is 0.25
    assert _composed(both)["model"]["mixup"]
    assert _composed((*both, "model.powergrad_alpha=0.5"))["model"]["powergrad_alpha"] == 0.5
    assert _composed((row, "data=cifar10"))["data"]["num_classes"] == 10


def test_rows_that_build_on_one_another_differ_in_what_their_table_says() -> None:
    def difference(a: str, b: str) -> dict[str, Any]:
        before, after = (leaves(_composed((f"recipe={name}",))) for name in (a, b))
        return {k: v for k, v in after.items() if before.get(k) != v}

    assert difference("powergrad/resnet101_cosine", "powergrad/resnet101_cosine_powergrad") == {
        "model.powergrad_alpha": 0.3
    }
    assert difference("model_zoo/resnet50", "model_zoo/zero_gamma") == {"model.zero_init_residual": True}
    assert difference("bag_of_tricks/efficient_jitter", "bag_of_tricks/all_tricks") == {
        "model.mixup": True, "model.label_smoothing": 0.1, "trainer.max_epochs": 200,
    }  # fmt: skip
    assert difference("online_norm/cifar10_batch", "online_norm/cifar10_online") == {
        "model.norm": "online",
        "model.norm_kwargs.alpha_fwd": 1023 / 1024,
        "model.norm_kwargs.alpha_bkw": 127 / 128,
    }


@pytest.mark.slow
def test_the_rows_of_power_grad_have_its_schedule_as_run_and_its_evaluation() -> None:
    bicubic = {
        "resnet50",
        "resnet101",
        "seresnet18",
        "seresnet50",
    }  # of the fork's default_cfgs; the others bilinear
    for name in (n for n in NAMES if n.startswith("powergrad/")):
        config = _composed((f"recipe={name}",))
        length = config["trainer"]["max_epochs"]
        factor = schedule(read_options(ScheduleOptions, config["model"]), length)
        found = [round(factor(e), 3) for e in (0, 1, 2, 5, 29, 30, 59, 60, 88, 89)]
        if "_step" in name:
            assert (length, found) == (90, [0.1, 0.46, 0.64, 1.0, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])
        else:
            assert (length, found) == (100, [0.1, 0.46, 0.64, 0.989, 0.75, 0.735, 0.251, 0.236, 0.001, 0.001])
        filter = config["data"]["module"]["test_transforms"].get("interpolation", "bilinear")
        assert (filter == "bicubic") == (name.split("/")[1].split("_")[0] in bicubic), name
    assert _composed(("recipe=powergrad/resnet18_wobn_cosine",))["model"]["norm"] == "none"


def test_the_page_is_the_generated_one_and_measurements_belong_to_recipes() -> None:
    assert PAGE.read_text() == reproducing_page(), "run python -m docs.generate"
    assert set(measured()) <= set(NAMES)
    for name in NAMES:
        assert PAGE.read_text().count(f"[`{name}`]") == 1


TABLE = ROOT / "benchmarks" / "results" / "recipes.md"


def test_the_table_of_recipes_has_each_with_what_its_header_says() -> None:
    rows = {line.split("`")[1]: line for line in TABLE.read_text().splitlines() if line.startswith("| `")}
    assert list(rows) == NAMES, "run python benchmarks/recipes.py --out benchmarks/results/recipes.md"
    for recipe in KNOWN:
        said = f"| {recipe.published} | {recipe.differs} | {recipe.source} |"
        assert rows[recipe.name].endswith(said), "run python benchmarks/recipes.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [r if r.name in ("cifar/resnet50", "cifar/vgg16") else nightly(r)[0] for r in KNOWN],
    ids=lambda r: r.name,
)
def test_the_table_of_recipes_has_the_network_and_the_settings_that_are_run(recipe: Recipe) -> None:
    assert row(recipe) in TABLE.read_text().splitlines(), "run python benchmarks/recipes.py"


@pytest.mark.slow
def test_the_rows_of_cifar_take_the_pictures_and_batches_of_their_repository() -> None:
    """What its code says of each row: mean and deviation, operations, the last batch, the head, precision."""
    for name in (n for n in NAMES if n.startswith("cifar/")):
        config = _composed((f"recipe={name}", "data=cifar100", "data.module.train_transforms.cutout_size=8"))
        module, model = config["data"]["module"], config["model"]
        for role in ("train_transforms", "test_transforms"):
            assert module[role]["mean"] == [0.4914, 0.4822, 0.4465]
            assert module[role]["std"] == [0.2023, 0.1994, 0.2010]
        training = module["train_transforms"]
        assert (training["operations"], training["fill"], training["cutout_size"]) == ("deepvoltaire", 128, 8)
        assert training.get("prob") == (0.5 if "RandAugment" in training["_target_"] else None)
        assert (module["drop_last"], module["batch_size"], model["head_std"]) == (False, 128, 0.001)
        assert config["trainer"]["precision"] == ("32-true" if model["sam"] else None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small JPEGs in the folders that the CIFAR and the ImageNet module read."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 4), ("test", 1), ("val", 1)):
        write_images(root / split, [f"c{n}" for n in range(CLASSES)], count, size=(32, 32))
    return root


class StopEarly(Callback):
    """Ends a training after a few steps; its length, and so its schedule, stay the recipe's."""

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        trainer.should_stop = trainer.global_step >= STEPS


def _first_of_each_kind() -> set[str]:
    """The first recipe of each work and network; the others differ from one of them in values."""
    kinds: dict[tuple[str, str], str] = {}
    for recipe in KNOWN:
        model = next((a for a in shlex.split(recipe.commands[0]) if a.startswith("model=")), "")
        kinds.setdefault((recipe.name.split("/")[0], model), recipe.name)
    return set(kinds.values())


FIRST = _first_of_each_kind()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [r if r.name in FIRST else nightly(r)[0] for r in KNOWN], ids=lambda r: r.name
)
def test_a_recipe_trains(recipe: Recipe, images: Path, tmp_path: Path) -> None:
    """Two steps with all of its options, on four classes of tiny images and a small network of its family."""
    overrides = [o for o in jobs(recipe.commands[0])[0] if not o.startswith("model.init_from=")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        choices = compose("train", overrides, return_hydra_config=True).hydra.runtime.choices
    small = [
        *overrides, *SMALL.get(choices["model"], []), *SMALLER.get(choices["model"], []),
        *SMALLER.get(recipe.name, []), "trainer.devices=1", "seed=0",
        f"data.module.data_root_dir={images}", f"data.num_classes={CLASSES}", "data.input_size=32",
        "data.module.num_workers=0", "data.module.batch_size=8",
        "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false", "callbacks.progress=null",
        "callbacks.plots=null", "logger.wandb=null", "metrics=[acc]",
    ]  # fmt: skip
    if choices["data"] == "imagenet_sin":
        small.append(f"data.module.stylized_root_dir={shutil.copytree(images, tmp_path / 'stylized')}")
    config = _composed(tuple(small))
    model, data, trainer = built(config, tmp_path)
    before = [p.detach().clone() for p in model.model.parameters()]
    trainer.callbacks.append(StopEarly())
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == STEPS
    after = list(model.model.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
