"""Hydra composes a command once: a private name that is leaned on (crucible/private.py has those that need torch)."""

from __future__ import annotations

from typing import Any

from hydra._internal.hydra import Hydra

_composed_mode = Hydra.get_mode


def _typed_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """What a typed `hydra.mode` composes to; None where there is none, which leaves it to `-m`."""
    if any(override.lstrip("+").startswith("hydra.mode=") for override in overrides):
        return _composed_mode(self, config_name, overrides)
    return None


def compose_once() -> None:
    """Have Hydra not compose the whole configuration before the run, only to look for a `hydra.mode` in it.

    A command is a multirun by `-m`, or by a `hydra.mode` that is typed; no longer by one in a file.
    """
    Hydra.get_mode = _typed_mode  # type: ignore[method-assign]
