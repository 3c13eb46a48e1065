"""Groups of evaluation samples that are scored each by itself too, and data sets made of several."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from crucible.options import ConfigError
from crucible.pictures import Least
from datasets.images import ImageFiles, fingerprint, sample_name

_NAME = re.compile(r"(?!raw$)[a-z0-9]+(_[a-z0-9]+)*")
_STYLE = "-stylized-"  # behind a picture's name, where stylize-datasets puts the style
SEE = "docs/extending.md"


class Groups(NamedTuple):
    """The groups of a raw data set's samples.

    Attributes:
        names: as they are logged: `val_<name>/acc`.
        numbers: (N,) int64 by the samples' numbers in the raw data set, which of the names; -1: none.
    """

    names: list[str]
    numbers: np.ndarray

    def counts(self, indices: np.ndarray | None = None) -> dict[str, int]:
        """Samples of each group, of all or of some."""
        numbers = self.numbers if indices is None else self.numbers[indices]
        return {name: int((numbers == number).sum()) for number, name in enumerate(self.names)}


def groups_of(raw: Any) -> Groups | None:
    """The groups that a raw data set declares by `groups` (names) and `group_numbers` (N,); None: it has none.

    Raises:
        ConfigError: for names that cannot be logged, or numbers that fit neither the samples nor the names.
    """
    names = list(getattr(raw, "groups", None) or ())
    if not names:
        return None
    kind = type(raw).__name__
    for name in names:
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConfigError(
                f"{kind}.groups: {name!r} is no name of a group: small letters and digits, words joined by _, not raw",
                SEE,
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"{kind}.groups: {', '.join(names)}: two groups of one name", SEE)
    numbers = np.asarray(getattr(raw, "group_numbers", ()))
    if numbers.shape != (len(raw),) or numbers.dtype.kind not in "iu":
        raise ConfigError(
            f"{kind}.group_numbers: shape {numbers.shape} of {numbers.dtype}; a whole number for each of the "
            f"{len(raw)} samples",
            SEE,
        )
    if len(numbers) and (numbers.min() < -1 or numbers.max() >= len(names)):
        raise ConfigError(
            f"{kind}.group_numbers: from {numbers.min()} to {numbers.max()}; -1 to {len(names) - 1}", SEE
        )
    return Groups(names, numbers.astype(np.int64))


class _JointNames(Sequence[str]):
    """The samples' names with their group before them, made when asked for."""

    def __init__(self, joint: Joint) -> None:
        self._joint = joint

    def __len__(self) -> int:
        return len(self._joint)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, place = self._joint.place(index)
        return f"{self._joint.groups[part]}/{sample_name(self._joint.parts[part], place)}"


class Joint(Dataset):
    """Several raw data sets as one, each of them a group of its samples.

    Versions of one picture, files of the same name in several parts (whatever their format), are one unit: no split
    separates them.

    Args:
        parts: raw data sets with `targets`, by the name of their group; numbered alike.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.groups = list(parts)
        self.parts = list(parts.values())
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self.targets = np.concatenate([np.asarray(part.targets) for part in self.parts])
        self.group_numbers = np.repeat(np.arange(len(self.parts)), np.diff(self._starts))
        self.names = _JointNames(self)
        self.classes: list[str] = list(getattr(self.parts[0], "classes", ()))
        self.channels: int = getattr(self.parts[0], "channels", 3)
        self.root = getattr(self.parts[0], "root", None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        part, place = self.place(index)
        return self.parts[part][place]

    @property
    def decoder(self) -> str:
        """Of the files: set for all parts at once."""
        return getattr(self.parts[0], "decoder", "auto")

    @decoder.setter
    def decoder(self, decoder: str) -> None:
        for part in self.parts:
            part.decoder = decoder

    @property
    def lenient(self) -> bool:
        """As of `ImageFiles`: set for all parts at once."""
        return getattr(self.parts[0], "lenient", False)

    @lenient.setter
    def lenient(self, lenient: bool) -> None:
        for part in self.parts:
            part.lenient = lenient

    def place(self, index: int) -> tuple[int, int]:
        """The part of a sample, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(self.group_numbers[index])
        return part, int(index - self._starts[part])

    @property
    def units(self) -> np.ndarray:
        """(N,) int64: the number of each sample's picture, in the order of the first part that has it."""
        labels = self.targets.tolist()
        names = (sample_name(part, i) for part in self.parts for i in range(len(part)))
        keys = np.fromiter(map(_key, names, labels), dtype=np.uint64, count=len(self))
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse.ravel()]

    def subset(self, indices: np.ndarray) -> Joint:
        """Those of the samples, as a data set of their own; in the order of the parts."""
        numbers = self.group_numbers[indices]
        each = {
            name: part.subset(np.sort(indices[numbers == n] - self._starts[n]))
            for n, (name, part) in enumerate(zip(self.groups, self.parts, strict=True))
        }
        return Joint(each)

    def relabelled(self, numbers: np.ndarray, classes: Sequence[str]) -> Joint:
        """The same samples with `numbers[label]` for each label; those of negative numbers are left out."""
        pairs = zip(self.groups, self.parts, strict=True)
        return Joint({name: part.relabelled(numbers, classes) for name, part in pairs})

    def content(self) -> Iterator[bytes]:
        """What makes these data: those of each part."""
        for name, part in zip(self.groups, self.parts, strict=True):
            yield name.encode()
            yield fingerprint([part]).encode()


def _key(name: str, label: int) -> int:
    """Of a picture, the same for all its versions: its path within its class, without format and style."""
    folder, _, file = name.partition("/")[2].rpartition("/")
    stem = file.rpartition(".")[0].partition(_STYLE)[0]
    digest = hashlib.blake2b(f"{label}/{folder}/{stem}".encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def sample_of(raw: Any, index: int, least: Least | None = None) -> tuple[Any, Any]:
    """`raw[index]`; the picture in a file may be decoded smaller than it is, as `crucible.pictures.decode` says."""
    if least is None:
        return raw[index]
    if isinstance(raw, Joint):
        part, index = raw.place(index)
        raw = raw.parts[part]
    return (raw.read(index, least), raw.targets[index]) if isinstance(raw, ImageFiles) else raw[index]
