"""ReaL: labels of ImageNet's validation images by several people's judgement, any number for an image.

Beyer and others, "Are we done with ImageNet?", arXiv 2006.07159.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from crucible.options import ConfigError
from datasets.classes import listed

_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$")


def read_real_labels(path: str, names: Sequence[str], classes: Sequence[str]) -> list[frozenset[int]]:
    """The labels of each image, as numbers of the network's outputs; an empty set where it has none.

    Args:
        path: a JSON list of lists: the labels of ILSVRC2012_val_00000001, ..., each the place of a class among the
            sorted WordNet numbers.
        names: file names of the images.
        classes: the network's, in the order of its outputs: WordNet numbers, which sort as the file counts.

    Raises:
        ConfigError: for a file that is none, images that have no such name or number, and labels beyond the classes.
    """
    option = f"data.module.real_labels={path}"
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{option}: no such file", see="docs/data.md") from None
    except ValueError as error:
        raise ConfigError(f"{option}: cannot be read as JSON ({error})", see="docs/data.md") from None
    if not isinstance(content, list) or not all(
        isinstance(one, list) and all(type(n) is int for n in one) for one in content
    ):
        raise ConfigError(
            f"{option}: must be a list of lists of whole numbers, as real.json is", see="docs/data.md"
        )
    if not classes:
        raise ConfigError(f"{option}: is for classification", see="docs/data.md")
    highest = max((n for one in content for n in one), default=0)
    if min((n for one in content for n in one), default=0) < 0 or highest >= len(classes):
        raise ConfigError(
            f"{option}: has labels up to {highest}, the network {len(classes)} classes; ReaL is of all of ImageNet's",
            see="docs/data.md",
        )
    found = [_NUMBERED.search(name) for name in names]
    if unknown := [name for name, match in zip(names, found, strict=True) if match is None]:
        raise ConfigError(
            f"{option}: belongs to files named ILSVRC2012_val_00000001.JPEG and so on; there are {listed(unknown)}",
            see="docs/data.md",
        )
    numbers = [int(match[1]) for match in found if match is not None]
    if beyond := [n for n in numbers if not 1 <= n <= len(content)]:
        raise ConfigError(
            f"{option}: has labels of {len(content)} images, none of number {beyond[0]}", see="docs/data.md"
        )
    place = np.argsort(np.asarray(classes)).tolist()  # output by place among the sorted names
    return [frozenset(place[label] for label in content[n - 1]) for n in numbers]


def accuracy_by_labels(
    prediction: Tensor, target: Tensor, labels: Sequence[frozenset[int]]
) -> tuple[dict[str, float], str]:
    """Accuracies over the images that have labels, and what was counted.

    Args:
        prediction: (N,) int64 classes.
        target: (N,) int64, the usual label.
        labels: N sets of classes.

    Returns:
        `test/acc_real`: the prediction is one of the labels; `test/acc_same_images`: it is the usual one.

    Raises:
        ConfigError: where no image has a label.
    """
    rows = [
        (guess in known, guess == usual)
        for guess, usual, known in zip(prediction.tolist(), target.tolist(), labels, strict=True)
        if known
    ]
    if not rows:
        raise ConfigError("data.module.real_labels: none of the images has a label", see="docs/data.md")
    real, same = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    said = f"ReaL labels: {len(rows)} of {len(labels)} images have some, the others are left out"
    return {"test/acc_real": real, "test/acc_same_images": same}, said
