"""From a composed configuration to one that can be run: checked, resolved for data and machine, identified."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import DictConfig, OmegaConf

from crucible.options import (
    ConfigError,
    check_arguments,
    check_value,
    read_options,
    signature_options,
    suggest,
)

Config = dict[str, Any]

# What does not change the result: left out of a run's identity.
NOT_SEMANTIC = {
    "seed", "arm", "techniques", "task", "exp_dir", "data_dir", "user_dir", "fresh", "ckpt_path", "run",
    "summary_depth",
    "test_after_training", "checkpoint", "callbacks.progress", "callbacks.plots", "logger", "data.cv",
    "data.module._target_", "data.module.name", "data.module.data_root_dir", "data.module.num_workers",
    "data.module.prefetch_factor", "data.module.predict_dir", "data.module.persistent_workers",
    "data.module.pin_memory", "data.module.seed", "data.module.csv_file", "model.seed", "model.metrics",
    "model.init_from", "model.teacher", "trainer.accelerator", "trainer.strategy", "trainer.log_every_n_steps",
    "trainer.enable_progress_bar", "trainer.profiler", "trainer.detect_anomaly",
}  # fmt: skip
# what `python main.py -m` does with its jobs (`crucible.sweep`); no fact of a run
SWEEP_OPTIONS = (
    "design", "dry_run", "retry_failed", "baseline", "equal_time", "margin_points", "planned_seeds", "n_jobs",
    "cluster", "search",
)  # fmt: skip
LONG_RUN_STEPS = 5000

_TRAINER_TYPES: dict[str, Any] = {
    "max_epochs": Annotated[int, "[1, inf)"],
    "max_steps": Annotated[int, "[-1, inf)"],
    "num_nodes": Annotated[int, "[1, inf)"],
    "accumulate_grad_batches": Annotated[int, "[1, inf)"],
    "gradient_clip_val": Annotated[float, "(0, inf)"] | None,
    "check_val_every_n_epoch": Annotated[int, "[1, inf)"],
    "log_every_n_steps": Annotated[int, "[1, inf)"],
    "overfit_batches": Annotated[float, "[0, inf)"],
}


def to_plain(config: DictConfig) -> Config:
    """The configuration as plain containers, interpolations resolved."""
    node = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
    plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def select(config: Mapping[str, Any], name: str) -> Any:
    """The value of the dotted option `name`, or None where it is not there."""
    node: Any = config
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def find_target(path: str, option: str) -> Any:
    """The object that a `_target_` names.

    Raises:
        ConfigError: naming the option, where there is no such module or object.
    """
    module_name, _, attribute = str(path).rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"{option}={path}: there is no module {error.name}", see="docs/extending.md"
            ) from None
        raise ConfigError(
            f"{option}={path} needs the package {error.name}, which is not installed"
        ) from error
    except ValueError:
        raise ConfigError(f"{option}={path!r} is not of the form module.Class") from None
    if not hasattr(module, attribute):
        public = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module_name]
        raise ConfigError(f"{option}={path}: {module_name} has no {attribute}{suggest(attribute, public)}")
    return getattr(module, attribute)


def check(config: Config, overrides: Sequence[str]) -> None:
    """Refuse what cannot be run, before any data is read.

    Args:
        config: the plain configuration.
        overrides: the command line's overrides, as typed.

    Raises:
        ConfigError: one line naming the option, its value, and what is allowed.
    """
    from augmentation.distortions import DistortionOptions, check_distortions
    from models.base_model import check_options

    check_value("task", config["task"], Literal["train", "test", "predict", "summary"])
    check_value("summary_depth", config["summary_depth"], Annotated[int, "[1, inf)"])
    check_value("seed", config["seed"], Annotated[int, "[0, 4294967295]"])
    for name in ("fresh", "test_after_training", "reproducible"):
        check_value(name, config[name], bool)
    _check_techniques(config, overrides)
    _check_trainer(config["trainer"])
    _check_checkpoint(config["checkpoint"])
    _check_data(config["data"])
    _check_model(config["model"])
    check_options(config["model"], config["data"]["task"], config["trainer"]["accumulate_grad_batches"])
    check_distortions(read_options(DistortionOptions, config["model"]), config["data"])
    from crucible.metrics import check_metrics

    check_value("metrics", config["metrics"], list[str])
    check_metrics(config["metrics"], config["data"]["task"], config["data"]["num_classes"] or 1000)
    for group in ("callbacks", "logger"):
        for name, node in config[group].items():
            if isinstance(node, Mapping):
                _check_node(node, f"{group}.{name}")
            elif not (node is None or node is False or (group == "logger" and node is True)):
                raise ConfigError(f"{group}.{name} must be null or have a _target_, got {node!r}")


def _check_node(node: Mapping[str, Any], prefix: str) -> None:
    """A `_target_` node: its target exists and takes its keys; nodes within likewise."""
    if "_target_" not in node:
        raise ConfigError(f"{prefix} needs a _target_, got {dict(node)!r}")
    target = find_target(node["_target_"], f"{prefix}._target_")
    nested = [k for k, v in node.items() if isinstance(v, Mapping) and "_target_" in v]
    for name in nested:
        _check_node(node[name], f"{prefix}.{name}")
    check_arguments(target, node, prefix, given=nested)


def model_options(target: Any) -> dict[str, tuple[Any, Any]]:
    """`{name: (annotation, default)}` of all that `model.*` may hold for this target: its own and the rooms'."""
    from models.base_model import ROOMS

    known = dict(signature_options(target))
    for room in ROOMS:
        hints = get_type_hints(room, include_extras=True)
        known.update({f.name: (hints[f.name], f.default) for f in dataclasses.fields(room)})
    known["init_from"] = (str | None, None)
    known["compile"] = (bool | None, None)
    return known


def _check_model(model: Mapping[str, Any]) -> None:
    target = find_target(model.get("_target_", ""), "model._target_")
    from models.base_model import BaseModel

    if not (inspect.isclass(target) and issubclass(target, BaseModel)):
        raise ConfigError(
            f"model._target_={model['_target_']}: must be a subclass of models.base_model.BaseModel"
        )
    later = [n for n in (*AUTOMATIC_FROM_DATA, "num_classes") if n in model and model[n] is None]
    own = signature_options(target).keys() - signature_options(BaseModel).keys()
    check_arguments(target, model, "model", known=model_options(target), given=later, listed=own)


def _check_data(data: Mapping[str, Any]) -> None:
    check_value("data.task", data.get("task"), Literal["classification", "regression"])
    check_value("data.num_classes", data.get("num_classes"), Annotated[int, "[1, inf)"] | None)
    check_value("data.cv.k", data["cv"]["k"], Annotated[int, "[1, inf)"])
    for name in data:
        if name not in ("module", "cv", "task", "num_classes", "input_channels", "input_size", "input_dim"):
            raise ConfigError(
                f"data.{name}={data[name]!r}: no such option; options of the data set are data.module.*"
            )
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


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    from lightning.pytorch import Trainer

    known = signature_options(Trainer)
    for name, value in trainer.items():
        if name in _OURS_NOT_THE_TRAINERS:
            raise ConfigError(f"trainer.{name}={value!r}: set {_OURS_NOT_THE_TRAINERS[name]} instead")
        if name not in known:
            raise ConfigError(f"trainer.{name}={value!r}: Lightning has no such option{suggest(name, known)}")
        if name == "max_epochs" and value in (-1, None) and trainer.get("max_steps", -1) > 0:
            continue
        if name in ("precision", "sync_batchnorm") and value is None:
            continue
        check_value(f"trainer.{name}", value, _TRAINER_TYPES.get(name, known[name][0]))
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        value = trainer.get(name)
        if (isinstance(value, float) and not 0 <= value <= 1) or (isinstance(value, int) and value < 0):
            raise ConfigError(
                f"trainer.{name} must be a fraction in [0, 1] or a number of batches, got {value!r}"
            )
    if any(word in str(trainer["strategy"]) for word in ("spawn", "fork", "notebook")):
        raise ConfigError(
            f"trainer.strategy={trainer['strategy']}: the ranks of a run are processes of their own; use auto or ddp"
        )


def _check_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    from callbacks.checkpoints import Checkpoints

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
    resolve_monitor(config)
    _resolve_machine(config, data_module, settled)
    config["logger"] = {n: _LOGGERS.get(n, v) if v is True else v for n, v in config["logger"].items()}
    return settled


def resolve_network(config: Config) -> None:
    """Settle what the network takes from the size of its input, in place."""
    if "cifar_size" in config["model"] and config["model"]["cifar_size"] is None:
        config["model"]["cifar_size"] = config["data"]["input_size"] < SMALL_IMAGE


_LOGGERS = {
    "tensorboard": {"_target_": "crucible.loggers.TensorBoard"},
    "wandb": {"_target_": "crucible.loggers.Wandb"},
}


def resolve_monitor(config: Config) -> None:
    """Settle which value says what the best epoch is, in place.

    Raises:
        ConfigError: for one that is never logged, which would keep no best.ckpt.
    """
    from crucible.metrics import build_metrics
    from optimizers.averaging import AveragingOptions

    checkpoint, task = config["checkpoint"], config["data"]["task"]
    names = ["loss", *build_metrics(config["metrics"], task, config["data"]["num_classes"])]
    if checkpoint["monitor"] is None:
        checkpoint["monitor"] = "val/acc" if task == "classification" and "acc" in names else "val/loss"
    monitor = checkpoint["monitor"]
    splits = ["val", "val_raw"] if read_options(AveragingOptions, config["model"]).on else ["val"]
    known = [f"{split}/{name}" for split in splits for name in names]
    others = [
        name for name, node in config["callbacks"].items() if node and name not in ("progress", "plots")
    ]
    of_a_class = monitor.rpartition("/")[0] in known
    if not (monitor in known or of_a_class or (others and monitor.startswith("val"))):
        raise ConfigError(f"checkpoint.monitor={monitor}: this run never logs it{suggest(monitor, known)}")


def device_kind(accelerator: str) -> str:
    """`cuda`, `mps` or `cpu`: what Lightning will choose for `trainer.accelerator`."""
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    if accelerator in ("gpu", "cuda", "mps"):
        raise ConfigError(f"trainer.accelerator={accelerator}: this machine has none; use auto or cpu")
    return "cpu" if accelerator in ("auto", "cpu") else accelerator


def device_count(trainer: Mapping[str, Any]) -> int:
    """The devices on one node that `trainer.devices` asks for."""
    import torch

    devices = trainer["devices"]
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) if device_kind(trainer["accelerator"]) == "cuda" else 1
    if isinstance(devices, int):
        if devices < 1:
            raise ConfigError(f"trainer.devices must be at least 1, a list, or auto, got {devices}")
        return devices
    return len(devices) if isinstance(devices, list) else len([d for d in str(devices).split(",") if d])


def _resolve_machine(config: Config, data_module: Any, settled: list[str]) -> None:
    import torch

    trainer, model = config["trainer"], config["model"]
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
    world = count * trainer["num_nodes"]
    if model.get("norm") == "sync" and kind != "cuda":
        raise ConfigError(f"model.norm=sync needs GPUs, this run uses the {kind}; use batch or ghost")
    _fit_batch_size(config, data_module, world, settled)
    if model["compile"] is None:
        model["compile"] = kind == "cuda" and total_steps(config, data_module) >= LONG_RUN_STEPS
        settled.append(f"compile {'on' if model['compile'] else 'off'}")
    trainer.setdefault("deterministic", config["reproducible"])
    trainer.setdefault("benchmark", kind == "cuda" and not config["reproducible"])


def total_steps(config: Config, data_module: Any) -> float:
    """The optimizer steps of the whole run, which epochs or steps bound; infinite where neither does."""
    trainer = config["trainer"]
    world = device_count(trainer) * trainer["num_nodes"]
    batches: float = max(1, len(data_module.samples("train")) // (data_module.batch_size * world))
    if (limit := trainer.get("limit_train_batches")) is not None:
        batches = min(batches, limit) if isinstance(limit, int) else batches * limit
    a_epoch = math.ceil(batches / trainer["accumulate_grad_batches"])
    epochs, steps = trainer["max_epochs"], trainer["max_steps"]
    bounds = [float(epochs * a_epoch)] if epochs and epochs > 0 else []
    return min([*bounds, float(steps)] if steps > 0 else bounds, default=math.inf)


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


def arm_name(config: Config, overrides: Sequence[str], swept: Collection[str] | None = None) -> str:
    """What this run is called in a comparison: its techniques, and the options that make it differ.

    Args:
        config: plain.
        overrides: what was typed for this run.
        swept: the options that differ between the jobs of a sweep; None: this is no sweep, and the `model.*`
            options typed make the difference.
    """
    if config["arm"]:
        return str(config["arm"])
    techniques = sorted(t for t in config.get("techniques") or {} if t != "baseline")
    parts = ["+".join(techniques)] if techniques else []
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        ours = name.startswith("model.") if swept is None else name in swept
        if ours and name not in ("seed", "technique", "data.module.fold"):
            parts.append(f"{name.removeprefix('model.')}={value}")
    return " ".join(parts) or "baseline"


def identity(config: Config, contents: Mapping[str, str | None]) -> str:
    """Eight hex digits that tell runs with different results apart.

    Hashed are the values that change the result and differ from their defaults, and what the data and the
    initial weights contain. Paths, workers, logging, and new options at their default do not change it.

    Args:
        config: plain and resolved.
        contents: fingerprints of what paths lead to: the data, the initial weights or state.
    """
    semantic = {n: v for n, v in _flatten(config) if is_semantic(n) and not _is_default(config, n, v)}
    semantic["model._target_"] = config["model"]["_target_"]
    semantic.update({f"content of {name}": value for name, value in contents.items() if value})
    semantic["devices"] = device_count(config["trainer"])
    semantic.pop("trainer.devices", None)
    text = json.dumps(semantic, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def kind(config: Config) -> str:
    """Eight hex digits that runs share which cost about the same a step: network, data, batch and precision."""
    from models.base_model import BaseModel

    target = find_target(config["model"]["_target_"], "")
    own = set(signature_options(target)) - set(signature_options(BaseModel))
    of_the_cost = {
        n: v
        for n, v in _flatten(config)
        if is_semantic(n)
        and (
            n.startswith("data.")
            or n in ("trainer.precision", "trainer.devices")
            or n.removeprefix("model.") in own
        )
        and not n.startswith("data.module.fold")
    }
    text = json.dumps({"model": config["model"]["_target_"], **of_the_cost}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_semantic(name: str) -> bool:
    """Whether the dotted option changes a run's result, and so its identity."""
    parts = name.split(".")
    return not any(".".join(parts[: i + 1]) in NOT_SEMANTIC for i in range(len(parts)))


def _flatten(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        return [pair for k, v in node.items() for pair in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, node)]


def _is_default(config: Config, name: str, value: Any) -> bool:
    if value is None:
        return True
    room, _, option = name.partition(".")
    if room == "model" and option in (known := model_options(find_target(config["model"]["_target_"], ""))):
        return known[option][1] == value
    if room == "trainer":
        from lightning.pytorch import Trainer

        default = signature_options(Trainer).get(option, (None, None))[1]
        return value == default or (default is None and value is False)
    if name.startswith("data.module."):
        known = signature_options(find_target(config["data"]["module"]["_target_"], ""))
        option = option.removeprefix("module.")
        return option in known and known[option][1] == value
    return name == "reproducible" and value is False


def is_child_rank() -> bool:
    """Whether another process of the same run writes its records."""
    ranks = ("LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID", "GROUP_RANK")
    return any(os.environ.get(r, "0") not in ("", "0") for r in ranks)
