"""What a shell completes a line by, beside what Hydra knows: files in folders of a group, and choices of options.

Hydra completes the names of groups and options, the files at the top of a group, and an option's present value. The
choices are those of docs/schema.json. Imports nothing heavy: a key press waits for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_CONFIGS, _SCHEMA = _ROOT / "cli_configs", _ROOT / "docs" / "schema.json"
FLAGS = ("-sc", "--shell-completion")


def asks_what_may_follow(arguments: Sequence[str]) -> bool:
    """Whether a shell asks, as `main.py -sc query=bash`, with the line so far in COMP_LINE."""
    return bool({*FLAGS} & {*arguments}) and any(a.startswith("query=") for a in arguments)


def values_for(line: str) -> list[str]:
    """What the last word of a command line may become, where it is `option=...`; of a list or sweep its last member.

    Args:
        line: as typed so far, the program included.
    """
    words = line.split()
    if not words or line.endswith(" ") or "=" not in words[-1]:
        return []
    name, _, value = words[-1].partition("=")
    before = re.match(r"(?:.*[\[,])?", value)
    assert before is not None
    begun = value[before.end() :]
    option = name.lstrip("+")
    choices = [*_files(option, words), *_choices(option)]
    return sorted(
        {f"{name}={before[0]}{choice}" for choice in choices if choice.startswith(begun) and choice != begun}
    )


def _files(group: str, words: Sequence[str]) -> Iterator[str]:
    """The files of a group, those in folders of it too, Crucible's and those of a `user_dir` that was typed."""
    roots = [_CONFIGS]
    for word in words:
        if word.startswith("user_dir="):
            folder = Path(word.partition("=")[2]).expanduser()
            roots.append(folder / "cli_configs" if (folder / "cli_configs").is_dir() else folder)
    for root in roots:
        folder = root / group
        if group and folder.is_dir():
            for file in folder.rglob("[!_]*.yaml"):
                yield file.relative_to(folder).with_suffix("").as_posix()


def _choices(option: str) -> Iterator[str]:
    """The values that an option has to choose from."""
    node: Any = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    for part in option.split("."):
        node = node.get("then", node).get("properties", {}).get(part)
        if not isinstance(node, Mapping):
            return
    yield from map(str, node.get("examples", ()))
    for one in node.get("anyOf", [node]):
        yield from (_as_typed(value) for value in one.get("enum", ()))
        if one.get("type") == "boolean":
            yield from ("true", "false")
        if one.get("type") == "null":
            yield "null"
        items = one.get("items", {})
        yield from (
            _as_typed(value) for part in items.get("anyOf", [items]) for value in part.get("enum", ())
        )


def _as_typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
