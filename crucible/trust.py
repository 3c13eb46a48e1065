"""Typed against recorded: what a folder records is followed only where it names a class that belongs at its place.

What was typed in this command is the user's own, and so is what its parent was told (`crucible.handover`). What a run's
config.yaml names may be somebody else's: `judge` looks at every name in it before anything of it is imported.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crucible import rooms
from crucible.command_line import option
from crucible.handover import pass_on, received
from crucible.options import ConfigError

SEE = "docs/extending.md"
_OURS = ("augmentation", "callbacks", "crucible", "datasets", "losses", "models", "norms", "optimizers")
_NAME = re.compile(r"(?!_)[A-Za-z]\w*(\.(?!__)[A-Za-z_]\w*)+", re.ASCII)
_KEYS = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


@dataclass(frozen=True)
class Kind:
    """What belongs at a place of a configuration.

    Attributes:
        words: for the reader.
        bases: of one of these it must be a subclass, by the packages that it may come from.
    """

    words: str
    bases: tuple[tuple[tuple[str, ...], str], ...]

    def base(self, name: str) -> str | None:
        """The base class that an object of this dotted name must have, `object` for any class; None: none may."""
        for packages, base in self.bases:
            if any(name.startswith(f"{package}.") for package in packages):
                return base
        return None


_MODULE, _OPTIMIZER = "torch.nn.Module", "torch.optim.Optimizer"
_NETWORK = Kind("a model of Crucible", ((_OURS, "models.base_model.BaseModel"),))
_STAGE = Kind("a technique of Crucible", ((_OURS, "crucible.technique.Technique"),))
_DATA = Kind("a data module of Crucible", ((_OURS, "datasets.base_datamodule.BaseDataModule"),))
_CALLBACK = Kind(
    "a callback of Crucible or Lightning",
    (((*_OURS, "lightning.pytorch.callbacks"), "lightning.pytorch.callbacks.Callback"),),
)
_LOGGER = Kind(
    "a logger of Crucible or Lightning",
    (((*_OURS, "lightning.pytorch.loggers"), "lightning.pytorch.loggers.Logger"),),
)
_PART = Kind(
    "a module or transform of Crucible, torch, torchvision, timm or albumentations",
    (
        (("torchvision.transforms", "timm.data.transforms", "timm.data.auto_augment"), "object"),
        (("timm.data.random_erasing", "timm.data.mixup"), "object"),
        (("albumentations",), "albumentations.core.serialization.Serializable"),
        (("torch.optim", "timm.optim"), _OPTIMIZER),
        ((*_OURS, "torch.nn", "torchvision.ops", "timm.layers"), _MODULE),
    ),
)
_TOP = {"model": _NETWORK, "callbacks": _CALLBACK, "logger": _LOGGER}


def _kind(place: tuple[str, ...]) -> Kind | None:
    """What belongs at a place; None where nothing is built."""
    if place == ("model",) or (len(place) == 2 and place[0] in ("callbacks", "logger")):
        return _TOP[place[0]]
    if place == ("data", "module"):
        return _DATA
    inside = len(place) > 1 and (place[0] in _TOP or (place[:2] == ("data", "module") and len(place) > 2))
    return _PART if inside else None


@dataclass(frozen=True)
class _Recorded:
    """Something that would be followed: the option, what it says, and what may stand there."""

    option: str
    value: Any
    kind: Kind | None


def _walk(node: Any, place: tuple[str, ...] = ()) -> Iterator[_Recorded]:
    """All that names an object, changes how one is called, or is resolved from outside the configuration."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            option = ".".join((*place, str(key)))
            if key == "_target_":
                yield _Recorded(option, value, _kind(place))
            elif _calls_otherwise(key, value, _kind(place)):
                yield _Recorded(option, value, None)
            elif place == ("model", "stages"):
                yield _Recorded(option, value, _STAGE)
            else:
                yield from _walk(value, (*place, str(key)))
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            yield from _walk(value, (*place, str(number)))
    elif isinstance(node, str) and "${" in node:
        yield _Recorded(".".join(place), node, None)


def _calls_otherwise(key: Any, value: Any, kind: Kind | None) -> bool:
    """Whether an entry is one of Hydra's own, and not one that a class of this kind is built with."""
    if key == "_partial_":
        return value is not False and not (value is True and kind is _PART)
    return isinstance(key, str) and re.fullmatch(r"_\w+_", key) is not None and key not in _KEYS


def judge(config: Mapping[str, Any], where: str, user_dir: str | Path | None = None) -> None:
    """Refuse a recorded configuration that names anything but a class of the kind that belongs at its place.

    Args:
        config: plain, as recorded; or a part of it.
        where: whose it is, as typed: `run=RUN`.
        user_dir: the folder that the user trusts; None: the one that was typed in this command, if any.

    Raises:
        ConfigError: naming the option, what it says, the recorded user_dir, and the way on.
    """
    folder = user_dir or received().user_dir
    for found in _walk(config):
        if (reason := _refusal(found, folder)) is None:
            continue
        recorded = config.get("user_dir")
        again = (
            f"{shlex.quote(option('user_dir', recorded))} again"
            if recorded
            else "user_dir=FOLDER, in which it lies"
        )
        said = f"{found.option}={_shown(found.value)} (recorded user_dir: {_shown(recorded) if recorded else 'none'})"
        raise ConfigError(
            f"{where} records {said}, which {reason}; nothing of it was run. If it is yours, type {_printable(again)}"
            " (load_run(RUN, user_dir=...) in Python)",
            see=SEE,
        )


def vouch(config: Mapping[str, Any]) -> None:
    """Let the processes that this one starts follow what was typed here, when they read it in a record.

    Args:
        config: composed in this command.
    """
    folder, told = received().user_dir, received().typed
    new = [
        said
        for found in _walk(config)
        if (said := f"{found.option}={found.value}") not in told and _refusal(found, folder) is not None
    ]
    if new:
        pass_on(typed=[*told, *new])


def _printable(value: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _shown(value: Any) -> str:
    """A recorded value in a message: short, on one line, without control characters."""
    text = _printable(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _refusal(found: _Recorded, user_dir: str | Path | None) -> str | None:
    """Why it is not followed; None where it is."""
    if f"{found.option}={found.value}" in received().typed:
        return None
    name, kind = found.value, found.kind
    if kind is None:
        if isinstance(name, str) and "${" in name:
            return "would be filled in from outside the record"
        return "names an object where none belongs"
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        return "is no name of a class"
    if kind.base(name) is not None:
        return _refusal_of_class(name, kind)
    if user_dir is None or not rooms.lies_in(Path(user_dir), name):
        return f"is not {kind.words}" + (
            "" if user_dir is None else f", and does not lie in user_dir={user_dir}"
        )
    return _refusal_of_users(name, kind, Path(user_dir))


def _refusal_of_class(name: str, kind: Kind) -> str | None:
    """Why a name in a package that may be imported is not followed."""
    module_name, _, attribute = name.rpartition(".")
    try:
        module = rooms.import_module(module_name)
    except ModuleNotFoundError as error:
        if rooms.public(error.name or "") == name.partition(".")[0]:
            return None  # the package is not installed, so that there is nothing to follow; whoever needs it says so
        return f"is not {kind.words}: there is no module {module_name}"
    except ImportError as error:
        return f"cannot be imported ({' '.join(str(error).split())})"
    found = getattr(module, attribute, None)
    if not inspect.isclass(found):
        return f"is not {kind.words}: it is no class"
    home = rooms.public(f"{found.__module__}.{found.__qualname__}")
    base = kind.base(home)
    if base is None or not issubclass(found, _class(base)):
        return f"is not {kind.words}: it is {_shown(home)}"
    return None


def _class(name: str) -> type:
    if name == "object":
        return object
    module, _, attribute = name.rpartition(".")
    return getattr(rooms.import_module(module), attribute)


def _refusal_of_users(name: str, kind: Kind, user_dir: Path) -> str | None:
    """Why a name of the user's folder is not followed: it leads out of it."""
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(rooms.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        missing = rooms.public(error.name or "")
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            return f"is not there: user_dir={user_dir} has no module {module_name}"
        return None  # one of the user's own modules misses a package; whoever builds it says so
    home = rooms.public(f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', attribute)}")
    if (
        found is None
        or rooms.lies_in(user_dir, home)
        or (kind.base(home) and _refusal_of_class(home, kind) is None)
    ):
        return None
    return f"leads out of user_dir={user_dir}, to {_shown(home)}"


def shadowed(path: str) -> str:
    """What to say where a dotted name has a file in the typed user_dir, and Python takes another one; else empty."""
    folder = received().user_dir
    if folder is None:
        return ""
    parts = path.split(".")[:-1]
    top = parts[0] if parts else ""
    places = [Path(folder, *parts[:n]) for n in range(len(parts), 0, -1)]
    files = [f for place in places for f in (place.with_suffix(".py"), place / "__init__.py")]
    mine = next((f for f in files if f.is_file()), None)
    if mine is None or rooms.lies_in(Path(folder), path):
        return ""
    if len(parts) > 1 and not (files[0].is_file() or files[1].is_file()):
        return ""  # theirs is a module that the user's folder does not have
    whose = (
        "Crucible's own" if top in _OURS or top in ("lab", "reporting") else "an installed one or Python's"
    )
    return f"{mine} is shadowed: {top} is {whose}; give yours another name"
