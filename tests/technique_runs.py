"""Techniques in process: composed as on the command line, on a tiny network and the embedded digits."""

from __future__ import annotations

import copy
import re
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from torch.nn import functional as F

from crucible import configuration
from crucible.private import AnyBatchNorm
from crucible.run import RunDirectory
from datasets.digits import DigitsDataModule
from docs.generate import FILES, PAGE, merged, technique_names, technique_settings
from lab.build import build_data, build_model, build_trainer
from lab.config import check, resolve
from lab.teachers import hand_in_teacher
from models.base_model import BaseModel

TECHNIQUES = [name for name in technique_names() if name != "early_stopping"]  # the matrices validate nothing
FOLDERS: dict[str, Path] = {}  # where the files of techniques from a user's folder are


def add_techniques(user_dir: Path) -> None:
    """Put the techniques of a user's folder into every matrix, `pytest --user-dir=FOLDER`."""
    sys.path.insert(1, str(user_dir))
    folder = user_dir / ("cli_configs/technique" if (user_dir / "cli_configs").is_dir() else "technique")
    FOLDERS.update(dict.fromkeys(technique_names(folder), folder))
    TECHNIQUES.extend(FOLDERS)


STEPS = 30
SMALL = [
    "model=resnet", "data=digits", "data.module.batch_size=16", "model.lr=0.01", "model.warmstart=0",
    "trainer.max_epochs=-1", f"trainer.max_steps={STEPS}", "trainer.limit_val_batches=0",
    "trainer.enable_progress_bar=false", "callbacks.progress=null", "callbacks.plots=null", "logger.wandb=null",
]  # fmt: skip
# 8 steps on the same sixteen images: whatever works learns them, also what slows learning down
QUICK = (
    "data.module._target_=technique_runs.SixteenDigits", "trainer.max_steps=8",
    "model.optimizer=AdamW", "model.lr=0.0008", "model.scheduler=null",
)  # fmt: skip


class SixteenDigits(DigitsDataModule):
    """Sixteen training images, each four times; validated on the test split."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.val_dataset = self.test_dataset
        self.train_dataset = self.train_dataset.subset(np.tile(np.arange(16), 4))


def refused_on_the_page() -> dict[tuple[str, str], str]:
    """The pairs that docs/techniques.md lists as refused, each with what its refusal says, whole or in part."""
    refused = {}
    section = PAGE.read_text().split("## Pairs that are refused")[1].split("## ")[0]
    for line in re.findall(r"^- (.*)$", section, re.M):
        if shared := re.fullmatch(r"one of (.*): they set `(\S+)` to different values", line):
            names = re.findall(r"`(\w+)`", shared[1])
            refused |= dict.fromkeys(combinations(sorted(names), 2), f"they set {shared[2]} to")
        else:
            first, second, reason = re.fullmatch(r"`(\w+)` with `(\w+)`: (.*)", line).groups()  # type: ignore[union-attr]
            refused[first, second] = reason
    return refused


def composed(*techniques: str, teacher: Path | None = None, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """The checked configuration of these techniques on the tiny network, merged in their order.

    Args:
        techniques: by name.
        teacher: a run's folder, for distillation.
        options: further overrides.
    """
    config = copy.deepcopy(_without_techniques(options))
    for technique in techniques:
        folder = FOLDERS.get(technique, FILES)
        config = merged(config, technique_settings(technique, folder))
    if "distillation" in techniques:
        config["model"]["teacher"] = str(teacher)
    check(config, [])
    return config


@cache
def _without_techniques(options: tuple[str, ...]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", [*SMALL, *options]))
    config["model"]["_target_"] = "tiny_networks.TinyResNet"
    return config


def built(config: dict[str, Any], folder: Path) -> tuple[BaseModel, Any, Trainer]:
    """Model, data module and trainer of a configuration."""
    data = build_data(config)
    data.check()
    resolve(config, data)
    model = build_model(config)
    hand_in_teacher(model, config)
    callbacks = [instantiate(node, _convert_="all") for node in config["callbacks"].values() if node]
    options = {
        **config["trainer"],
        "enable_checkpointing": False,
    }  # Lightning's own, each epoch of hundreds of runs
    return model, data, build_trainer({**config, "trainer": options}, folder, callbacks, [])


def plain_loss(model: BaseModel, data: Any, by_batch: bool = False) -> float:
    """Plain cross-entropy in eval mode on the first training images, at most 128.

    Args:
        model: built.
        data: its data.
        by_batch: batch norms take the batch's statistics, as running ones have hardly begun after a few steps.
    """
    samples = data.samples("train")
    batch = samples[(0, list(range(min(128, len(samples)))))]
    batch = data.batch_transform(batch, "eval", 0)
    frozen = copy.deepcopy(model.model).eval()
    if by_batch:
        for module in frozen.modules():
            module.train(isinstance(module, AnyBatchNorm))
    with torch.no_grad():
        return float(F.cross_entropy(frozen(batch.input), batch.target))


def train(config: dict[str, Any], folder: Path) -> tuple[float, float]:
    """The plain loss before and after the training."""
    model, data, trainer = built(config, folder)
    steps = config["trainer"]["max_steps"]
    before = plain_loss(model, data, by_batch=steps < STEPS)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == steps
    return before, plain_loss(model, data, by_batch=steps < STEPS)


def make_teacher(folder: Path) -> Path:
    """A recorded run of the tiny network, long enough to have something to teach, for distillation."""
    config = composed(options=(f"trainer.max_steps={10 * STEPS}",))
    model, data, trainer = built(config, folder)
    trainer.fit(model, datamodule=data)
    run = RunDirectory(folder / "teacher")
    run.record(config, [])
    run.update_summary(status="finished")
    trainer.save_checkpoint(run.checkpoints / "last.ckpt")
    return run.path
