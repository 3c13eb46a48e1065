"""What a folder of images is: split folders, class folders, or a level above them, as a reader would say."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crucible.listing import holds_images, images_in, subfolders
from crucible.options import ConfigError
from datasets.classes import folded, listed

SplitName = Literal["train", "val", "test"]
_WORDS: dict[str, SplitName] = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip
_FILLERS = {"set", "sets", "data", "dataset", "images", "image", "imgs", "img", "split", "folder", "dir"}
_LEVELS = 3  # that are gone down from a root that is too high


def split_of(name: str) -> SplitName | None:
    """Which split a folder's name says it is: `Train`, `train_set`, `TestImages`, `val2017`; None: another thing."""
    words = re.findall(r"[a-z]+|[^a-z\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    words = [w for w in words if w not in _FILLERS]
    if len(words) != 1:
        return None
    bare = next(
        (words[0].removesuffix(f) for f in ("set", "data", "images") if words[0].endswith(f)), words[0]
    )
    return _WORDS.get(words[0]) or _WORDS.get(bare)


def split_folder(root: Path, split: SplitName) -> Path:
    """The folder of a split in `root`, in any case; where there is none, what it would be called."""
    named = root / split
    if named.is_dir() or not root.is_dir():
        return named
    return next((root / name for name in subfolders(root) if folded(name) == split), named)


@dataclass(frozen=True)
class Layout:
    """Where the classes of a folder of images lie.

    Args:
        base: the folder in which splits or classes begin.
        splits: the folder in `base` of each split; empty where `base` holds classes.
        by_class: the splits lie within the classes: `<class>/<split>/`.
        remarks: what a reader should know of how it was understood.
    """

    base: Path
    splits: dict[SplitName, str] = field(default_factory=dict)
    by_class: bool = False
    remarks: list[str] = field(default_factory=list)


def find_layout(root: Path, known: Collection[str] = (), training: bool = True) -> Layout:
    """Understand a folder: `<split>/<class>/`, `<class>/`, `<class>/<split>/`, or one of them a level below.

    Folders without images count for nothing; the split is told by `split_of`.

    Args:
        root: the folder.
        known: names that are classes, whatever they look like.
        training: whether there has to be a training split.

    Raises:
        ConfigError: for what can be understood in two ways, or not at all.
    """
    option, classes = f"data.module.data_root_dir: {root}", {folded(name) for name in known}
    base, remarks = root, []
    for _ in range(_LEVELS):
        tops = [name for name in subfolders(base) if holds_images(base / name)]
        named = {t: s for t in tops if folded(t) not in classes and (s := split_of(t)) is not None}
        others = [t for t in tops if t not in named]
        with_classes = {t: s for t, s in named.items() if _classes_in(base / t)}
        if with_classes and (not others or "train" in with_classes.values() or not training):
            if others:
                remarks.append(f"not used, beside {'/, '.join(with_classes)}/: {listed(others)}")
            return Layout(base, _one_each(named if training else with_classes, option), False, remarks)
        if with_classes:
            split = next(iter(with_classes))
            raise ConfigError(
                f"{option}: is {split}/ a split or a class? It holds classes and stands beside {listed(others)}; "
                "the training images belong in train/<class>/"
            )
        if named and not others:
            raise ConfigError(f"{option}: {listed(list(named))} hold no class folders (images belong in "
                              f"{next(iter(named))}/<class>/)")  # fmt: skip
        if len(tops) == 1 and folded(tops[0]) not in classes and _classes_in(base / tops[0]):
            base = base / tops[0]
            remarks.append(f"the data begin in {base.relative_to(root)}/")
            continue
        inside = {t: found for t in tops if (found := _splits_in(base / t, classes))}
        if not inside or (
            len(inside) < len(tops) and not any("train" in s.values() for s in inside.values())
        ):
            return Layout(base, {}, False, remarks)
        deeper = [t for t, found in inside.items() if any(_classes_in(base / t / s) for s in found)]
        if deeper and len(tops) > 1:
            raise ConfigError(
                f"{option}: holds several data sets ({listed(tops)}); give the folder of one of them"
            )
        if len(inside) < len(tops):
            raise ConfigError(
                f"{option}: {next(iter(inside))}/ is divided into {listed(list(inside[next(iter(inside))]))}, "
                f"{next(t for t in tops if t not in inside)}/ is not"
            )
        return Layout(base, {s: s for found in inside.values() for s in found.values()}, True, remarks)
    return Layout(base, {}, False, remarks)


def _classes_in(folder: Path) -> bool:
    """Whether its images lie in folders of their own, none beside them."""
    return not images_in(folder) and any(holds_images(folder / name) for name in subfolders(folder))


def _splits_in(folder: Path, classes: Collection[str]) -> dict[str, SplitName]:
    """Its folders by split where they are nothing but splits, several of them; else none."""
    if images_in(folder):
        return {}
    names = [name for name in subfolders(folder) if holds_images(folder / name)]
    found = {n: s for n in names if folded(n) not in classes and (s := split_of(n)) is not None}
    return found if len(found) == len(names) > 1 else {}


def _one_each(named: dict[str, SplitName], option: str) -> dict[SplitName, str]:
    splits: dict[SplitName, str] = {}
    for name, split in named.items():
        if split in splits:
            raise ConfigError(f"{option}: which is the {split} split, {splits[split]}/ or {name}/?")
        splits[split] = name
    return splits
