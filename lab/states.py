"""A training state that a run starts from: its own (`find_state`), or `ckpt_path=FILE`, tried before it has a folder.

The state gives the weights and averages, the optimizer's moments, the counters (epoch, batch, step), and the streams
and gradients that were under way. The configuration gives all that is typed: rate and schedule, weight decay and
every other argument of the optimizer, lengths, techniques, data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crucible import sealed
from crucible.configuration import Config
from crucible.console import epoch_named
from crucible.machine import world_size
from crucible.options import ConfigError
from crucible.run import RunDirectory
from datasets.base_datamodule import BaseDataModule
from datasets.sampling import batches_within, training_batches
from lab.build import build_model, whole_beside
from models.base_model import BaseModel
from optimizers import build_optimizer
from optimizers.accumulation import window_problem

_NEEDED = ("state_dict", "loops", "optimizer_states", "lr_schedulers")


def check_state(config: Config, model: BaseModel, data: BaseDataModule) -> None:
    """Refuse a `ckpt_path` from which this configuration cannot train on.

    Args:
        config: plain and resolved.
        model: built of it; its weights are used up.
        data: of it.

    Raises:
        ConfigError: for a file that is no training state of ours, another network or optimizer, other groups of
            parameters, a training that has come to its end, other batches inside an epoch.
    """
    path = config["ckpt_path"]
    state = _read(path)
    _check_length(config, state)
    _check_network(path, model, state["state_dict"])
    _check_place(config, data, state)
    _check_average(path, model, state)
    _check_optimizer(path, model, state["optimizer_states"])


def _read(path: str) -> Mapping[str, Any]:
    weights = f"model.init_from={path} starts from the weights of such a file"
    try:
        content = sealed.read(Path(path))
    except sealed.Damaged as error:
        raise ConfigError(
            f"ckpt_path={path}: it {error}; {whole_beside(Path(path)) or weights}", "docs/training.md"
        ) from error
    if missing := _missing(content):
        raise ConfigError(
            f"ckpt_path={path}: no training state of Crucible, it has no {missing}; {weights}",
            "docs/training.md",
        )
    return content


def _missing(content: Mapping[str, Any]) -> str:
    return ", ".join(name for name in _NEEDED if name not in content)


def find_state(run: RunDirectory, config: Config) -> tuple[Path | None, str]:
    """The state that an unfinished run goes on from, None for the beginning, and what is to be said of the choice.

    It is last.ckpt; where that is not to be believed previous.ckpt, then best.ckpt.

    Raises:
        ConfigError: where the run has checkpoints and none of them can be gone on from.
    """
    problems: dict[str, str] = {}
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        file = run.checkpoints / name
        problem, place = _problem(file, run, config)
        if not problem:
            return file, f"{_listed(problems)}: the run goes on from {name}, {place}" if problems else ""
        problems[name] = problem
    if any(problem != "is missing" for problem in problems.values()):
        raise ConfigError(
            f"run={run.path}: no checkpoint to go on from, {_listed(problems)}; nothing was changed; fresh=true "
            "with the command that made the run puts this folder aside and starts anew",
            "docs/training.md",
        )
    start = None if config["ckpt_path"] is None else Path(config["ckpt_path"])
    if start is not None:
        _read(str(start))
    rows = len(run.metrics())
    if rows > config["checkpoint"]["every"]:  # else it was killed between its first row and its first state
        begin = "the beginning" if start is None else str(start)
        return (
            start,
            f"metrics.csv has {rows} epochs, but there is no checkpoint: the run starts again from {begin}",
        )
    return start, ""


def _listed(problems: Mapping[str, str]) -> str:
    """What is wrong with the files; those that are missing are said where they are due."""
    return ", ".join(f"{n} {p}" for n, p in problems.items() if n == "last.ckpt" or p != "is missing")


def _problem(file: Path, run: RunDirectory, config: Config) -> tuple[str, str]:
    """Why a run cannot go on from a file of its own, or an empty text; and where in the training it stands."""
    try:
        state = sealed.read(file)
    except sealed.Damaged as error:
        return str(error), ""
    if missing := _missing(state):
        return f"is no training state of Crucible (it has no {missing})", ""
    own, its = run.summary().get("run_id"), state.get("run")
    if own and its and own != its:
        return f"is a state of another run ({its})", ""
    if not its and (
        other := _difference(build_model(config, load=False, compile=False), state["state_dict"])
    ):
        return f"is the state of another network ({other})", ""
    return "", f"{_said(config, *_place(state))}, step {state['global_step']}"


def _said(config: Config, epochs: int, batches: int) -> str:
    """Where in the training a state stands, as people are told."""
    trainer = config["trainer"]
    length = trainer["max_epochs"] if (trainer["max_epochs"] or -1) > 0 else math.inf
    if batches:
        return f"{epoch_named(epochs, length)}, after {batches} of its batches"
    return f"after {epoch_named(epochs - 1, length)}" if epochs else "the beginning"


def _place(state: Mapping[str, Any]) -> tuple[int, int]:
    """The epochs that lie behind a state, and the batches of the one after."""
    loops = state["loops"]["fit_loop"]
    epoch, batch = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    if epoch["started"] == epoch["processed"]:
        return epoch["processed"], 0
    done = loops["epoch_loop.batch_progress"]["is_last_batch"] and batch["processed"] == batch["ready"]
    return (epoch["started"], 0) if done else (epoch["processed"], batch["processed"])


def _check_length(config: Config, state: Mapping[str, Any]) -> None:
    trainer, path = config["trainer"], config["ckpt_path"]
    epochs, steps = _place(state)[0], state["global_step"]
    for option, done, unit in (("max_epochs", epochs, "epochs"), ("max_steps", steps, "steps")):
        wanted = trainer[option]
        if wanted is not None and 0 < wanted <= done:
            raise ConfigError(
                f"trainer.{option}={wanted}: ckpt_path={path} has {done} {unit} behind it, which count; "
                f"more than {done} train on from there",
                "docs/training.md",
            )


def _check_network(path: str, model: nn.Module, saved: Mapping[str, Any]) -> None:
    if difference := _difference(model, saved):
        raise ConfigError(
            f"ckpt_path={path}: the state of another network, {difference}; "
            f"model.init_from={path} starts from the weights that fit",
            "docs/training.md",
        )


def _difference(model: nn.Module, saved: Mapping[str, Any]) -> str:
    """The first tensor that a state and a model do not have alike."""
    own = model.state_dict()
    names = [*(n for n in own if n not in saved), *(n for n in saved if n not in own)]
    names += [n for n in own if n in saved and own[n].shape != saved[n].shape]
    if not names:
        return ""
    there, here = (
        "x".join(map(str, part[names[0]].shape)) or "a number" if names[0] in part else "absent"
        for part in (saved, own)
    )
    return f"{names[0]} is {there} in it and {here} here"


def _check_place(config: Config, data: BaseDataModule, state: Mapping[str, Any]) -> None:
    """Inside an epoch the rest of it must be what is left: the same samples in the same order and batches."""
    epoch, batch = _place(state)
    if not batch:
        return
    path, trainer, module = config["ckpt_path"], config["trainer"], config["data"]["module"]
    where = f"ckpt_path={path} lies inside {epoch_named(epoch)}, after {batch} batches"
    place = state.get(type(data).__qualname__)
    if place is None:
        raise ConfigError(f"data.module._target_={module['_target_']}: {where} of other data")
    samples, whole = len(data.samples("train")), data.batch_size * world_size(trainer)
    if (place["samples"], place["global_batch_size"]) != (samples, whole):
        raise ConfigError(
            f"data.module.batch_size={data.batch_size}: {where} of {place['global_batch_size']} out of "
            f"{place['samples']} samples; here are {samples} samples in batches of {whole}"
        )
    if place.get("seed", config["seed"]) != config["seed"]:
        raise ConfigError(f"seed={config['seed']}: {where} in the order of seed {place['seed']}")
    batches = training_batches(samples, data.batch_size, world_size(trainer), data.drop_last)
    if batch >= batches:  # the state's epoch has one more
        dropped = str(data.drop_last).lower()
        raise ConfigError(f"data.module.drop_last={dropped}: {where}; here are {batches} in an epoch")
    name = "overfit_batches" if trainer.get("overfit_batches") else "limit_train_batches"
    if batch >= (left := batches_within(batches, trainer.get(name))):
        raise ConfigError(f"trainer.{name}={trainer[name]}: {where}; here are {left} in an epoch")
    if (window := state.get("accumulation")) is not None:
        problem = window_problem(window, trainer["accumulate_grad_batches"], str(trainer["precision"]))
        if problem and not _sets_accumulation(config):
            raise ConfigError(f"{problem} (ckpt_path={path})")


def _sets_accumulation(config: Config) -> bool:
    targets = [node.get("_target_", "") for node in config["callbacks"].values() if isinstance(node, Mapping)]
    return any(target.endswith("GradientAccumulationScheduler") for target in targets)


def _check_average(path: str, model: BaseModel, state: Mapping[str, Any]) -> None:
    saved = state.get("average_kind")
    for own in (getattr(weights, "kind", "") for weights in model.step.weights):
        if saved is not None and saved != own and state.get("average_updates"):
            raise ConfigError(
                f"model: the average of the weights in ckpt_path={path} is an {saved}, this run's an {own}; "
                f"model.init_from={path} starts a new one"
            )


def _check_optimizer(path: str, model: BaseModel, states: list[dict[str, Any]]) -> None:
    """The optimizer of the configuration takes the state, and a step with it for one tensor of each group."""
    options = model.optimizer_options
    try:
        optimizer = build_optimizer(model, options, model.step.groups)
        for attach in model.step.optimizer:
            attach(model, optimizer)
        optimizer.load_state_dict(states[0])
        for group in optimizer.param_groups:
            first = min(group["params"], key=torch.Tensor.numel)
            first.grad = torch.zeros_like(first)
        with torch.no_grad():
            optimizer.step(lambda: 0.0)
    except ConfigError as error:
        raise ConfigError(f"{error.args[0]} (ckpt_path={path})", "docs/training.md") from error
    except Exception as error:  # an optimizer that misses something in its state says so in words of its own
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ConfigError(
            f"model.optimizer={options.optimizer}: it cannot go on with the moments in ckpt_path={path} ({reason}); "
            "model.optimizer_kwargs and the optimizer must be as they were",
            "docs/training.md",
        ) from error
