"""What a configuration must satisfy before anything runs, and what depends on data and machine settled."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from callbacks.checkpoints import Checkpoints
from callbacks.nonfinite import OnNonfinite
from callbacks.range_test import RangeOptions
from crucible.configuration import Config, check_name, find_target, select
from crucible.corrections import Correction, option_is, rounded_targets
from crucible.machine import device_count, device_kind, world_size
from crucible.metrics import build_metrics, check_metrics, of_split
from crucible.options import (
    ConfigError,
    check_arguments,
    check_value,
    read_options,
    shown,
    signature_options,
    suggest,
)
from crucible.technique import CUDA_GRAPHS, Setting, Step, assemble, read_techniques
from datasets.packed import PackOptions
from datasets.sampling import EpochSampler, EvalSampler, batches_within, training_batches
from lab.recorded import SWEEP_OPTIONS, TASK_OPTIONS
from losses import LossOptions, evaluation_criterion
from models.base_model import BASICS, BaseModel
from models.exported import ExportOptions, Format
from models.techniques import technique_kinds
from models.views import View
from norms import Norm
from optimizers import OptimizerOptions
from optimizers.schedules import ScheduleOptions, schedule, training_length


def _is_limited(split: str) -> Callable[[Mapping[str, Any]], bool]:
    def concerns(config: Mapping[str, Any]) -> bool:
        trainer = config["trainer"]
        limits = (trainer.get(f"limit_{split}_batches"), split == "val" and trainer.get("overfit_batches"))
        return any(limit and not (isinstance(limit, float) and limit == 1) for limit in limits)

    return concerns


def _has_two_lengths(config: Mapping[str, Any]) -> bool:
    trainer, scheduler = config["trainer"], config["model"].get("scheduler")
    return scheduler is not None and (trainer["max_epochs"] or -1) > 0 and trainer["max_steps"] > 0


def _may_cut_an_epoch(config: Mapping[str, Any]) -> bool:
    trainer = config["trainer"]
    stops = any(
        isinstance(node, Mapping) and str(node.get("_target_")).endswith("EarlyStopping")
        for node in config["callbacks"].values()
    )
    return trainer.get("max_time") is not None or (stops and trainer.get("val_check_interval") is not None)


def _accumulates(config: Mapping[str, Any]) -> bool:
    return config["trainer"]["accumulate_grad_batches"] > 1


# of what the trainer and the lengths of a run make of it
CORRECTIONS: tuple[Correction, ...] = (
    Correction("ckpt_path", 2, option_is("ckpt_path"), "the state's rates, schedule and decay stood for those typed"),
    rounded_targets("data.task=regression", 3),  # 2: by the model alone, Lightning's loops still rounded them
    Correction("trainer.max_steps", 2, _has_two_lengths, "the schedule went by max_epochs, whichever ended first"),
    Correction("trainer.max_time", 2, _may_cut_an_epoch, "an epoch that was cut had the training values of the last"),
    Correction(
        "trainer.accumulate_grad_batches", 2, _accumulates,
        "the last group of an epoch, where it was not whole, counted for a part",
    ),
    Correction("trainer.limit_val_batches", 2, _is_limited("val"), "the first samples were taken, not drawn ones"),
    Correction("trainer.limit_test_batches", 2, _is_limited("test"), "the first samples were taken, not drawn ones"),
)  # fmt: skip
Task = Literal[
    "train", "test", "predict", "export", "card", "mechanism", "summary", "pack", "tune"
]  # those of trained weights are in `lab.tasks`

READS = ("test", "predict", "export")  # the tasks that read outputs by views and at a temperature
WRITES = ("pack", "test", "predict", "export", "card", "mechanism")  # those that write a file of their own

LONG_RUN_STEPS = 5000

_Count = Annotated[int, "[1, inf)"]
_Share = Annotated[float, "[0, 1]"] | Annotated[int, "[0, inf)"] | None  # of an epoch's batches, or so many
_SEED = Annotated[int, "[0, 4294967295]"]

# the options at the top, and of `data` without those of its module
ROOT_TYPES: dict[str, Any] = {
    "task": Task, "summary_depth": _Count, "seed": _SEED, "arm": str | None, "metrics": list[str], "fresh": bool,
    "test_after_training": bool, "reproducible": bool,
    "matmul_precision": Literal["highest", "high", "medium"], "ckpt_path": str | None, "user_dir": str | None,
    "data_dir": str | None, "exp_dir": str, "on_nonfinite": OnNonfinite,
    "rollback_lr": Annotated[float, "(0, 1)"] | None, "rollback_limit": _Count, "out": str | None,
    "calibrate": bool, "tta": View | list[View] | None, "format": Format,
}  # fmt: skip
DATA_TYPES: dict[str, Any] = {
    "task": Literal["classification", "regression"], "num_classes": _Count | None, "input_channels": _Count,
    "input_size": _Count, "input_dim": Literal[1, 2, 3], "cv.k": _Count,
}  # fmt: skip
# Lightning's own declarations are wider than what it takes
_TRAINER_TYPES: dict[str, Any] = {
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],  # whose generators follow the keys
    "accumulate_grad_batches": _Count,
    "check_val_every_n_epoch": _Count | None,
    "devices": Literal["auto"] | str | Annotated[int, "[-1, inf)"] | Annotated[list[int], "[0, inf)"],
    "enable_autolog_hparams": bool,
    "enable_progress_bar": bool,
    "fast_dev_run": bool | Annotated[int, "[0, inf)"],
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "gradient_clip_val": Annotated[float, "(0, inf)"] | None,
    "limit_predict_batches": _Share,
    "limit_test_batches": _Share,
    "limit_train_batches": _Share,
    "limit_val_batches": _Share,
    "log_every_n_steps": _Count | None,
    "max_epochs": _Count,
    "max_steps": Annotated[int, "[-1, inf)"],
    "max_time": str | dict | None,
    "min_epochs": _Count | None,
    "min_steps": _Count | None,
    "num_nodes": _Count,
    "num_sanity_val_steps": Annotated[int, "[-1, inf)"] | None,
    "overfit_batches": Annotated[float, "[0, 1]"] | Annotated[int, "[0, inf)"],
    "precision": Literal[
        "32-true", "16-mixed", "bf16-mixed", "64-true", "16-true", "bf16-true", "transformer-engine",
        "transformer-engine-float16", "32", "16", "bf16", "64", 32, 16, 64,
    ] | None,
    "profiler": Literal["simple", "advanced", "pytorch", "xla"] | None,
    "reload_dataloaders_every_n_epochs": Annotated[int, "[0, inf)"],
    "strategy": str,
    "sync_batchnorm": bool | None,
    "val_check_interval": Annotated[float, "(0, 1]"] | _Count | None,
}  # fmt: skip


class Needed(NamedTuple):
    """An option that means something only beside another one; a technique says so of its own in `needs`.

    Attributes:
        option: dotted.
        beside: whether what it needs is there.
        needs: that, in a few words.
        default: the value that asks for nothing; null asks for nothing either.
    """

    option: str
    beside: Callable[[Config], Any]
    needs: str
    default: Any = None


def _others_callbacks(config: Config) -> list[str]:
    """Callbacks that are not Crucible's own."""
    nodes = {name: node for name, node in config["callbacks"].items() if isinstance(node, Mapping)}
    return [n for n, node in nodes.items() if not str(node.get("_target_")).startswith("callbacks.")]


EARLY_STOPPING = "callbacks.early_stopping.EarlyStopping"


def _can_end_early(config: Config) -> bool:
    stops = any(
        isinstance(n, Mapping) and n.get("_target_") == EARLY_STOPPING for n in config["callbacks"].values()
    )
    return stops or config["trainer"].get("max_time") is not None or bool(_others_callbacks(config))


def _exports(config: Config) -> bool:
    return config["task"] == "export"


def _packs(config: Config) -> bool:
    return config["task"] == "pack" and not config["pack"]["verify"]


def _has_momentum(config: Config) -> bool:
    return read_options(OptimizerOptions, config["model"]).momentum_in_use is not None


NEEDED = (
    Needed(
        "trainer.gradient_clip_algorithm", lambda config: config["trainer"].get("gradient_clip_val"),
        "trainer.gradient_clip_val: the largest length, or number, that a gradient keeps",
    ),
    Needed("trainer.min_epochs", _can_end_early, "trainer.max_time or a callback, to end the training before"),
    Needed("trainer.min_steps", _can_end_early, "trainer.max_time or a callback, to end the training before"),
    Needed(
        "model.lr_interval",
        lambda config: any(config["model"].get(o) for o in ("scheduler", "warmstart")) or step_of(config).schedule,
        "model.scheduler, model.warmstart, or a technique that sets the rate: it never changes", "epoch",
    ),
    Needed("model.lr_scale_momentum", _has_momentum, "an optimizer with a momentum: SGD and its kin", False),
    Needed("rollback_lr", lambda config: config.get("on_nonfinite") == "rollback", "on_nonfinite=rollback"),
    Needed("rollback_limit", lambda config: config.get("on_nonfinite") == "rollback", "on_nonfinite=rollback", 3),
    Needed("summary_depth", lambda config: config["task"] == "summary", "task=summary", 2),
    Needed("out", lambda config: config["task"] in WRITES, f"task={', task='.join(WRITES)}"),
    *(
        Needed(name, lambda config: config["task"] in READS, f"task={', task='.join(READS)}", default)
        for name, default in (("calibrate", False), ("tta", None))
    ),
    Needed("format", _exports, "task=export", "onnx"),
    *(Needed(f"export.{f.name}", _exports, "task=export", f.default) for f in dataclasses.fields(ExportOptions)),
    Needed("pack.verify", lambda config: config["task"] == "pack", "task=pack", False),
    Needed("pack.size", _packs, "task=pack, without pack.verify", 256),
    *(
        Needed(f"tune.{f.name}", lambda config: config["task"] == "tune", "task=tune", f.default)
        for f in dataclasses.fields(RangeOptions)
    ),
    Needed(
        "pack.quality", lambda config: _packs(config) and config["pack"]["size"] is not None,
        "task=pack with a pack.size, without pack.verify", 90,
    ),
)  # fmt: skip

ROOT = (
    "task", "summary_depth", "seed", "arm", "metrics", "fresh", "test_after_training", "reproducible",
    "matmul_precision", "on_nonfinite", "rollback_lr", "rollback_limit", "ckpt_path", "user_dir", "data_dir", "exp_dir",
    "model", "data", "trainer", "checkpoint", "callbacks", "logger", "techniques", *TASK_OPTIONS,
)  # fmt: skip


def check_known(config: Config) -> None:
    """Refuse a recorded configuration with an option that its target does not have any more.

    Raises:
        ConfigError: naming the option.
    """
    nodes = {n: config[n] for n in ("trainer", "checkpoint", "model")} | {
        "data.module": config["data"]["module"]
    }
    for group in ("callbacks", "logger"):
        nodes |= {f"{group}.{n}": node for n, node in config[group].items() if isinstance(node, Mapping)}
    for prefix, node in nodes.items():
        known: Collection[str]
        if prefix in ("trainer", "checkpoint"):
            known = signature_options(Trainer if prefix == "trainer" else Checkpoints)
        else:
            target = find_target(node.get("_target_", ""), f"{prefix}._target_")
            of_a_model = prefix == "model"
            known = model_options(target, node.get("stages")) if of_a_model else signature_options(target)
        for name, value in node.items():
            if name not in known and not (name.startswith("_") and name.endswith("_")):
                raise ConfigError(
                    f"{prefix}.{name}={value!r}: recorded by another version, this one has no such option"
                    f"{suggest(name, known, ())}"
                )


def check_export(options: Any) -> None:
    """Refuse what `export.*` does not have.

    Raises:
        ConfigError: naming the option.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"export must be a mapping of options, got {shown(options)}; export.NAME=VALUE sets one"
        )
    check_arguments(ExportOptions, options, "export")


def check(config: Config, overrides: Sequence[str], typed: Collection[str] | None = None) -> None:
    """Refuse what cannot be run, before any data is read.

    Args:
        config: the plain configuration.
        overrides: the command line's overrides, as typed.
        typed: of a recorded run, the options that were typed beside it; what an earlier version recorded may hold
            others that do nothing. None: this is no recorded run.

    Raises:
        ConfigError: one line naming the option, its value, and what is allowed.
    """
    _check_groups(config)
    if typed is None:
        _check_names(config)
    for name, annotation in ROOT_TYPES.items():
        if name in config:  # what was recorded before there was one has none
            check_value(name, config[name], annotation)
    if "pack" in config:
        check_arguments(PackOptions, config["pack"], "pack")
    if "export" in config:
        check_export(config["export"])
    if "tune" in config:
        check_arguments(RangeOptions, config["tune"], "tune")
        read_options(RangeOptions, config["tune"], "tune")
    if typed is None:  # what was typed over a technique's option is no more known of a recorded run
        _check_techniques(config, overrides)
    _check_trainer(config["trainer"])
    _check_checkpoint(config["checkpoint"])
    _check_data(config["data"])
    _check_model(config["model"])
    for room in BASICS:
        read_options(room, config["model"])
    _check_step(config)
    _check_needed(config, typed)
    check_metrics(config["metrics"], config["data"]["task"], config["data"]["num_classes"] or 1000)
    for group in ("callbacks", "logger"):
        for name, node in config[group].items():
            if isinstance(node, Mapping):
                _check_node(node, f"{group}.{name}")
            elif not (node is None or node is False or (group == "logger" and node is True)):
                raise ConfigError(f"{group}.{name} must be null or have a _target_, got {node!r}")


def _check_groups(config: Config) -> None:
    """What holds options is a mapping of them."""
    groups = (
        "model",
        "model.stages",
        "data",
        "data.cv",
        "data.module",
        "trainer",
        "checkpoint",
        "callbacks",
        "logger",
        *(group for group in ("pack", "tune", "export") if group in config),
    )
    for name in groups:
        if not isinstance(node := select(config, name), Mapping) and (
            node is not None or name != "model.stages"
        ):
            raise ConfigError(
                f"{name} must be a mapping of options, got {shown(node)}; {name}.NAME=VALUE sets one"
            )


def _check_names(config: Config) -> None:
    """No name that nobody reads, at the top or in a group without a class that would refuse it."""
    for name, value in config.items():
        if name not in ROOT and name not in SWEEP_OPTIONS:
            raise ConfigError(f"{name}={value!r}: no such option{suggest(name, ROOT)}")
    for name, value in config["data"]["cv"].items():
        if name != "k":
            raise ConfigError(f"data.cv.{name}={value!r}: no such option; known: k")


def _check_needed(config: Config, typed: Collection[str] | None) -> None:
    """No option without the one that it needs."""
    for option, beside, needs, default in NEEDED:
        value = select(config, option)
        asked = value not in (None, default) and (typed is None or option in typed)
        if asked and not beside(config):
            raise ConfigError(f"{option}={value} needs {needs}")


def _check_step(config: Config) -> None:
    """What the techniques refuse, also of the batches that a callback makes a step of."""
    step_of(config)
    trainer = config["trainer"]
    for name, node in config["callbacks"].items():
        if not (isinstance(node, Mapping) and isinstance(node.get("scheduling"), Mapping)):
            continue
        target = find_target(node.get("_target_", ""), f"callbacks.{name}._target_")
        if inspect.isclass(target) and issubclass(target, GradientAccumulationScheduler):
            most = max(node["scheduling"].values(), default=1)
            try:
                step_of({**config, "trainer": {**trainer, "accumulate_grad_batches": most}})
                if most > 1:
                    read_options(ScheduleOptions, config["model"]).check_changing_steps(trainer["max_steps"])
            except ConfigError as error:
                raise ConfigError(f"callbacks.{name}.scheduling: {error}", error.see) from None


def step_of(config: Config) -> Step:
    """The stages of the training step that the configuration's techniques make; needs neither data nor network.

    Raises:
        ConfigError: for what a technique refuses.
    """
    model, data = config["model"], config["data"]
    setting = Setting(
        task=data["task"],
        num_classes=data["num_classes"] or 0,
        input_dim=data["input_dim"],
        input_channels=data["input_channels"],
        accumulate_grad_batches=config["trainer"]["accumulate_grad_batches"],
        compile=model["compile"],
        precision=config["trainer"].get("precision"),
        data=data,
    )
    criterion = evaluation_criterion(data["task"], read_options(LossOptions, model).loss)
    return assemble(read_techniques(technique_kinds(model.get("stages")), model), setting, criterion)


def network_options(model: Mapping[str, Any]) -> list[str]:
    """The options among `model.*` that name trained networks (a teacher) and are set."""
    named = [name for kind in technique_kinds(model.get("stages")) for name in kind.networks]
    return [name for name in named if model.get(name) is not None]


def _check_node(node: Mapping[str, Any], prefix: str) -> None:
    """A `_target_` node: its target exists and takes its keys; nodes within likewise."""
    if "_target_" not in node:
        raise ConfigError(f"{prefix} needs a _target_, got {dict(node)!r}")
    target = find_target(node["_target_"], f"{prefix}._target_")
    nested = [k for k, v in node.items() if isinstance(v, Mapping) and "_target_" in v]
    for name in nested:
        _check_node(node[name], f"{prefix}.{name}")
    check_arguments(target, node, prefix, given=nested)


def model_options(target: Any, stages: Mapping[str, str] | None = None) -> Mapping[str, tuple[Any, Any]]:
    """`{name: (annotation, default)}` of all that `model.*` may hold: the target's own, the basics, the techniques'."""
    return _model_options(target, tuple((stages or {}).items()))


@cache
def _model_options(target: Any, stages: tuple[tuple[str, str], ...]) -> Mapping[str, tuple[Any, Any]]:
    known = dict(signature_options(target))
    for room in (*BASICS, *technique_kinds(dict(stages))):
        hints = get_type_hints(room, include_extras=True)
        known.update({f.name: (hints[f.name], f.default) for f in dataclasses.fields(room)})
    known["init_from"] = (str | None, None)
    return known


def _check_model(model: Mapping[str, Any]) -> None:
    target = find_target(model.get("_target_", ""), "model._target_")
    if not (inspect.isclass(target) and issubclass(target, BaseModel)):
        raise ConfigError(
            f"model._target_={model['_target_']}: must be a subclass of models.base_model.BaseModel"
        )
    later = [n for n in (*AUTOMATIC_FROM_DATA, "num_classes") if n in model and model[n] is None]
    own = signature_options(target).keys() - signature_options(BaseModel).keys()
    check_arguments(
        target, model, "model", known=model_options(target, model.get("stages")), given=later, listed=own
    )


def _check_data(data: Mapping[str, Any]) -> None:
    for name, annotation in DATA_TYPES.items():
        check_value(f"data.{name}", select(data, name), annotation)
    for name in data:
        if name not in ("module", "cv", "task", "num_classes", "input_channels", "input_size", "input_dim"):
            raise ConfigError(
                f"data.{name}={data[name]!r}: no such option; options of the data set are data.module.*"
            )
    check_name("data.module.name", data["module"].get("name", ""))
    _check_node(data["module"], "data.module")


_OURS_NOT_THE_TRAINERS = {
    "callbacks": "callbacks.NAME={_target_: ...}",
    "logger": "logger.NAME",
    "plugins": "nothing, it is Crucible's own",
    "default_root_dir": "exp_dir",
    "use_distributed_sampler": "nothing, the data module shards the samples",
    "enable_model_summary": "nothing, the banner counts the parameters",
    "enable_checkpointing": "checkpoint.keep=none",
}


def trainer_options() -> dict[str, tuple[Any, Any]]:
    """`{name: (annotation, default)}` of what `trainer.*` may hold."""
    known = signature_options(Trainer).items()
    return {n: (_TRAINER_TYPES.get(n, a), d) for n, (a, d) in known if n not in _OURS_NOT_THE_TRAINERS}


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    known = signature_options(Trainer)
    for name, value in trainer.items():
        if name in _OURS_NOT_THE_TRAINERS:
            raise ConfigError(f"trainer.{name}={value!r}: set {_OURS_NOT_THE_TRAINERS[name]} instead")
        if name not in known:
            raise ConfigError(f"trainer.{name}={value!r}: Lightning has no such option{suggest(name, known)}")
        if name == "max_epochs" and value in (-1, None) and trainer.get("max_steps", -1) > 0:
            continue
        check_value(f"trainer.{name}", value, trainer_options()[name][0])
    if trainer["max_steps"] == 0:
        raise ConfigError("trainer.max_steps=0 trains nothing; -1 leaves the length to trainer.max_epochs")
    if trainer.get("limit_train_batches") in (0, 0.0):
        raise ConfigError("trainer.limit_train_batches=0 trains nothing; null takes all batches")
    if any(word in str(trainer["strategy"]) for word in ("spawn", "fork", "notebook")):
        raise ConfigError(
            f"trainer.strategy={trainer['strategy']}: the ranks of a run are processes of their own; use auto or ddp"
        )


def _check_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    check_arguments(Checkpoints, checkpoint, "checkpoint", given=["folder"])


def _check_techniques(config: Config, overrides: Sequence[str]) -> None:
    """Each technique's options still hold, or the command line changed them; no two set one option apart."""
    typed = {o.lstrip("+~").split("=", 1)[0] for o in overrides}
    set_by: dict[str, tuple[str, Any]] = {}
    for technique, options in (config.get("techniques") or {}).items():
        for name, wanted in (options or {}).items():
            if name in typed:
                continue
            other, others_value = set_by.setdefault(name, (technique, wanted))
            if others_value != wanted:
                raise ConfigError(
                    f"technique=[{other},{technique}]: they set {name} to {others_value!r} and to {wanted!r}; "
                    f"choose one of them, or set {name} on the command line",
                    see="cli_configs/technique",
                )
    for name, (technique, wanted) in set_by.items():
        if (value := select(config, name)) != wanted:
            raise ConfigError(
                f"technique={technique} sets {name}={wanted!r}, another file sets it to {value!r}; "
                f"set {name} on the command line to choose",
                see="cli_configs/technique",
            )


def settle_weights_data(config: Config, overrides: Sequence[str]) -> list[str]:
    """Settle what weights from elsewhere say of their network and its input, in place; what is typed holds.

    A folder of timm's names the network; weights of timm's come with size, normalisation, filter and crop.

    Returns:
        what was settled, in a few words each.

    Raises:
        ConfigError: for a folder of another network than the one that was typed, and what the policy cannot do.
    """
    target = find_target(config["model"]["_target_"], "model._target_")
    if not hasattr(target, "own_data"):  # only networks of timm's know
        return []
    model, data = config["model"], config["data"]
    typed = {o.lstrip("+~").split("=", 1)[0] for o in overrides} - {
        "data",
        "model",
    }  # groups' files are not typed
    settled = list(target.settle_network(model, typed))
    own = target.own_data(model, evaluates=config["task"] not in ("train", "tune"))
    if own is None or data["input_dim"] != 2:
        return settled
    kept: set[str] = set()

    def told(option: str) -> bool:
        found = [o for o in typed if option == o or option.startswith(f"{o}.")]
        kept.update(found)
        return bool(found)

    colours = {"mean": own.mean, "std": own.std} if data["input_channels"] == len(own.mean) else {}
    crop = {
        "interpolation": own.interpolation, "crop_pct": own.crop_pct, "crop_mode": own.crop_mode, "resize_by": "pil",
    }  # fmt: skip
    whole = True
    for role in ("train_transforms", "test_transforms"):
        node = data["module"].get(role)
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        takes = signature_options(find_target(node["_target_"], f"data.module.{role}._target_"))
        photographs = "crop_pct" in takes
        whole &= photographs
        size = {"size": own.size} if photographs and not told("data.input_size") else {}
        values = {**colours, **size, **(crop if photographs and role == "test_transforms" else {})}
        for name, value in values.items():
            if name in takes and not told(f"data.module.{role}.{name}"):
                node[name] = value
    if whole and "data.input_size" not in typed:
        data["input_size"] = own.size
    said = str(own)
    if not colours:
        said += f"; mean and std stay the data's, of {data['input_channels']} channels"
    if not whole:
        said += "; size and crop stay the data's, whose policies are not augmentation.policies.imagenet"
    if kept:
        said += f"; as typed: {', '.join(sorted(kept))}"
    return [*settled, said]


AUTOMATIC_FROM_DATA = ("cifar_size",)
SMALL_IMAGE = 96


def resolve(config: Config, data_module: Any) -> list[str]:
    """Settle what depends on the data and on the machine, in place.

    Returns:
        what was settled, in a few words each, for the line at the start.

    Raises:
        ConfigError: where the data or the machine cannot do what was asked.
    """
    settled: list[str] = []
    data, model = config["data"], config["model"]
    if data["num_classes"] is None and data["task"] == "classification":
        data["num_classes"] = data["module"]["num_classes"] = model["num_classes"] = len(
            data_module.class_names
        )
        settled.append(f"{data['num_classes']} classes found")
    if data["num_classes"] is None:
        data["num_classes"] = model["num_classes"] = 1
    resolve_network(config)
    groups = data_module.groups("val")
    resolve_monitor(config, groups.names if groups else ())
    _resolve_machine(config, data_module, settled)
    config["logger"] = {n: _LOGGERS.get(n, v) if v is True else v for n, v in config["logger"].items()}
    return settled


def resolve_network(config: Config) -> None:
    """Settle what the network takes from the size of its input, in place."""
    if "cifar_size" in config["model"] and config["model"]["cifar_size"] is None:
        config["model"]["cifar_size"] = config["data"]["input_size"] < SMALL_IMAGE


_LOGGERS = {
    "mlflow": {"_target_": "crucible.loggers.MLflow"},
    "tensorboard": {"_target_": "crucible.loggers.TensorBoard"},
    "wandb": {"_target_": "crucible.loggers.Wandb"},
}


_ANY_CLASS = "<class>"


def logged_values(config: Config, split: Literal["val", "test"], groups: Sequence[str] = ()) -> list[str]:
    """What a run logs of its evaluations on a split; `test/f1_per_class/<class>` stands for those of all classes.

    Args:
        config: plain.
        split: of the evaluations.
        groups: of its samples.

    Raises:
        ConfigError: for a metric that there is not, or that the task does not have.
    """
    data = config["data"]
    measured = build_metrics(config["metrics"], data["task"], data["num_classes"])
    by_class = [
        f"{name}/{_ANY_CLASS}" if str(name).endswith("_per_class") else str(name) for name in measured
    ]
    names = ["loss", *by_class]
    splits = ["val", "val_raw"] if split == "val" and step_of(config).weights else [split]
    splits += [f"{one}_{group}" for group in groups for one in splits]
    return [f"{one}/{name}" for one in splits for name in names]


def is_among(name: str, values: Sequence[str]) -> bool:
    """Whether a logged name is one of `logged_values`."""
    of_all = [v.removesuffix(_ANY_CLASS) for v in values if v.endswith(_ANY_CLASS)]
    return name in values or any(name.startswith(v) and name != v for v in of_all)


def group_of(name: str, split: Literal["val", "test"]) -> list[str]:
    """The group of samples that a logged name is of (`in` of `val_in/acc`), if it is of the split."""
    if not of_split(name, split):
        return []
    group = name.partition("/")[0].removeprefix(split).removeprefix("_raw").removeprefix("_")
    return [group] if group else []


def resolve_monitor(config: Config, groups: Sequence[str] | None = None) -> None:
    """Settle which value says what the best epoch is, in place.

    Args:
        config: plain.
        groups: of the validation samples; None: unknown, and any is taken.

    Raises:
        ConfigError: for one that is never logged, which would keep no best.ckpt.
    """
    checkpoint, task = config["checkpoint"], config["data"]["task"]
    if checkpoint["monitor"] is None:
        accuracy = task == "classification" and "acc" in config["metrics"]
        checkpoint["monitor"] = "val/acc" if accuracy else "val/loss"
    monitor = checkpoint["monitor"]
    known = logged_values(config, "val", group_of(monitor, "val") if groups is None else groups)
    others = [
        name for name, node in config["callbacks"].items() if node and name not in ("progress", "plots")
    ]

    def logged(monitor: str, others: Sequence[str]) -> bool:
        logging = [
            n for n in others if not str(config["callbacks"][n].get("_target_")).endswith("EarlyStopping")
        ]
        return is_among(monitor, known) or (bool(logging) and monitor.startswith("val"))

    if not logged(monitor, others):
        raise ConfigError(f"checkpoint.monitor={monitor}: this run never logs it{suggest(monitor, known)}")

    def check_watched(option: str, watched: str, others: Sequence[str]) -> None:
        if not logged(watched, others):
            raise ConfigError(f"{option}={watched}: this run never logs it{suggest(watched, known)}")
        if config["trainer"].get("limit_val_batches") == 0:
            raise ConfigError(
                f"{option}={watched}: trainer.limit_val_batches=0 leaves nothing to validate on"
            )

    for name in others:  # which would find out after an epoch
        node = config["callbacks"][name]
        ours, watched = node.get("_target_") == EARLY_STOPPING, node.get("monitor")
        if ours and watched is None:
            watched = node["monitor"] = monitor
        rest = [n for n in others if n != name]
        if ours or str(watched).startswith("val"):
            check_watched(f"callbacks.{name}.monitor", watched, rest)
        elif watched is not None and str(node.get("_target_")).endswith(("EarlyStopping", "ModelCheckpoint")):
            of_training = ("train/loss", "train/acc" if task == "classification" else "train/mae")
            if watched not in of_training and not rest:
                every = [*known, *of_training]
                raise ConfigError(
                    f"callbacks.{name}.monitor={watched}: this run never logs it{suggest(watched, every)}"
                )
    if config["model"].get("scheduler") == "Plateau":
        check_watched("model.lr_monitor", config["model"].get("lr_monitor") or "val/loss", others)


def resolve_precision(config: Config, settled: list[str]) -> None:
    """Settle the precision, in place.

    Raises:
        ConfigError: for one, or more devices, than the machine has.
    """
    trainer = config["trainer"]
    kind, count = device_kind(trainer["accelerator"]), device_count(trainer)
    if trainer["precision"] is None:
        bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        trainer["precision"] = "bf16-mixed" if bf16 else "16-mixed" if kind == "cuda" else "32-true"
        settled.append(f"precision {trainer['precision']}")
    if kind == "cpu" and str(trainer["precision"]) in ("16-mixed", "16"):
        raise ConfigError(
            f"trainer.precision={trainer['precision']} needs a GPU; on a CPU use 32-true or bf16-mixed"
        )
    if kind == "cuda" and count > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices={trainer['devices']}: this machine has {torch.cuda.device_count()} GPUs"
        )
    if trainer["sync_batchnorm"] is None:
        trainer["sync_batchnorm"] = kind == "cuda" and count * trainer["num_nodes"] > 1
    elif trainer["sync_batchnorm"] and kind != "cuda":
        raise ConfigError("trainer.sync_batchnorm=true needs GPUs; leave it null on a CPU")


def _resolve_machine(config: Config, data_module: Any, settled: list[str]) -> None:
    resolve_precision(config, settled)
    trainer, model = config["trainer"], config["model"]
    kind, count = device_kind(trainer["accelerator"]), device_count(trainer)
    world = count * trainer["num_nodes"]
    if step_of(config).setting.of(Norm).norm == "sync" and kind != "cuda":
        raise ConfigError(f"model.norm=sync needs GPUs, this run uses the {kind}; use batch or ghost")
    _fit_batch_size(config, data_module, world, settled)
    _check_boundaries(config, data_module, world, settled)
    if model["compile"] is None:
        techniques = step_of(config).setting.techniques.values()
        eager = [type(t).__name__ for t in techniques if t.on and not t.compiles]
        long = kind == "cuda" and run_length(config, data_module).steps >= LONG_RUN_STEPS
        model["compile"] = long and not eager
        why = f", {eager[0]} cannot be compiled" if eager else ""
        settled.append(f"compile {'on' if model['compile'] else 'off'}{why}")
    if model["compile"] == "default":
        model["compile"] = True  # two names of one thing are one run
    if model["compile"] in CUDA_GRAPHS and kind != "cuda":
        raise ConfigError(
            f"model.compile={model['compile']}: its CUDA graphs need a GPU of NVIDIA's, this run uses the {kind}; use "
            "true or max-autotune-no-cudagraphs"
        )
    trainer.setdefault("deterministic", config["reproducible"])
    trainer.setdefault("benchmark", kind == "cuda" and not config["reproducible"])


class Length(NamedTuple):
    """How long a run is; `epochs` may end in a part of one."""

    epochs: float
    steps_per_epoch: int

    @property
    def steps(self) -> float:
        """Optimizer steps of the whole run."""
        return float(round(self.epochs * self.steps_per_epoch)) if math.isfinite(self.epochs) else math.inf


def run_length(config: Config, data_module: Any) -> Length:
    """The length of the run: its epochs or its steps, whichever end first; infinite where neither is given."""
    trainer = config["trainer"]
    batches = _training_batches(trainer, data_module, world_size(trainer))
    a_epoch = max(1, math.ceil(batches / trainer["accumulate_grad_batches"]))
    return Length(training_length(trainer["max_epochs"], trainer["max_steps"], a_epoch), a_epoch)


def smallest_batch(config: Config, data_module: Any) -> int:
    """Samples on each device of the smallest batch that the training comes to."""
    trainer, size = config["trainer"], int(data_module.batch_size)
    if run_length(config, data_module).epochs < 1:
        return size  # it ends before the last batch of an epoch
    world = world_size(trainer)
    sampler = EpochSampler(len(data_module.samples("train")), size, 0, world_size=world)
    return sampler.size(_training_batches(trainer, data_module, world) - 1)


def _training_batches(trainer: Mapping[str, Any], data_module: Any, world: int) -> int:
    samples = len(data_module.samples("train"))
    batches = max(1, training_batches(samples, data_module.batch_size, world, data_module.drop_last))
    return batches_within(batches, trainer.get("overfit_batches") or trainer.get("limit_train_batches"))


_SMALLEST = {"r2": 2}  # samples that a metric needs, where it is more than one


def _check_boundaries(config: Config, data_module: Any, world: int, settled: list[str]) -> None:
    """Refuse lengths and limits that leave nothing of the data, or that the schedule does not fit in."""
    trainer = config["trainer"]
    batches = _training_batches(trainer, data_module, world)
    if batches < 1:
        name = "overfit_batches" if trainer.get("overfit_batches") else "limit_train_batches"
        raise ConfigError(
            f"trainer.{name}={trainer[name]}: no batch is left of {data_module.name}'s training samples"
        )
    schedule(read_options(ScheduleOptions, config["model"]), run_length(config, data_module).epochs)
    interval = trainer.get("val_check_interval")
    if isinstance(interval, int) and interval > batches and trainer["check_val_every_n_epoch"] is not None:
        raise ConfigError(f"trainer.val_check_interval={interval}: an epoch has only {batches} batches")
    for split in ("val", "test") if config["test_after_training"] else ("val",):
        name = f"limit_{split}_batches"
        if split == "val" and trainer.get("overfit_batches"):
            name = "overfit_batches"
        limit, samples = trainer.get(name), len(data_module.samples(split))
        if limit is not None and not limit:
            continue  # this split is left alone on purpose
        if samples < world:
            raise ConfigError(
                f"trainer.devices={trainer['devices']}: {data_module.name} has {samples} {split} samples, fewer than "
                f"{world} devices"
            )
        sampler = EvalSampler(samples, data_module.batch_size, world_size=world)
        seen = sampler.seen(limit)
        if not seen:
            raise ConfigError(
                f"trainer.{name}={limit}: no batch is left of the {len(sampler)} of the {split} split"
            )
        for metric in config["metrics"]:
            if seen < _SMALLEST.get(metric, 1):
                raise ConfigError(
                    f"metrics: {metric} needs {_SMALLEST[metric]} samples, the {split} split has {seen}"
                )
        if seen < samples:
            settled.append(f"{split} on {seen} drawn of {samples} samples")


def _fit_batch_size(config: Config, data_module: Any, world: int, settled: list[str]) -> None:
    """Where the data are fewer than one global batch, all of them make one."""
    samples, wanted = len(data_module.samples("train")), data_module.batch_size
    if samples >= wanted * world:
        return
    if samples < world:
        raise ConfigError(
            f"trainer.devices={config['trainer']['devices']}: {data_module.name} has {samples} training samples, "
            f"fewer than {world} devices"
        )
    data_module.batch_size = config["data"]["module"]["batch_size"] = samples // world
    settled.append(f"batch size {samples // world} instead of {wanted}: there are {samples} training samples")
