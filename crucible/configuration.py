"""A composed configuration as plain containers: read, searched, flattened, and what of it makes a run's identity."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from crucible import rooms
from crucible.options import ConfigError, signature_options, suggest
from crucible.other_words import module_here
from crucible.trust import shadowed

Config = dict[str, Any]

# What does not change the result: left out of a run's identity.
NOT_SEMANTIC = {
    "seed", "arm", "techniques", "task", "exp_dir", "data_dir", "user_dir", "fresh", "ckpt_path", "run",
    "summary_depth", "out", "pack", "tune", "calibrate", "tta", "format", "export",
    "test_after_training", "checkpoint", "callbacks.progress", "callbacks.plots", "logger", "data.cv",
    "data.module._target_", "data.module.name", "data.module.data_root_dir", "data.module.num_workers",
    "data.module.stylized_root_dir", "data.module.train_transforms.pipeline_file",
    "data.module.test_transforms.pipeline_file",
    "data.module.prefetch_factor", "data.module.predict_dir", "data.module.class_map", "data.module.persistent_workers",
    "data.module.corruption", "data.module.severity", "data.module.real_labels",
    "data.module.cache", "data.module.decoder", "data.module.on_error",
    "data.module.pin_memory", "data.module.seed", "data.module.csv_file",
    "data.module.train_shards", "data.module.val_shards", "data.module.test_shards", "data.module.classes_file",
    "model.seed", "model.metrics",
    "model.init_from", "trainer.accelerator", "trainer.strategy", "trainer.log_every_n_steps",
    "trainer.enable_progress_bar", "trainer.profiler", "trainer.detect_anomaly",
}  # fmt: skip


def to_plain(config: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """The configuration as plain containers, interpolations resolved, short names of networks spelled out.

    Args:
        config: composed.
        overrides: what was typed for it.

    Raises:
        ConfigError: as `spell_out`.
    """
    node = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
    plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    if isinstance(plain.get("model"), dict):
        spell_out(plain["model"], overrides)
    return plain  # type: ignore[return-value]


def spell_out(model: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    """Put a family's variant under its `_target_`, in place, where it is named in short: model=resnet model.depth=50.

    A class says in `short` what it is called (`{"depth": 50}`). The two spellings make one configuration, and so one
    run. A short name wins over the `_target_` of a file, and what was typed over both.

    Args:
        model: the options of the model.
        overrides: what was typed.

    Raises:
        ConfigError: for a variant that the family does not have, and where another `_target_` was typed beside it.
    """
    path = model.get("_target_")
    if not isinstance(path, str) or not model.keys() & _SHORT:
        return
    target = find_target(path, "model._target_")
    family = sys.modules[target.__module__]
    module = rooms.public(family.__name__)
    typed = {o.lstrip("+").partition("=")[0] for o in overrides}
    variants: dict[str, dict[Any, str]] = {}
    for name, kind in vars(family).items():
        if inspect.isclass(kind) and kind.__module__ == family.__name__:
            for option, value in vars(kind).get("short", {}).items():
                variants.setdefault(option, {})[value] = f"{module}.{name}"
    for option, known in variants.items():
        wanted = model.pop(option, None)
        short_typed, target_typed = f"model.{option}" in typed, "model._target_" in typed
        if wanted is None or (target_typed and not short_typed):
            continue
        if isinstance(wanted, bool) or wanted not in tuple(known):
            raise ConfigError(
                f"model.{option}={wanted!r}: {module} has {', '.join(map(str, known))}",
                see="docs/models.md",
            )
        if target_typed and known[wanted] != path:
            raise ConfigError(
                f"model.{option}={wanted} is {known[wanted]}, and model._target_={path} another network: give one of "
                "the two",
                see="docs/models.md",
            )
        model["_target_"] = known[wanted]
    for option in _SHORT & model.keys():  # the file of a family has it, a class of one's own need not
        if model[option] is None and option not in signature_options(target):
            del model[option]


_SHORT = {"depth", "type"}  # the options by which variants are named


LONGEST_NAME = 100  # bytes; a folder's name has at most 255, and we add to it


def check_name(option: str, name: Any) -> None:
    """Refuse what cannot be the name of a folder of its own within another one.

    Raises:
        ConfigError: naming the option.
    """
    if not isinstance(name, str) or not name.strip() or name in (".", "..") or name.startswith("~"):
        reason = "a name is a text, such as flowers"
    elif any(c in "/\\" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        reason = "it is the name of one folder: without / and \\ and control characters; exp_dir says where it lies"
    elif (length := len(name.encode())) > LONGEST_NAME:
        reason = f"it has {length} bytes; a name has at most {LONGEST_NAME}"
    else:
        return
    shown = repr(name) if len(repr(name)) < 80 else f"{repr(name)[:60]}..."
    raise ConfigError(f"{option}={shown}: {reason}")


def select(config: Mapping[str, Any], name: str) -> Any:
    """The value of the dotted option `name`, or None where it is not there."""
    node: Any = config
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """`{dotted name: value}` of nested mappings; an empty mapping is a value."""
    if not (isinstance(node, Mapping) and node):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def is_semantic(name: str) -> bool:
    """Whether the dotted option changes a run's result, and so its identity."""
    parts = name.split(".")
    return not any(".".join(parts[: i + 1]) in NOT_SEMANTIC for i in range(len(parts)))


def find_target(path: str, option: str) -> Any:
    """The object that a `_target_` names.

    Raises:
        ConfigError: naming the option, where there is no such module or object.
    """
    module_name, _, attribute = str(path).rpartition(".")
    if hidden := shadowed(str(path)):
        raise ConfigError(f"{option}={path}: {hidden}", see="docs/extending.md")
    try:
        module = rooms.import_module(module_name)
    except ModuleNotFoundError as error:
        absent = rooms.public(error.name or "")
        if absent and (module_name == absent or module_name.startswith(f"{absent}.")):
            raise ConfigError(
                f"{option}={path}: there is no module {absent}", see="docs/extending.md"
            ) from None
        if here := module_here(absent):
            raise ConfigError(
                f"{option}={path} imports {absent}; here: {here}", see="docs/extending.md"
            ) from error
        raise ConfigError(f"{option}={path} needs the package {absent}, which is not installed") from error
    except (
        ImportError
    ) as error:  # a relative import in a file of one's own, which is no package, or a wrong name
        raise ConfigError(
            f"{option}={path} cannot be imported: {' '.join(str(error).split())}; import by the full name, such as "
            "from datasets.base_datamodule import BaseDataModule",
            see="docs/extending.md",
        ) from error
    except ValueError:
        raise ConfigError(f"{option}={path!r} is not of the form module.Class") from None
    if not hasattr(module, attribute):
        classes = {n: v for n, v in vars(module).items() if inspect.isclass(v)}
        public = [n for n, v in classes.items() if rooms.public(v.__module__) == module_name]
        raise ConfigError(f"{option}={path}: {module_name} has no {attribute}{suggest(attribute, public)}")
    return getattr(module, attribute)
