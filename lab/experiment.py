"""From a composed configuration to an experiment: examined, identified, and ready to be recorded as a run."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from crucible import configuration, metrics, trust
from crucible.configuration import Config, find_target, flatten, is_semantic
from crucible.console import say
from crucible.corrections import Correction, versions_of
from crucible.files import absolute, why_not_writable
from crucible.handover import received
from crucible.loggers import check_loggers
from crucible.machine import device_count, is_child_rank
from crucible.masking import check_no_secret, masked
from crucible.options import ConfigError, check_value, signature_options
from crucible.run import Damaged, Held, RunDirectory
from datasets.base_datamodule import BaseDataModule
from lab import config as checking
from lab.build import build_callback, build_data, build_model, build_trainer, file_fingerprint
from lab.config import ROOT_TYPES, SWEEP_OPTIONS, TASK_OPTIONS, model_options, network_options, run_length
from lab.recorded import completed
from lab.states import check_state
from lab.summary import check_input, check_reproducible, check_samples, check_smallest_batch
from lab.teachers import settle_teacher
from models.base_model import BASICS, BaseModel
from models.techniques import technique_kinds
from models.weights import hub_folder, load_weights

RECOGNISED = (
    "its data were recognised by names and sizes of files: the fingerprint of that time read no pixels"
)


class Changed(Exception):
    """Another process has made an attempt at the run since its state was looked at."""


def attempt_of(run: RunDirectory) -> tuple[Any, ...]:
    """The last attempt at a run: when it was recorded, and when the attempt ended, if it has; all None without one."""
    summary = run.known()
    ended = None if summary.get("status") in ("created", "running") else summary.get("ended")
    return summary.get("started"), ended


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

    def record(self, seen: tuple[Any, ...] | None = None) -> RunDirectory:
        """Write what the run is, unless that has been done; with `fresh` an earlier one is put aside, but for what the
        same job made before a cluster stopped it and began it again.

        What an earlier one's record lacks, because its process was killed or a file is damaged, is made anew.

        Args:
            seen: the attempt (`attempt_of`) that is to be gone on from, or put aside; None: whichever is there.

        Raises:
            Held: where a live process holds it.
            Changed: where another process has made an attempt since.
            Damaged: where what is left is not enough to go on from.
        """
        if is_child_rank():
            return self.run
        with self.run.locked():
            state = self.run.state()
            if state == "running":
                raise Held(f"{self.run.path}: this run is in progress ({self.run.holder()})")
            if seen is not None and attempt_of(self.run) != seen:
                raise Changed(f"{self.run.path}: another process has run it meanwhile")
            config = {**self.config, "fresh": False}  # a command, no fact of the run
            overrides = [masked(override) for override in self.overrides]
            by, again = _asked_for_by()
            goes_on = again and self.run.known().get("fresh_by") == by
            if state == "absent" or (self.config["fresh"] and not goes_on):
                if state != "absent":
                    _archive(self.run)
                now = {"status": "created", "reason": "", "final": {}, "best": {}, "started": time.time()}
                if self.config["fresh"] and by:
                    now["fresh_by"] = by
                self.run.record(config, overrides, **now, **self.facts)
            else:
                complete(self.run, config, overrides, self.facts)
        return self.run


def _asked_for_by() -> tuple[str, bool]:
    """The cluster's job that this process is of, empty for none; and whether it may have been begun before."""
    told, slurm = received(), os.environ.get("SLURM_JOB_ID")
    if told.record:
        file = Path(told.record)
        return f"{file.parents[1].name}/{file.name}", True
    return f"SLURM job {slurm}" if slurm else "", int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def complete(
    run: RunDirectory, config: Config, overrides: Sequence[str] | None, facts: Mapping[str, Any] | None = None
) -> None:
    """Make the record of a run that was begun whole again, and say what had to be made anew.

    Args:
        run: held by `locked`.
        config: the run's.
        overrides: what was typed for it; None: that is known from its record only.
        facts: what its summary says from the start; None: found out, where it is needed.

    Raises:
        Damaged: where what is left is not enough to go on from.
    """

    def known(rows: list[dict[str, str]]) -> dict[str, Any]:
        return {**(facts or _recorded_facts(run, completed(config))), "best": _best(rows, config)}

    said = run.complete(config, None if overrides is None else list(overrides), known)
    for line in said:
        say(f"note: {run.path}: {line}")
    summary = run.summary()
    missing = {n: v for n, v in (facts or {}).items() if n in _CONTENT and n not in summary}
    if missing:
        remark = {"recognised": RECOGNISED} if "data_fingerprint" in missing else {}
        run.update_summary(**missing, **remark)


def _files(config: Config) -> list[tuple[str, dict[str, Any], str]]:
    """The options that name a file whose content makes the result: each with the node that it is in, and its key."""
    module = config["data"]["module"]
    policies = {f"data.module.{role}": module.get(role) for role in ("train_transforms", "test_transforms")}
    return [
        ("model.init_from", config["model"], "init_from"),
        ("ckpt_path", config, "ckpt_path"),
        *(
            (f"{o}.pipeline_file", node, "pipeline_file")
            for o, node in policies.items()
            if isinstance(node, dict)
        ),
    ]


def weights_of(path: str) -> str:
    """The file that `model.init_from` names: of a run's folder its best.ckpt, or last.ckpt where it kept no best; of
    one of timm's its weights.

    Raises:
        ConfigError: for a folder that is no run's, of one in progress, and of one without weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    if hub := hub_folder(folder):
        return str(hub[0])
    run = RunDirectory(folder.resolve())
    if (state := run.state()) in ("absent", "running"):
        reason = (
            "a folder, but of no run"
            if state == "absent"
            else "this run is in progress; name one of its checkpoints"
        )
        raise ConfigError(f"model.init_from={path}: {reason}", "docs/weights.md")
    try:
        return str(run.pick_checkpoint(None))
    except ConfigError as error:
        raise ConfigError(f"model.init_from={path}: the run kept no checkpoint", "docs/weights.md") from error


# what runs of earlier versions did not record
_CONTENT = ("data_fingerprint", "contents", "classes", "identity_hash")


def _recorded_facts(run: RunDirectory, config: Config) -> dict[str, Any]:
    """What the summary of a run says from the start, from its configuration and data."""
    data = build_data(config)
    data.check()
    contents: dict[str, str | None] = {"data": data.fingerprint()}
    for option, room, key in _files(config):
        if room.get(key) is not None:
            contents[option] = file_fingerprint(option, room[key])
    for option in network_options(config["model"]):
        contents[f"model.{option}"] = settle_teacher(config)[1]
    overrides: list[str] = []
    with contextlib.suppress(Damaged):
        overrides = run.overrides()
    name, full = run.path.name, identity_hash(config, contents)
    facts = _facts(name, config, data, arm_name(config, overrides))
    if not name.startswith(
        full[:8]
    ):  # of other data, or begun by other code: what it was is not known any more
        return {n: v for n, v in facts.items() if n not in ("corrected", *_CONTENT)}
    return {**facts, **_recorded(contents), "identity_hash": full}


def _recorded(contents: Mapping[str, str | None]) -> dict[str, Any]:
    """What a summary says of contents: the fingerprint of the data, and those of the files that options name."""
    files = {name: value for name, value in contents.items() if name != "data" and value}
    return {"data_fingerprint": contents["data"], **({"contents": files} if files else {})}


def _facts(name: str, config: Config, data: BaseDataModule, arm: str) -> dict[str, Any]:
    """What tells a run from others, and what it costs a step by."""
    return {
        "run_id": name, "identity": name.rpartition("-")[0], "seed": config["seed"],
        "data": config["data"]["module"]["name"], "arm": arm, "techniques": sorted(config.get("techniques") or {}),
        "kind": kind(config), "corrected": corrected(config), "classes": data.class_names, "passes": passes(config),
    }  # fmt: skip


def _best(rows: Sequence[Mapping[str, str]], config: Config) -> dict[str, Any]:
    """The best epoch among rows of metrics.csv."""
    checkpoint = config.get("checkpoint") or {}
    monitor = checkpoint.get("monitor") or ""
    seen = [(float(row[monitor]), int(row["epoch"])) for row in rows if row.get(monitor)]
    finite = [(value, epoch) for value, epoch in seen if math.isfinite(value)]
    if not finite:
        return {}
    sign = 1.0 if metrics.higher_is_better(monitor, checkpoint.get("mode")) else -1.0
    value, epoch = max(finite, key=lambda pair: (sign * pair[0], -pair[1]))
    return {monitor: value, "epoch": epoch}


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
        *(
            find_target(module[role]["_target_"], f"data.module.{role}._target_")
            for role in ("train_transforms", "test_transforms")
            if (module.get(role) or {}).get("_target_")
        ),
    ]
    if policy := module.get("train_transforms"):
        owners.append(find_target(policy["_target_"], "data.module.train_transforms._target_"))
    kinds = (
        kind for owner in owners for kind in getattr(owner, "__mro__", (owner,))
    )  # a subclass's are further ones
    own = (correction for kind in kinds for correction in vars(kind).get("corrections", ()))
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
    """Eight hex digits that tell runs with different results apart: the first of `identity_hash`."""
    return identity_hash(config, contents, versions)[:8]


def identity_hash(
    config: Config, contents: Mapping[str, str | None], versions: Mapping[str, int] | None = None
) -> str:
    """All 64 hex digits of what tells runs with different results apart.

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
    return hashlib.sha256(text.encode()).hexdigest()


def check_same(run: RunDirectory, config: Config, full: str) -> None:
    """A folder of this name is this run's: its recorded hash says so, or of an older one its options.

    Raises:
        ConfigError: naming the folder, where it is another run's.
    """
    if not run.path.is_dir() or config["fresh"]:
        return
    recorded = run.known().get("identity_hash")
    if recorded is None:
        with contextlib.suppress(Damaged):
            differ = _differing(run.config(), config) if (run.path / "config.yaml").exists() else ""
            if differ:
                raise ConfigError(
                    f"run={run.path}: of the same name, but another run: {differ}; another exp_dir keeps both",
                    see="docs/robustness.md",
                )
    elif recorded != full:
        raise ConfigError(
            f"run={run.path}: of the same name, but another run: its identity is {str(recorded)[:16]}..., this one's "
            f"{full[:16]}...; another exp_dir keeps both",
            see="docs/robustness.md",
        )


def _differing(recorded: Config, config: Config) -> str:
    """The first option that changes the result and is another in a recorded configuration; empty: there is none."""
    there, here = flatten(recorded), flatten(config)
    teachers = {
        f"model.{option}" for option in network_options(config["model"])
    }  # their content stands for them
    for name, value in here.items():
        if not is_semantic(name) or name in teachers or name == "trainer.devices":
            continue
        if name in there:
            same = there[name] == value
        else:  # the version that recorded it did not have this option
            same = _is_default(config, name, value) or any(other.startswith(f"{name}.") for other in there)
        if not same:
            return f"{name} is {there.get(name, 'its default')} there and {value} here"
    return ""


_WITHOUT_COST = {
    "data.module.balanced_batches",
    "data.module.drop_last",
    "model.head_std",
    "model.data_config",
}
# options younger than recorded costs, as a step costs what it did without them
_YOUNGER = {
    "model.bottleneck": None, "model.final_norm": True, "model.preactivation": True, "model.averaged_shortcut": False,
    "model.strided": False,
}  # fmt: skip


def kind(config: Config) -> str:
    """Eight hex digits of what a pass of a step costs by: network, data, batch, precision, and how it is compiled."""
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
        and n not in _WITHOUT_COST
        and not (n in _YOUNGER and v is _YOUNGER[n])
    }
    if compiled := config["model"].get("compile"):
        of_the_cost["model.compile"] = compiled
    if (precision := config.get("matmul_precision", "highest")) != "highest":
        of_the_cost["matmul_precision"] = precision
    text = json.dumps({"model": config["model"]["_target_"], **of_the_cost}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def passes(config: Config) -> float:
    """Forward and backward passes of a step, on average, with the techniques of a configuration."""
    return checking.step_of(config).passes


_ROOT_DEFAULTS = {
    "reproducible": False,
    "matmul_precision": "highest",
    "on_nonfinite": "stop",
    "rollback_limit": 3,
}


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
    return name in _ROOT_DEFAULTS and value == _ROOT_DEFAULTS[name]


@dataclass
class _Place:
    """Where the runs of an arm are: what is equal for all its seeds of what a run is named by.

    Args:
        folder: of the runs.
        contents: what paths lead to, for the identity.
        data: of the arm.
    """

    folder: Path
    contents: Mapping[str, str | None]
    data: BaseDataModule
    _hash: str = ""
    _before: tuple[str, str] = ("", "")  # the data's fingerprint of old, and the hash with it

    def run_of(self, config: Config) -> tuple[str, str]:
        """The name of a seed's run, and its full identity; by the fingerprint of old where it was made by that.

        Raises:
            ConfigError: where a folder of this name is another run's.
        """
        folder, seed, fingerprint = self.folder, config["seed"], self.contents["data"]
        self._hash = full = self._hash or identity_hash(config, self.contents)
        name = f"{full[:8]}-s{seed}"
        if not (folder / name).exists():
            if not self._before[0]:
                older = self.data.fingerprint(1)
                self._before = older, identity_hash(config, {**self.contents, "data": older})
            older, hash_before = self._before
            before = f"{hash_before[:8]}-s{seed}"
            known = RunDirectory(folder / before).known().get("data_fingerprint", fingerprint)
            if older != fingerprint and (folder / before).exists() and known == fingerprint:
                name, full = before, hash_before
        check_same(RunDirectory(folder / name), config, full)
        return name, full


@dataclass
class _Arm:
    """A job that was examined, and what those of its arm's other seeds are made from.

    Args:
        job: of one seed.
        place: of its runs.
        seed_at: where the configuration has the seed; None: it does more with the seed than to have it somewhere.
    """

    job: Job
    place: _Place
    seed_at: list[tuple[str, ...]] | None = None


@dataclass
class Examiner:
    """Examines composed configurations; what the jobs of a sweep have in common, once for all of them."""

    _data: dict[str, tuple[BaseDataModule, str]] = field(default_factory=dict)
    _constructed: set[str] = field(default_factory=set)
    _fetched: set[str] = field(default_factory=set)
    _arms: dict[tuple[Any, ...], _Arm] = field(default_factory=dict)

    def examine_job(
        self,
        compose: Callable[[Sequence[str]], DictConfig],
        overrides: Sequence[str],
        swept: Collection[str],
    ) -> Job:
        """As `examine(compose(overrides), overrides, swept)`: an arm's seeds are composed and checked once.

        Only where the configuration does nothing with its seed but to have it in some places that it is not named by;
        where it makes a path of it, or has a teacher or a state to start from, each seed is a case of its own.

        Raises:
            ConfigError: for whatever cannot run.
        """
        typed = [o for o in overrides if re.fullmatch(r"seed=\d+", o)]
        key = tuple(o for o in overrides if o not in typed), tuple(swept)
        arm = self._arms.get(key) if len(typed) == 1 else None
        if arm is not None and arm.seed_at is not None:
            return self._of_seed(arm, int(typed[0].removeprefix("seed=")), arm.seed_at, overrides)
        composed = compose(overrides)
        examined = self._examine(composed, overrides, swept)
        if arm is None and len(typed) == 1:
            alone = examined.job.config["ckpt_path"] or network_options(examined.job.config["model"])
            examined.seed_at = None if alone else _places_of_seed(composed, overrides, examined.job.config)
            self._arms[key] = examined
        return examined.job

    def _of_seed(self, arm: _Arm, seed: int, places: list[tuple[str, ...]], overrides: Sequence[str]) -> Job:
        check_value("seed", seed, ROOT_TYPES["seed"])
        config = copy.deepcopy(arm.job.config)
        for *rooms, option in places:
            node = config
            for room in rooms:
                node = node[room]
            node[option] = seed
        name, full = arm.place.run_of(config)
        run = RunDirectory(arm.place.folder / name)
        if not any((run.path / "checkpoints").glob("*.ckpt")):
            self._fetch(config)
        facts = {**arm.job.facts, "run_id": name, "identity": name.rpartition("-")[0], "seed": seed}
        facts["identity_hash"] = full
        return replace(arm.job, run=run, config=config, overrides=overrides, facts=facts)

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
        return self._examine(composed, overrides, swept).job

    def _examine(self, composed: DictConfig, overrides: Sequence[str], swept: Collection[str] | None) -> _Arm:
        config = configuration.to_plain(composed, overrides)
        for option in SWEEP_OPTIONS:
            config.pop(option)
        checking.check(config, overrides)
        for option in TASK_OPTIONS:
            config.pop(option, None)
        trust.vouch(config)
        check_no_secret(config)
        if config["task"] in ("summary", "pack"):
            raise ConfigError(
                f"task={config['task']} is one command of its own: python main.py without -m", "README.md"
            )
        if config["task"] not in ("train", "tune"):
            raise ConfigError(
                f"task={config['task']} is one command of its own: python main.py without -m; of a recorded run "
                f"python main.py run=RUN task={config['task']}",
                "docs/use.md",
            )
        of_weights = checking.settle_weights_data(config, overrides)
        data, fingerprint = self._read_data(config)
        settled = [*of_weights, *checking.resolve(config, data), *data.remarks]
        checking.check(config, overrides)
        contents: dict[str, str | None] = {"data": fingerprint}
        if config["model"].get("init_from") is not None:
            config["model"]["init_from"] = weights_of(str(config["model"]["init_from"]))
        for option, room, key in _files(config):
            if room.get(key) is not None:
                contents[option] = file_fingerprint(option, room[key])
                # a link stays one: beside it lies what describes it
                room[key] = str(Path(room[key]).expanduser().absolute())
        for option in network_options(config["model"]):
            config["model"][option], contents[f"model.{option}"] = settle_teacher(config)
        self._construct(config, data)
        folder = Path(config["exp_dir"]).expanduser().resolve() / config["data"]["module"]["name"]
        if reason := why_not_writable(folder):
            raise ConfigError(
                f"exp_dir={config['exp_dir']}: cannot be written ({reason}); exp_dir=PATH is elsewhere"
            )
        place = _Place(folder, contents, data)
        name, full = place.run_of(config)
        if not any((folder / name / "checkpoints").glob("*.ckpt")):  # its state has the weights
            self._fetch(config)
        if config["user_dir"]:
            config["user_dir"] = absolute(config["user_dir"])
        for key in ("data_root_dir", "stylized_root_dir", "predict_dir"):
            if (path := config["data"]["module"].get(key)) is not None:
                config["data"]["module"][key] = absolute(path)
        facts = {
            **_facts(name, config, data, arm_name(config, overrides, swept)),
            "resolved": settled, **_recorded(contents), "identity_hash": full,
        }  # fmt: skip
        if (sweep := received().sweep) is not None:  # this process is a sweep's job on another machine
            facts["sweep"] = sweep
        length = run_length(config, data)
        job = Job(RunDirectory(folder / name), config, overrides, facts, length.steps, length.epochs)
        return _Arm(job, place)

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
            config["model"],
            of_the_data,
            config["data"]["module"],
            config["trainer"],
            config["logger"],
            config["callbacks"],
            {"reproducible": config["reproducible"]},
            start,
        )
        if key in self._constructed:
            return
        model = build_model(config, load=False, compile=False)
        if config["model"]["init_from"] and not config["ckpt_path"]:
            load_weights(model.model, config["model"]["init_from"])
        check_input(model, config)  # it leaves the model without memory
        check_reproducible(model, config)
        check_samples(model, config, data)
        check_smallest_batch(model, config, data)
        if config["ckpt_path"]:
            check_state(config, model, data)
        check_loggers(config["logger"])
        for name, node in config["callbacks"].items():
            if node and name not in ("progress", "plots"):
                build_callback(name, node)
        with quiet_lightning():
            build_trainer(config, Path(config["exp_dir"]), [], [])
        self._constructed.add(key)

    def _fetch(self, config: Config) -> None:
        """Weights that a network fetches are tried too, once for all jobs with the same network."""
        key = _but_for_the_seed(config["model"])
        if config["model"].get("pretrained") and not config["ckpt_path"] and key not in self._fetched:
            build_model(config, compile=False)
            self._fetched.add(key)


def _places_of_seed(
    composed: DictConfig, overrides: Sequence[str], examined: Config
) -> list[tuple[str, ...]] | None:
    """Where the configuration of another seed has that seed; None: it may differ by more.

    It is resolved for two seeds, and differs where it has them. A value that is chosen by the seed might be one for
    both: where an interpolation has one within it, or calls a resolver, nothing is claimed.
    """
    raw = {str(k): v for k, v in OmegaConf.to_container(composed, resolve=False).items() if k != "hydra"}  # type: ignore[union-attr]
    text = re.sub(r"\$\{oc\.env:[^${}]*\}", "", json.dumps(raw, default=str))
    if re.search(r"\$\{[^}]*(\$\{|:)", text):
        return None
    seed = composed["seed"]
    other = seed + 1 if seed < 2**31 else seed - 1
    here = configuration.to_plain(composed, overrides)
    with read_write(composed), open_dict(composed):
        composed["seed"] = other
        there = configuration.to_plain(composed, overrides)
        composed["seed"] = seed
    places: list[tuple[str, ...]] = []

    def differ(one: Any, two: Any, at: tuple[str, ...]) -> bool:
        """Whether they differ by more than the seed."""
        if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
            return any(differ(one[key], two[key], (*at, key)) for key in one)
        if one == two:
            return False
        places.append(at)
        return not (one == seed and two == other)

    if (
        f"seed={seed}" not in overrides
        or differ(here, there, ())
        or any(configuration.select(examined, ".".join(p)) != seed for p in places)
        or any(configuration.is_semantic(".".join(p)) for p in places)  # it is named by these
    ):
        return None
    return places


def _but_for_the_seed(*nodes: Mapping[str, Any]) -> str:
    """What jobs share that differ by their seed only."""
    return json.dumps([{k: v for k, v in node.items() if k != "seed"} for node in nodes], default=str)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without what Lightning says of a trainer that only has to be built, or to evaluate."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _archive(run: RunDirectory) -> None:
    number = 1
    while (old := run.path.with_name(f"{run.path.name}.old-{number}")).exists():
        number += 1
    run.path.rename(old)
