"""Every technique on every family of networks: it changes something, or it is refused by the name of its option."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import ROOT, nightly, write_images
from hydra.utils import instantiate
from small_models import FAMILIES, SIZE, small

from crucible import configuration
from crucible.command_line import describe
from lab.build import build_data, build_model, build_trainer
from lab.config import check, resolve
from lab.summary import check_input
from lab.teachers import hand_in_teacher

TECHNIQUES = {
    file.stem: yaml.safe_load(file.read_text())
    for file in sorted((ROOT / "cli_configs" / "technique").glob("*.yaml"))
    if file.stem not in ("baseline", "early_stopping")  # which acts after several validations: its own tests
}
CLASSES = ["a", "b", "c", "d"]
FEW_STEPS = [
    "data.module.batch_size=4", "data.module.val_split=0.2", "data.module.num_workers=0", "data.num_classes=4",
    "model.lr=0.01", "model.warmstart=0", "trainer.max_epochs=1", "trainer.limit_val_batches=1",
    "trainer.precision=32-true", "trainer.enable_progress_bar=false", "callbacks.progress=null",
    "callbacks.plots=null", "logger.wandb=null", "metrics=[acc]",
]  # fmt: skip
# what would show only after more steps or in larger batches, and rates that some families have of their own
BROUGHT_FORWARD: dict[str, dict[str, Any]] = {
    "activation": {"model.activation": "mish"},
    "class_weights": {"model.class_weights": [2.0, 3.0, 4.0, 5.0]},  # the folder has classes of one size
    "dropout": {"model.resnet_dropout": 0.37},
    "ghost_norm": {"model.norm_kwargs.ghost_size": 2},
    "gradient_clipping": {"trainer.gradient_clip_val": 0.01},
    "lookahead": {"model.lookahead_k": 1},
    "random_erasing": {"model.random_erasing": 1.0},
    "sam_every_5": {"model.sam_every": 1},
    "stochastic_depth": {"model.stochastic_depth": 0.6},
    "swa": {"model.swa_start": 0.0},
}

STEPS = {
    "resnet18_wobn": 3
}  # its head and branches start at zero, so that at first nothing reaches the weights
PART_OF_THE_FAMILY = {  # on in its own file
    ("se_resnet", "squeeze_excitation"), ("lip_resnet", "zero_init_residual"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CIFAR-like data set of 40 images, and a teacher's weights."""
    root = tmp_path_factory.mktemp("no_silent_noop")
    for split, count in (("train", 8), ("test", 2)):
        write_images(root / split, CLASSES, count, (SIZE, SIZE))
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=len(CLASSES))
    torch.save(teacher.state_dict(), root / "teacher.pt")
    return root


def merged(config: Any, changes: Any) -> Any:
    """`config` with the values of `changes`, as Hydra merges a later file."""
    if isinstance(config, Mapping) and isinstance(changes, Mapping):
        return {
            k: merged(config.get(k), changes[k]) if k in changes else config[k] for k in {**config, **changes}
        }
    return changes


def configured(family: str, technique: str, folder: Path) -> dict[str, Any]:
    config = small(family, *FEW_STEPS, f"data.module.data_root_dir={folder}")
    config["trainer"]["limit_train_batches"] = STEPS.get(family, 1)
    if technique == "baseline":
        return config
    overrides = dict(BROUGHT_FORWARD.get(technique, {}))
    if technique == "distillation":
        overrides["model.teacher"] = f"timm:test_resnet@{folder / 'teacher.pt'}"
    config = merged(config, TECHNIQUES[technique])
    for name, value in overrides.items():
        room, _, option = name.rpartition(".")
        configuration.select(config, room)[option] = value
    check(config, [f"{name}=" for name in overrides])
    return config


def outcome(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the steps, and what was recorded."""
    data = build_data(config)
    data.check()
    resolve(config, data)
    model = build_model(config)
    hand_in_teacher(model, config)
    callbacks = [instantiate(node, _convert_="all") for node in config["callbacks"].values() if node]
    config["trainer"]["enable_checkpointing"] = False  # hundreds of runs' weights would fill a disk
    trainer = build_trainer(config, folder, callbacks, [])
    try:
        trainer.fit(model, datamodule=data)
    except (ValueError, RuntimeError):
        check_input(model, config)  # what the command line has refused before
        raise
    assert trainer.global_step == config["trainer"]["limit_train_batches"]
    recorded = {f"recorded {name}": value for name, value in trainer.callback_metrics.items()}
    return {**model.model.state_dict(), **recorded}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("share", ["a twelfth", *nightly("all")])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_technique_has_an_effect_or_is_refused(family: str, share: str, folder: Path) -> None:
    """A twelfth: a family meets every twelfth technique, a technique at least one family."""
    baseline = outcome(configured(family, "baseline", folder), folder)
    assert not differ(baseline, outcome(configured(family, "baseline", folder), folder)), (
        "runs repeat exactly"
    )
    silent, unnamed = [], []
    for place, (technique, content) in enumerate(TECHNIQUES.items()):
        if (family, technique) in PART_OF_THE_FAMILY:
            continue
        if share == "a twelfth" and (place - FAMILIES.index(family)) % 12:
            continue
        try:
            if not differ(baseline, outcome(configured(family, technique, folder), folder)):
                silent.append(technique)
        except Exception as error:
            refusal, _ = describe(error)
            if refusal is None:
                raise
            if not any(option in refusal for option in content["techniques"][technique]):
                unnamed.append(f"{technique}: {refusal}")
    assert not silent, "no effect and no word of it"
    assert not unnamed, "refused without the name of an option that the technique sets"


def test_what_is_brought_forward_is_there() -> None:
    assert BROUGHT_FORWARD.keys() <= TECHNIQUES.keys()
