"""From a composed configuration to an experiment: examined, identified, and ready to be recorded as a run."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from crucible import configuration, metrics
from crucible.configuration import Config, find_target, flatten, is_semantic
from crucible.corrections import Correction, versions_of
from crucible.files import absolute
from crucible.handover import received
from crucible.loggers import check_loggers
from crucible.machine import device_count, is_child_rank, world_size
from crucible.options import ConfigError, signature_options
from crucible.run import Held, RunDirectory
from datasets.base_datamodule import BaseDataModule
from lab import config as checking
from lab.build import build_data, build_model, build_trainer, file_fingerprint
from lab.config import SWEEP_OPTIONS, model_options, network_options, run_length
from lab.states import check_state
from lab.summary import check_input, check_samples
from lab.teachers import settle_teacher
from models.base_model import BASICS, BaseModel
from models.techniques import technique_kinds

RECOGNISED = (
    "its data were recognised by names and sizes of files: the fingerprint of that time read no pixels"
)


@dataclass(frozen=True)
class Job:
    """A composed configuration that can be run, and the run that it is.

    Args:
        run: its directory, which may not be there yet.
        config: plain, checked and resolved.
        overrides: what was typed.
        facts: what the summary says of it from the start.
        steps: optimizer steps of the whole run, where they can be told.
        epochs: likewise; the last may be a part of one.
    """

    run: RunDirectory
    config: Config
    overrides: Sequence[str]
    facts: Mapping[str, Any]
    steps: float
    epochs: float = math.inf

    def record(self) -> RunDirectory:
        """Write what the run is, unless that has been done; with `fresh` an earlier one is put aside.

        Raises:
            Held: where a live process holds it.
        """
        if is_child_rank():
            return self.run
        with self.run.locked():
            state = self.run.state()
            if state == "running":
                raise Held(f"{self.run.path}: this run is in progress ({self.run.holder()})")
            if state == "absent" or self.config["fresh"]:
                if state != "absent":
                    _archive(self.run)
                # `fresh` is a command, not a fact of the run
                self.run.record({**self.config, "fresh": False}, list(self.overrides))
                now = {"status": "created", "reason": "", "final": {}, "best": {}, "started": time.time()}
                self.run.update_summary(**now, **self.facts)
            elif "data_fingerprint" not in self.run.summary():
                known = {n: self.facts[n] for n in ("data_fingerprint", "classes")}
                self.run.update_summary(**known, recognised=RECOGNISED)
        return self.run


def arm_name(config: Config, overrides: Sequence[str], swept: Collection[str] | None = None) -> str:
    """What this run is called in a comparison: its techniques, and the options that make it differ.

    Args:
        config: plain.
        overrides: what was typed for this run.
        swept: the options that differ between the jobs of a sweep; None: this is no sweep, and the options of
            model and callbacks that were typed make the difference, where they change the result.
    """
    if config["arm"]:
        return str(config["arm"])
    techniques = sorted(t for t in config.get("techniques") or {} if t != "baseline")
    parts = ["+".join(techniques)] if techniques else []
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        named = name.startswith(("model.", "callbacks.")) and is_semantic(name)
        ours = named if swept is None else name in swept
        if ours and name not in ("seed", "technique", "data.module.fold"):
            parts.append(f"{name.removeprefix('model.')}={value}")
    return " ".join(parts) or "baseline"


def _corrections(config: Config) -> list[Correction]:
    """All that stand with what this configuration has."""
    model, module = config["model"], config["data"]["module"]
    owners = [
        *BASICS,
        *technique_kinds(model.get("stages")),
        find_target(model["_target_"], "model._target_"),
        find_target(module["_target_"], "data.module._target_"),
    ]
    own = (correction for owner in owners for correction in getattr(owner, "corrections", ()))
    return [*own, *metrics.CORRECTIONS, *checking.CORRECTIONS]


def corrected(config: Config) -> dict[str, int]:
    """`{option: version}` of the numbers of this configuration that have been corrected."""
    return versions_of(_corrections(config), config)


def check_goes_on(run: RunDirectory, config: Config) -> None:
    """A run that was begun with other numbers does not go on with these: it would be neither.

    Raises:
        ConfigError: saying what has been corrected.
    """
    begun = run.summary().get("corrected") or {}
    for correction in _corrections(config):
        if correction.concerns(config) and begun.get(correction.option, 1) < correction.version:
            raise ConfigError(
                f"run={run.path}: {correction.option} has been corrected since it was begun: {correction.what}; "
                "the command that made it starts it anew",
                see="CHANGELOG.md",
            )


def identity(
    config: Config, contents: Mapping[str, str | None], versions: Mapping[str, int] | None = None
) -> str:
    """Eight hex digits that tell runs with different results apart.

    Hashed are the values that change the result and differ from their defaults, and what the data and the
    initial weights contain, and the versions of corrected numbers. Paths, workers, logging, and new options at
    their default do not change it.

    Args:
        config: plain and resolved.
        contents: fingerprints of what paths lead to: the data, the initial weights or state.
        versions: of corrected numbers; None: those of today.
    """
    semantic = {n: v for n, v in flatten(config).items() if is_semantic(n) and not _is_default(config, n, v)}
    for option in network_options(config["model"]):
        del semantic[f"model.{option}"]  # its content stands for it
    semantic["model._target_"] = config["model"]["_target_"]
    semantic.update({f"content of {name}": value for name, value in contents.items() if value})
    semantic["devices"] = device_count(config["trainer"])
    semantic.pop("trainer.devices", None)
    versions = corrected(config) if versions is None else versions
    semantic.update({f"version of {option}": version for option, version in versions.items()})
    text = json.dumps(semantic, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def kind(config: Config) -> str:
    """Eight hex digits of what a pass of a step costs by: network, data, batch, precision, and whether compiled."""
    target = find_target(config["model"]["_target_"], "")
    own = set(signature_options(target)) - set(signature_options(BaseModel))
    of_the_cost = {
        n: v
        for n, v in flatten(config).items()
        if is_semantic(n)
        and (
            n.startswith("data.")
            or n in ("trainer.precision", "trainer.devices")
            or n.removeprefix("model.") in own
        )
        and not n.startswith("data.module.fold")
    }
    if config["model"].get("compile"):
        of_the_cost["model.compile"] = True
    text = json.dumps({"model": config["model"]["_target_"], **of_the_cost}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def passes(config: Config) -> float:
    """Forward and backward passes of a step, on average, with the techniques of a configuration."""
    techniques = checking.step_of(config).setting.techniques.values()
    return 1 + sum(technique.passes - 1 for technique in techniques if technique.on)


def _is_default(config: Config, name: str, value: Any) -> bool:
    if value is None:
        return True
    room, _, option = name.partition(".")
    if room == "model":
        if option == "stages":
            return not value
        known = model_options(find_target(config["model"]["_target_"], ""), config["model"].get("stages"))
        return option in known and known[option][1] == value
    if room == "trainer":
        default = signature_options(Trainer).get(option, (None, None))[1]
        return value == default or (default is None and value is False)
    if name.startswith("data.module."):
        known = signature_options(find_target(config["data"]["module"]["_target_"], ""))
        option = option.removeprefix("module.")
        return option in known and known[option][1] == value
    return name == "reproducible" and value is False


@dataclass
class Examiner:
    """Examines composed configurations; what the jobs of a sweep have in common, once for all of them."""

    _data: dict[str, tuple[BaseDataModule, str]] = field(default_factory=dict)
    _constructed: set[str] = field(default_factory=set)

    def examine(
        self, composed: DictConfig, overrides: Sequence[str], swept: Collection[str] | None = None
    ) -> Job:
        """Check and resolve a composed configuration, and find the run that it is. Nothing is written.

        Args:
            composed: by Hydra.
            overrides: what was typed for it.
            swept: the options that differ between the jobs, where it is one of a sweep.

        Raises:
            ConfigError: for whatever cannot run.
        """
        config = configuration.to_plain(composed)
        for option in SWEEP_OPTIONS:
            config.pop(option)
        checking.check(config, overrides)
        if config["task"] != "train":
            raise ConfigError(
                f"task={config['task']} works on a recorded run: python main.py run=RUN task={config['task']}",
                "README.md",
            )
        _check_torchrun(config)
        data, fingerprint = self._read_data(config)
        settled = [*checking.resolve(config, data), *data.remarks]
        checking.check(config, overrides)
        contents: dict[str, str | None] = {"data": fingerprint}
        for option, room, key in (
            ("model.init_from", config["model"], "init_from"),
            ("ckpt_path", config, "ckpt_path"),
        ):
            if room[key] is not None:
                contents[option] = file_fingerprint(option, room[key])
                room[key] = str(Path(room[key]).expanduser().resolve())
        for option in network_options(config["model"]):
            config["model"][option], contents[f"model.{option}"] = settle_teacher(config)
        self._construct(config, data)
        folder = Path(config["exp_dir"]).expanduser().resolve() / config["data"]["module"]["name"]
        name = f"{identity(config, contents)}-s{config['seed']}"
        if not (folder / name).exists() and (older := data.fingerprint(1)) != fingerprint:
            before = f"{identity(config, {**contents, 'data': older})}-s{config['seed']}"
            known = RunDirectory(folder / before).summary().get("data_fingerprint", fingerprint)
            if (folder / before).exists() and known == fingerprint:
                name = before
        if config["user_dir"]:
            config["user_dir"] = absolute(config["user_dir"])
        for key in ("data_root_dir", "predict_dir"):
            if (path := config["data"]["module"].get(key)) is not None:
                config["data"]["module"][key] = absolute(path)
        facts = {
            "run_id": name, "identity": name.rpartition("-")[0], "seed": config["seed"],
            "data": config["data"]["module"]["name"], "arm": arm_name(config, overrides, swept),
            "techniques": sorted(config.get("techniques") or {}), "kind": kind(config), "resolved": settled,
            "corrected": corrected(config), "data_fingerprint": fingerprint, "classes": data.class_names,
            "passes": passes(config),
        }  # fmt: skip
        if (sweep := received().sweep) is not None:  # this process is a sweep's job on another machine
            facts["sweep"] = sweep
        length = run_length(config, data)
        return Job(RunDirectory(folder / name), config, overrides, facts, length.steps, length.epochs)

    def _read_data(self, config: Config) -> tuple[BaseDataModule, str]:
        """The data module and the fingerprint of its data; read once for all jobs with the same data."""
        key = _but_for_the_seed(config["data"]["module"])
        if key not in self._data:
            data = build_data(config)
            data.check()
            self._data[key] = data, data.fingerprint()
        data, fingerprint = self._data[key]
        return copy.copy(data), fingerprint  # the batch size may be settled on the copy

    def _construct(self, config: Config, data: BaseDataModule) -> None:
        """What only the constructors can refuse is refused now, once for all seeds of an arm."""
        of_the_data = {k: v for k, v in config["data"].items() if k != "module"}
        start = {"ckpt_path": config["ckpt_path"], "of seed": config["ckpt_path"] and config["seed"]}
        key = _but_for_the_seed(
            config["model"], of_the_data, config["data"]["module"], config["trainer"], config["logger"], start
        )
        if key in self._constructed:
            return
        model = build_model(config, load=False, compile=False)
        check_input(model, config)
        check_samples(model, config, data)
        if config["ckpt_path"]:
            check_state(config, model, data)
        check_loggers(config["logger"])
        with quiet_lightning():
            build_trainer(config, Path(config["exp_dir"]), [], [])
        self._constructed.add(key)


def _but_for_the_seed(*nodes: Mapping[str, Any]) -> str:
    """What jobs share that differ by their seed only."""
    return json.dumps([{k: v for k, v in node.items() if k != "seed"} for node in nodes], default=str)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without what Lightning says of a trainer that only has to be built, or to evaluate."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _check_torchrun(config: Config) -> None:
    """A launcher that starts the ranks itself must start as many as the configuration asks for."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = world_size(config["trainer"])
    if world != wanted:
        raise ConfigError(
            f"trainer.devices={config['trainer']['devices']}, trainer.num_nodes={config['trainer']['num_nodes']}: "
            f"torchrun started {world} processes, these options ask for {wanted}"
        )


def _archive(run: RunDirectory) -> None:
    number = 1
    while (old := run.path.with_name(f"{run.path.name}.old-{number}")).exists():
        number += 1
    run.path.rename(old)
