"""The stages of a training step as a model assembles them from values of `model.*`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from crucible.options import read_options
from crucible.technique import Setting, Step, assemble, read_techniques
from losses import evaluation_criterion
from models.techniques import TECHNIQUES
from optimizers import OptimizerOptions, build_optimizer


def assembled(setting: Setting | None = None, **values: Any) -> Step:
    """The step that all techniques make of these values."""
    setting = setting or Setting()
    return assemble(read_techniques(TECHNIQUES, values), setting, evaluation_criterion(setting.task))  # type: ignore[arg-type]


def optimizer_of(module: nn.Module, **values: Any) -> Optimizer:
    """The optimizer of `module` for these values, with what techniques add."""
    step = assembled(**values)
    optimizer = build_optimizer(module, read_options(OptimizerOptions, values), step.groups)
    for attach in step.optimizer:
        attach(module, optimizer)
    return optimizer
