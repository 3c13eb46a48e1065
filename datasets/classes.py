"""Classes by name: what a folder calls them, and what a trained network's outputs are called."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from crucible.options import ConfigError

LEFT_OUT = -1  # the number of a class that a mapping file leaves out
_SHOWN = 8
NUMBERED = (
    "class folders are numbers, taken as the places of the 1000 classes of ImageNet (as in ImageNet-V2)"
)


def folded(name: str) -> str:
    """A name as it is compared: case does not matter, nor how a file system composes accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())


def listed(names: Sequence[str]) -> str:
    """The names for a line of text, the first few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def read_class_map(path: str | None) -> dict[str, str | None]:
    """A mapping file, `{name there: class of the network}` in YAML or JSON; null leaves a class out.

    Raises:
        ConfigError: for a file that is missing or no such mapping.
    """
    if path is None:
        return {}
    option = f"data.module.class_map={path}"
    try:
        content: Any = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{option}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping) or any(isinstance(v, (list, dict)) for v in content.values()):
        raise ConfigError(f"{option}: must be lines of the form 'name there: class of the network'")
    return {str(k): None if v is None else str(v) for k, v in content.items()}


def match_classes(
    found: Sequence[str],
    known: Sequence[str],
    where: str,
    whose: str = "the training images have",
    class_map: Mapping[str, str | None] | None = None,
) -> np.ndarray:
    """The number in `known` of each name in `found`, (len(found),) int64; `LEFT_OUT` where the mapping says so.

    A name that is the same to the letter comes first, then one that differs in case only.

    Args:
        found: names of classes.
        known: the names by number.
        where: in the message, what has the names that are found.
        whose: in the message, who has the known ones.
        class_map: known name by found name, where they differ.

    Raises:
        ConfigError: for a name that is not known, or that is two classes but for its case.
    """
    exact = {name: number for number, name in enumerate(known)}
    loose: dict[str, list[int]] = {}
    for number, name in enumerate(known):
        loose.setdefault(folded(name), []).append(number)
    mapped = {folded(name): target for name, target in (class_map or {}).items()}
    numbers, unknown = np.full(len(found), LEFT_OUT, dtype=np.int64), []
    for i, name in enumerate(found):
        wanted = mapped.get(folded(name), name)
        if wanted is None:
            continue
        candidates = [exact[wanted]] if wanted in exact else loose.get(folded(wanted), [])
        if len(candidates) > 1:
            raise ConfigError(f"{where}/{name}: may be {' or '.join(known[c] for c in candidates)}")
        if candidates:
            numbers[i] = candidates[0]
        elif wanted != name:
            raise ConfigError(
                f"data.module.class_map: {name} is to be {wanted}; {whose} no such class "
                f"(they are {listed(known)})"
            )
        else:
            unknown.append(name)
    if unknown:
        also = f" (nor {listed(unknown[1:])})" if len(unknown) > 1 else ""
        raise ConfigError(f"{where}/{unknown[0]}: {whose} no such class{also}; they are {listed(known)}")
    return numbers


def numbered_classes(found: Sequence[str], known: Sequence[str]) -> np.ndarray | None:
    """The places of class folders named `0` to `999`, for a network of ImageNet's 1000 WordNet numbers; else None.

    The places are those of the sorted WordNet numbers, as everywhere (`10` is not the third one).

    Args:
        found: names of class folders.
        known: the network's classes.
    """
    if len(known) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in known):
        return None
    if not found or not all(re.fullmatch(r"0|[1-9]\d{0,2}", name) for name in found):
        return None
    order = np.argsort(np.asarray(known))  # the numbers of the sorted names
    return order[[int(name) for name in found]].astype(np.int64)
