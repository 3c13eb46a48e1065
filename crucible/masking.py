"""Secrets stay out of records and messages: passwords in URLs, keys and tokens of services."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from crucible.options import ConfigError

MASK = "***"
_SECRET = (
    r"(?:[\w.]*[_.])?"
    r"(?:api_?key|access_?key|secret(?:_?key)?|private_?key|password|passwd|credentials?|token)"
)
_IN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s/@'\"]+)@")
_TYPED = re.compile(
    rf"(?i)(?<![\w.])({_SECRET})(\s*[=:]\s*)(?!null\b|None\b|\*\*\*)"
    r"""('[^']*'|"[^"]*"|[^\s,&;'"\]}]+)"""
)
_NAMED = re.compile(rf"(?i){_SECRET}")
_SERVICES = ("logger", "callbacks", "data")  # a network may have an option `token`


@lru_cache(maxsize=65536)
def masked(text: str) -> str:
    """A text with `***` for the password of each URL, and for the value of each option that holds a secret."""
    return _TYPED.sub(rf"\1\2{MASK}", _IN_URL.sub(_user_only, text))


def _user_only(match: re.Match[str]) -> str:
    """A URL's part before @; a user without a password is no secret."""
    scheme, login = match.groups()
    user, colon, _ = login.partition(":")
    return f"{scheme}{user}:{MASK}@" if colon else f"{scheme}{user}@"


def masked_in(node: Any) -> Any:
    """Containers with `masked` texts."""
    if isinstance(node, Mapping):
        return {
            key: MASK if isinstance(value, str) and value and _NAMED.fullmatch(str(key)) else masked_in(value)
            for key, value in node.items()
        }
    if isinstance(node, (list, tuple)):
        return [masked_in(value) for value in node]
    return masked(node) if isinstance(node, str) else node


def check_no_secret(config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose record would hold a secret: the record must run again, so that it cannot be masked.

    Raises:
        ConfigError: naming the option, and where the secret belongs.
    """
    for group, node in config.items():
        _check(node, group, group in _SERVICES)


def _check(node: Any, option: str, of_a_service: bool) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            name = f"{option}.{key}"
            if of_a_service and isinstance(value, str) and value and _NAMED.fullmatch(str(key)):
                raise ConfigError(
                    f"{name}={MASK}: a secret would stand in config.yaml for all who read it; set it in the "
                    "environment, as WANDB_API_KEY, where the service's library looks for it",
                    see="docs/robustness.md",
                )
            _check(value, name, of_a_service)
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            _check(value, f"{option}.{number}", of_a_service)
    elif isinstance(node, str) and _IN_URL.sub(_user_only, node) != node:
        raise ConfigError(
            f"{option}={masked(node)}: the password would stand in config.yaml for all who read it; leave it out of "
            "the URL and set it in the environment, as AWS_SECRET_ACCESS_KEY, or in the library's own file",
            see="docs/robustness.md",
        )
