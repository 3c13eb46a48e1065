"""Every option with what its declaration allows, and values made from that: wrong ones and right ones.

The declaration is read here by itself, apart from `crucible.options`, which is what the values try.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import math
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from conftest import ROOT, TINY
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from callbacks.range_test import RangeOptions
from crucible.configuration import find_target, to_plain
from crucible.options import signature_options
from datasets.packed import PackOptions
from lab.cluster import ClusterOptions
from lab.config import AUTOMATIC_FROM_DATA, SWEEP_OPTIONS, model_options
from lab.planning import SweepOptions
from lab.search import SearchOptions
from models.base_model import BASICS, BaseModel
from models.exported import ExportOptions
from models.techniques import technique_kinds
from norms.convert import NORMS, norm_options

_INTERVAL = re.compile(r"([\[(])\s*([^,\s]+)\s*,\s*([^,\s]+)\s*([\])])")
HUGE = 10**400


@dataclass
class Allowed:
    """What a declaration allows.

    Attributes:
        kinds: types of plain values; `object` where anything goes.
        choices: single values.
        interval: of numbers, as written.
        members: of a list.
    """

    kinds: set[type] = field(default_factory=set)
    choices: list[Any] = field(default_factory=list)
    interval: tuple[str, float, float, str] | None = None
    members: Allowed | None = None

    @property
    def numbers(self) -> bool:
        return bool(self.kinds & {int, float})

    @property
    def declared(self) -> bool:
        """Whether both type and range are known: numbers have an interval, lists say what is in them."""
        if object in self.kinds or not (self.kinds or self.choices or self.members):
            return False
        if self.members is not None:
            return dataclasses.replace(self.members, interval=self.members.interval or self.interval).declared
        return not self.numbers or self.interval is not None


def read(annotation: Any) -> Allowed:
    """What an annotation allows."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is None:
        annotation = type(None)
    if origin is Annotated:
        inner = read(args[0])
        for text in annotation.__metadata__:
            if isinstance(text, str) and (match := _INTERVAL.fullmatch(text)):
                left, low, high, right = match.groups()
                inner.interval = left, float(low), float(high), right
        return inner
    if origin is Literal:
        return Allowed({type(None)} if None in args else set(), [a for a in args if a is not None])
    if origin in (Union, types.UnionType):
        whole = Allowed()
        for part in map(read, args):
            whole.kinds |= part.kinds
            whole.choices += part.choices
            whole.interval = whole.interval or part.interval
            whole.members = whole.members or part.members
        return whole
    name = getattr(origin, "__name__", "")
    if origin in (list, tuple) or name in ("Sequence", "Iterable"):
        return Allowed({list}, members=read(args[0]) if args else Allowed({object}))
    if annotation in (list, tuple):
        return Allowed({list}, members=Allowed({object}))
    if annotation is dict or origin is dict or name == "Mapping":
        return Allowed({dict})
    if annotation is Any or annotation is inspect.Parameter.empty or isinstance(annotation, (str, TypeVar)):
        return Allowed({object})
    return Allowed({annotation})


class Wrong(NamedTuple):
    """A value that is not allowed, and of which kind."""

    kind: str
    value: Any


def wrong_values(allowed: Allowed) -> list[Wrong]:
    """Values that are not allowed, the most usual mistakes first."""
    if object in allowed.kinds:
        return []
    kinds, found = allowed.kinds, []

    def add(kind: str, value: Any) -> None:
        if not any(w.value == value and type(w.value) is type(value) for w in found):
            found.append(Wrong(kind, value))

    texts = bool(kinds & {str, Path})
    if allowed.numbers and allowed.interval is not None:
        for number in _outside(allowed.interval, float in kinds):
            add("beyond a bound", [number] if allowed.members else number)
    if allowed.members is not None:
        members = dataclasses.replace(allowed.members, interval=allowed.members.interval or allowed.interval)
        for inner in wrong_values(members):
            add(f"list: {inner.kind}", [inner.value])
    if not texts:
        for choice in allowed.choices:
            if isinstance(choice, str):
                add("a near miss", choice[:-1] + ("y" if choice[-1] != "y" else "z"))
                break
        add("a text", "abc")
    if bool not in kinds and True not in [c for c in allowed.choices if isinstance(c, bool)]:
        add("a switch", True)
    if int in kinds and float not in kinds:
        add("a fraction", 2.5)
    if float in kinds or int in kinds:
        add("no number", math.nan)
        if allowed.interval is None or not (allowed.interval[3] == "]" and math.isinf(allowed.interval[2])):
            add("infinite", math.inf)
            add("infinite", -math.inf)
        add("huge", HUGE)
        add("huge", -HUGE)
    elif not any(isinstance(c, (int, float)) and not isinstance(c, bool) for c in allowed.choices):
        add("a number", 7)
        add("a number", 0.5)
    if type(None) not in kinds:
        add("null", None)
    add("empty text", "")
    if list not in kinds:
        add("a list", [1, 2])
        add("an empty list", [])
    if dict not in kinds:
        add("a mapping", {"a": 1})
    return found


def _outside(interval: tuple[str, float, float, str], fractions: bool) -> Iterator[Any]:
    left, low, high, right = interval
    as_number = (lambda v: v) if fractions else int
    if math.isfinite(low):
        yield as_number(low - 1)
        if left == "(":
            yield as_number(low)
    if math.isfinite(high):
        yield as_number(high + 1)
        if right == ")":
            yield as_number(high)
    if low >= 0:
        yield -1 if not fractions else -0.5


@dataclass(frozen=True)
class Option:
    """An option of a room.

    Attributes:
        room: whose it is.
        name: dotted, as typed.
        annotation: its declaration.
        base: overrides that the configuration is composed with.
        default: its default.
    """

    room: str
    name: str
    annotation: Any
    base: tuple[str, ...] = ()
    default: Any = None

    @property
    def allowed(self) -> Allowed:
        return read(self.annotation)


@cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    """The configuration of a tiny run; shared, so not to be changed."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        return compose("train", [*TINY, *overrides])


@cache
def _plain(overrides: tuple[str, ...]) -> dict[str, Any]:
    config = to_plain(composed(overrides), overrides)
    for option in SWEEP_OPTIONS:
        del config[option]
    _fit(config["model"], config)
    _fit(config["data"]["module"], config)
    for role in ("train_transforms", "test_transforms"):
        if isinstance(node := config["data"]["module"].get(role), dict):
            _fit(node, config)
    return config


def _fit(node: dict[str, Any], config: dict[str, Any]) -> None:
    """Leave what the class of a node takes, and give it what it must have."""
    target = find_target(node["_target_"], "")
    known = model_options(target) if node is config["model"] else signature_options(target)
    for name in [n for n in node if n not in known and n != "_target_"]:
        del node[name]
    for name, (annotation, default) in known.items():
        choices = read(annotation).choices
        if choices == [True] and node.get(name) not in choices:  # what makes the class what it is
            node[name] = True
        if default is inspect.Parameter.empty and name not in node:
            node[name] = right_values(read(annotation))[0]


def plain(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The same in plain containers, one's own."""
    return copy.deepcopy(_plain(overrides))


def right_values(allowed: Allowed) -> list[Any]:
    """Values that are allowed, also at the bounds."""
    found: list[Any] = list(allowed.choices)
    if bool in allowed.kinds:
        found += [True, False]
    if allowed.numbers and allowed.interval is not None:
        left, low, high, right = allowed.interval
        whole = float not in allowed.kinds
        inner = [low if left == "[" else None, high if right == "]" else None]
        if math.isfinite(low) and math.isfinite(high):
            inner += [low + (high - low) * part for part in (0.01, 0.3, 0.9)]
        elif math.isfinite(low):
            inner += [low + 1, low + 2, low + 7]
        numbers = [int(v) if whole else v for v in inner if v is not None and math.isfinite(v)]
        found += [[v] for v in numbers] if allowed.members else numbers
    if type(None) in allowed.kinds:
        found.append(None)
    if not found and str in allowed.kinds:
        found.append("a")
    return found


def put(config: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """`config` with the dotted option set."""
    *parents, last = name.split(".")
    node = config
    for part in parents:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value
    return config


def classes_of(*packages: str, base: type) -> list[type]:
    """The public subclasses of `base` that the packages define."""
    found: dict[str, type] = {}
    for package in packages:
        folder = ROOT / package.replace(".", "/")
        for file in sorted(folder.rglob("*.py")):
            module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            for name, kind in vars(module).items():
                own = inspect.isclass(kind) and issubclass(kind, base) and kind.__module__ == module.__name__
                if own and not name.startswith("_"):
                    found[f"{module.__name__}.{name}"] = kind
    return [found[name] for name in sorted(found)]


def path_of(kind: type) -> str:
    """As a `_target_` names it."""
    return f"{kind.__module__}.{kind.__name__}"


def all_options() -> list[Option]:
    """Every option of every room, model, data module, policy, callback and logger."""
    return [
        *_root(), *_sweeps(), *_packs(), *_tuning(), *_basics(), *_models(), *_data(), *_policies(), *_trainer(),
        *_checkpoint(), *_callbacks(), *_norms(),
    ]  # fmt: skip


def _fields(kind: type, room: str, prefix: str, base: tuple[str, ...] = ()) -> Iterator[Option]:
    hints = get_type_hints(kind, include_extras=True)
    for f in dataclasses.fields(kind):
        yield Option(room, f"{prefix}{f.name}", hints[f.name], base, f.default)


def _root() -> Iterator[Option]:
    from lab import config

    types_of = getattr(config, "ROOT_TYPES", {})
    for name in config.ROOT:
        if name not in (
            "model",
            "data",
            "trainer",
            "checkpoint",
            "callbacks",
            "logger",
            "techniques",
            "pack",
            "tune",
            "export",
        ):
            yield Option("run", name, types_of.get(name, Any))
    data = getattr(config, "DATA_TYPES", {})
    for name in ("task", "num_classes", "input_channels", "input_size", "input_dim", "cv.k"):
        yield Option("data", f"data.{name}", data.get(name, Any))


def _sweeps() -> Iterator[Option]:
    yield from _fields(SweepOptions, "sweep", "")
    yield from _fields(SearchOptions, "search", "search.")
    yield from _fields(ClusterOptions, "cluster", "cluster.")


def _packs() -> Iterator[Option]:
    yield from _fields(PackOptions, "pack", "pack.", ("task=pack", "out=pack"))
    yield from _fields(ExportOptions, "export", "export.", ("task=export",))


def _tuning() -> Iterator[Option]:
    yield from _fields(RangeOptions, "tune", "tune.", ("task=tune",))


def _basics() -> Iterator[Option]:
    for kind in (*BASICS, *technique_kinds()):
        yield from _fields(kind, kind.__module__, "model.")
    for name, (annotation, default) in signature_options(BaseModel).items():
        if name not in ("task", "num_classes", "input_channels", "input_dim", "metrics", "seed"):
            yield Option("models.base_model", f"model.{name}", annotation, (), default)
    yield Option("models.base_model", "model.init_from", str | None)


def _models() -> Iterator[Option]:
    common = signature_options(BaseModel)
    for kind in classes_of("models", base=BaseModel):
        required = [a for a, d in signature_options(kind).values() if d is inspect.Parameter.empty]
        if kind is BaseModel or any(not read(a).declared for a in required):  # what families share
            continue
        for name, (annotation, default) in signature_options(kind).items():
            if name in AUTOMATIC_FROM_DATA:
                annotation = annotation | None
            if name not in common:
                base = (f"model._target_={path_of(kind)}",)
                yield Option(path_of(kind), f"model.{name}", annotation, base, default)


def _data() -> Iterator[Option]:
    from datasets.base_datamodule import BaseDataModule

    common = signature_options(BaseDataModule)
    for name, (annotation, default) in common.items():
        if name not in ("train_transforms", "test_transforms"):
            yield Option("datasets.base_datamodule", f"data.module.{name}", annotation, (), default)
    for kind in classes_of("datasets", base=BaseDataModule):
        for name, (annotation, default) in signature_options(kind).items():
            if name not in common:
                base = (f"data.module._target_={path_of(kind)}",)
                yield Option(path_of(kind), f"data.module.{name}", annotation, base, default)


def _policies() -> Iterator[Option]:
    from augmentation.policies.base import Policy

    for kind in classes_of("augmentation/policies", base=Policy):
        if kind.__module__.endswith(".base"):
            continue
        base = (f"++data.module.train_transforms._target_={path_of(kind)}",)
        for name, (annotation, default) in signature_options(kind).items():
            yield Option(path_of(kind), f"data.module.train_transforms.{name}", annotation, base, default)


def _trainer() -> Iterator[Option]:
    from lab import config

    ours = config._OURS_NOT_THE_TRAINERS
    for name, (annotation, default) in signature_options(config.Trainer).items():
        if name not in ours:
            yield Option(
                "trainer", f"trainer.{name}", config._TRAINER_TYPES.get(name, annotation), (), default
            )


def _checkpoint() -> Iterator[Option]:
    from callbacks.checkpoints import Checkpoints

    for name, (annotation, default) in signature_options(Checkpoints).items():
        if name != "folder":
            yield Option("checkpoint", f"checkpoint.{name}", annotation, (), default)


def _callbacks() -> Iterator[Option]:
    from lightning.pytorch import Callback

    import crucible.loggers as loggers
    from callbacks.checkpoints import Checkpoints

    for kind in classes_of("callbacks", base=Callback):
        handed_in = any(d is inspect.Parameter.empty for _, d in signature_options(kind).values())
        if kind is not Checkpoints and not handed_in:  # else it is made by Crucible, not by an option
            base = (f"++callbacks.tried._target_={path_of(kind)}",)
            for name, (annotation, default) in signature_options(kind).items():
                yield Option(path_of(kind), f"callbacks.tried.{name}", annotation, base, default)
    for kind in (loggers.Wandb, loggers.TensorBoard, loggers.MLflow):
        base = (f"++logger.tried._target_={path_of(kind)}",)
        for name, (annotation, default) in signature_options(kind).items():
            if name not in ("folder", "facts"):  # handed in
                yield Option(path_of(kind), f"logger.tried.{name}", annotation, base, default)


def _norms() -> Iterator[Option]:
    for norm in NORMS:
        for name, (annotation, default) in norm_options(norm).items():
            yield Option("norms", f"model.norm_kwargs.{name}", annotation, (f"model.norm={norm}",), default)
