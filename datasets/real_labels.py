"""ReaL labels of ImageNet's validation images: for each, all the classes that it shows (arXiv 2006.07159)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crucible.options import ConfigError

SEE = "docs/data.md"
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.IGNORECASE)


def real_labels(file: str, names: Sequence[str] | None, classes: Sequence[str]) -> Tensor:
    """Which classes are right for each test image, (N, K) bool; none where the image has no label.

    The file is a JSON list of lists of class numbers, one for each validation image in the order of their names;
    numbers count the sorted names of the classes. An image finds its entry by the number in its name
    (`ILSVRC2012_val_00000001.JPEG` is the first), where all names have one; else by the order of the bare names, where
    there are as many images as entries.

    Args:
        file: the option's value.
        names: the files of the test images; None: they have none.
        classes: the network's, in the order of its outputs.

    Raises:
        ConfigError: for a file that is missing or no such list, and images that cannot be told apart.
    """
    option = f"data.module.real_labels={file}"
    entries = _entries(file, option)
    if names is None:
        raise ConfigError(f"{option}: is for images in files, whose names say which entry is theirs", see=SEE)
    bare = [name.rpartition("/")[2] for name in names]
    found = [_NUMBERED.match(name) for name in bare]
    if all(found):
        places = np.array([int(match[1]) - 1 for match in found if match])
    elif len(bare) == len(entries):
        places = np.empty(len(bare), dtype=np.int64)
        places[np.argsort(np.asarray(bare), kind="stable")] = np.arange(len(bare))
    else:
        raise ConfigError(
            f"{option}: has {len(entries)} entries for {len(bare)} test images, whose names (such as {bare[0]}) have "
            "no number of ILSVRC2012_val_00000001.JPEG's kind",
            see=SEE,
        )
    if len(places) and (places.min() < 0 or places.max() >= len(entries)):
        raise ConfigError(
            f"{option}: has {len(entries)} entries; there is an image numbered {int(places.max()) + 1}",
            see=SEE,
        )
    outputs = np.argsort(np.asarray(list(classes)), kind="stable")  # the outputs of the sorted names
    allowed = torch.zeros(len(bare), len(classes), dtype=torch.bool)
    for row, place in enumerate(places.tolist()):
        numbers = entries[place]
        if any(not 0 <= number < len(classes) for number in numbers):
            raise ConfigError(
                f"{option}: entry {place} has class {max(numbers)}; the network has {len(classes)} classes",
                see=SEE,
            )
        allowed[row, outputs[numbers].tolist()] = True
    return allowed


def _entries(file: str, option: str) -> list[list[int]]:
    try:
        content: Any = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{option}: no such file", see=SEE) from None
    except ValueError as error:
        raise ConfigError(f"{option}: is no JSON ({' '.join(str(error).split())})", see=SEE) from error
    if not isinstance(content, list) or not all(
        isinstance(entry, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in entry)
        for entry in content
    ):
        raise ConfigError(f"{option}: must be a list of lists of class numbers, one for each image", see=SEE)
    return content
