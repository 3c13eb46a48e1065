"""Crucible's rooms, by names that are nobody else's where `datasets`, `models` or `lab` are other people's packages.

In the checkout (`python main.py`, a notebook beside it) the rooms go by their plain names. In any other process their
modules are imported as `crucible.rooms.models.timm` and so on. Their absolute imports of one another, in the same
words, are led there, and `sys.path`, and what is imported under the plain names, stay as they are. As the private
names can be imported wherever `crucible` can, pickle and torch.compile find what is in them.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from crucible.command_line import import_from
from crucible.options import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "augmentation", "callbacks", "datasets", "lab", "losses", "models", "norms", "optimizers", "reporting",
)  # fmt: skip
_PREFIX = f"{__name__}."
_mine: list[Path] = []  # the user's folder that was let in, where the names are private


@cache
def plain() -> bool:
    """Whether this process has the rooms by their plain names: all of them lead here. Settled when first asked."""
    return all(_home(spec_of_plain(room)) == [ROOT] for room in ROOMS)


def spec_of_plain(top: str) -> ModuleSpec | None:
    """What Python takes for a module at the top: that which is imported, or would be; None: there is none."""
    imported = getattr(sys.modules.get(top), "__spec__", None)
    return imported or PathFinder.find_spec(top) if top in sys.modules else importlib.util.find_spec(top)


def _home(spec: ModuleSpec | None) -> list[Path]:
    """The folders that a module at the top lies in."""
    if spec is None:
        return []
    places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
    return [Path(place).resolve().parent for place in map(str, places)]


def lies_in(folder: Path, name: str) -> bool:
    """Whether the top module of a dotted name is taken directly from `folder`; found without importing it."""
    top = name.partition(".")[0]
    spec = importlib.util.find_spec(_PREFIX + top) if _is_led(top) else spec_of_plain(top)
    homes = _home(spec)
    return bool(homes) and all(home == folder.resolve() for home in homes)


def private(name: str) -> str:
    """The name by which this process has a module, class or function of the rooms; any other name as it is."""
    return _PREFIX + name if _is_led(name.partition(".")[0]) else name


def public(name: str) -> str:
    """The name that is written down: `models.timm.TimmModel`, whatever process this is."""
    return name.removeprefix(_PREFIX)


def import_module(name: str) -> ModuleType:
    """As `importlib.import_module`, by a public name.

    Raises:
        ConfigError: where Crucible was installed without its checkout.
    """
    if not (ROOT / "lab").is_dir():
        raise ConfigError(
            f"crucible in {ROOT}: its rooms are in a checkout; install that: pip install -e .", "README.md"
        )
    return importlib.import_module(private(name))


def with_private_targets(node: Any) -> Any:
    """A configuration whose `_target_`s, at whatever depth, are those of this process."""
    if isinstance(node, Mapping):
        return {
            key: private(value)
            if key == "_target_" and isinstance(value, str)
            else with_private_targets(value)
            for key, value in node.items()
        }
    return [with_private_targets(value) for value in node] if isinstance(node, list) else node


@contextmanager
def user_dir(folder: str | None) -> Iterator[None]:
    """Within it, modules that lie directly in `folder` can be imported; `sys.path` is afterwards what it was.

    One folder at a time: what was imported of another one is forgotten.
    """
    if folder is None:
        yield
        return
    before = list(sys.path)
    try:
        if plain():
            import_from(folder)
        elif _mine != [Path(folder)]:
            _forget()
            _mine[:] = [Path(folder)]
        yield
    finally:
        sys.path[:] = before


def _forget() -> None:
    for name in [n for n in sys.modules if n.startswith(_PREFIX)]:
        if name[len(_PREFIX) :].partition(".")[0] not in ROOMS:
            del sys.modules[name]


def _is_led(top: str) -> bool:
    """Whether modules of this name go by a private one."""
    return not plain() and (top in ROOMS or _is_mine(top))


def _is_mine(top: str) -> bool:
    """Whether the user's folder has it, and no installed package, which it would otherwise shadow."""
    for folder in _mine:
        if (folder / f"{top}.py").is_file() or (folder / top).is_dir():
            return top not in sys.builtin_module_names and _home(PathFinder.find_spec(top)) in ([], [folder])
    return False


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`__import__` for what is written in a room, or in the user's folder."""
    top = name.partition(".")[0]
    if level or not _is_led(top):
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    leaf = builtins.__import__(_PREFIX + name, globals, locals, fromlist or ("",), 0)
    return leaf if fromlist else sys.modules[_PREFIX + top]


class _Loader(SourceFileLoader):
    """Runs a module with the `__import__` above."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder:
    """Finds `crucible.rooms.<room>` and what is in it."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(_PREFIX):
            return None
        top, _, rest = name[len(_PREFIX) :].partition(".")
        if not rest:
            path = [str(folder) for folder in ([ROOT] if top in ROOMS else _mine)]
        spec = PathFinder.find_spec(name, path)
        if spec is not None and type(spec.loader) is SourceFileLoader and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder)
