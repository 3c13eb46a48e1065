"""Packed copies: the images of a folder, resized once, in one LMDB file with a checksum each.

A pack is a folder of `pack.json` (what it is), `data.mdb` (records and index) and, where images could not be read,
`rejects.csv`. `python main.py task=pack` makes one (`lab.packing`); a data module reads it in place of the folder
that it was made from: the same classes, splits, names and order, hence the same draws.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from crucible.files import write_atomically
from crucible.options import ConfigError
from datasets.images import ImageFiles, SampleError
from datasets.layout import SplitName
from datasets.stored import JoinedNames, Records, StoredImages

DESCRIPTION = "pack.json"
DATA = "data.mdb"
FORMAT, VERSION = "crucible pack", 1
_CHECKSUM = 4  # bytes before each record: its CRC-32, little-endian
_PARTS = ("offsets", "names", "targets", "numbers")  # of the index of a split


@dataclass(frozen=True)
class PackOptions:
    """How images are packed: `pack.*` of the command line."""

    size: Annotated[
        int | None, "[1, inf)", "short side of larger images, in pixels; null: files as they are"
    ] = 256
    quality: Annotated[int, "[1, 100]", "of the JPEG files that are written"] = 90
    verify: Annotated[bool, "read a finished pack whole, and say what has changed"] = False


@dataclass(frozen=True)
class Description:
    """What `pack.json` says.

    Attributes:
        complete: whether all images are in it, and have been read back.
        options: of the packing: size, quality.
        source: name, folder and fingerprint of what was packed.
        task: classification or regression.
        classes: their names, by number.
        counts: images of the source by split, in the order in which they are packed.
        samples: images of each split that are in the pack; the others are rejects.
        digests: by split, of the names, targets and bytes.
        size: bytes of the data file.
        made: by which version and when.
    """

    options: Mapping[str, Any]
    source: Mapping[str, str]
    task: Literal["classification", "regression"]
    classes: list[str]
    counts: Mapping[SplitName, int]
    samples: Mapping[SplitName, int] = field(default_factory=dict)
    digests: Mapping[SplitName, str] = field(default_factory=dict)
    size: int = 0
    complete: bool = False
    made: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Let the pack in `folder` be described so, at once."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2)
        write_atomically(folder / DESCRIPTION, text + "\n", sync=True)


def read_description(folder: Path) -> Description | None:
    """What the pack in `folder` says of itself; None where there is no pack.

    Raises:
        ConfigError: for a file that is not one, or is of a later version.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError
        version = content.pop("version")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not the description of a pack; task=pack with a new out= makes one", _SEE
        ) from error
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(
            f"{path}: a pack of version {version}, and this Crucible reads up to {VERSION}: update it, or make the "
            "pack anew with task=pack",
            _SEE,
        )
    try:
        return Description(**content)
    except TypeError as error:
        raise ConfigError(f"{path}: damaged ({error}); task=pack with a new out= makes one", _SEE) from error


_SEE = "docs/data.md"


def import_lmdb() -> Any:
    """LMDB, which is an extra.

    Raises:
        ConfigError: where it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError("packed copies need LMDB: pip install -e '.[pack]'", "README.md") from error
    return lmdb


class PackedRecords(Records):
    """The records of a pack, read from a map of its file; each process has its own.

    Args:
        folder: of the pack.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encoded(self, number: int) -> bytes:
        value = reading(self.folder / DATA).get(number.to_bytes(8, "big"))
        if value is None:
            raise SampleError(f"{self.where(number)}: is not there; {_ANEW}", _SEE)
        data = bytes(value[_CHECKSUM:])
        if zlib.crc32(data) != int.from_bytes(value[:_CHECKSUM], "little"):
            raise SampleError(
                f"{self.where(number)}: its bytes have changed since it was packed; {_ANEW}", _SEE
            )
        return data

    def where(self, number: int) -> str:
        return f"{self.folder / DATA}, record {number}"


_ANEW = "task=pack with a new out= makes the pack anew"


def checked(data: bytes) -> bytes:
    """A record as it is stored."""
    return zlib.crc32(data).to_bytes(_CHECKSUM, "little") + data


_open: dict[
    tuple[int, int], tuple[int, Any, Any]
] = {}  # by file: process, environment, transactions of its threads


def reading(data: Path) -> Any:
    """The transaction by which this thread reads an LMDB file.

    LMDB opens a file once in a process, whatever it is called, and a forked process may not use what its parent
    opened.

    Raises:
        SampleError: where it is gone.
        ConfigError: where it is no such file.
    """
    try:
        state = data.stat()
    except OSError as error:
        raise SampleError(f"{data}: cannot be read ({error.strerror})", _SEE) from error
    place, process = (state.st_dev, state.st_ino), os.getpid()
    with _opening:
        if place in _open and _open[place][0] != process:
            _let_go(place)  # this process's copy; the parent's stays
        if place not in _open:
            _open[place] = process, _environment(data, state.st_size), threading.local()
    _, environment, own = _open[place]
    if not hasattr(own, "transaction"):
        own.transaction = environment.begin(buffers=True)
    return own.transaction


_opening = threading.Lock()
os.register_at_fork(
    before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_opening.release
)


def _environment(data: Path, size: int) -> Any:
    lmdb = import_lmdb()
    try:
        environment = lmdb.open(str(data), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ConfigError(f"{data}: cannot be read as LMDB ({error})", _SEE) from error
    if (environment.info()["last_pgno"] + 1) * environment.stat()["psize"] > size:
        environment.close()  # a map of less than there was would end the process
        raise ConfigError(f"{data}: is half a file: more is written in it than is there; copy it again", _SEE)
    return environment


def _let_go(place: tuple[int, int]) -> None:
    _open.pop(place)[1].close()  # its transactions end with it


def close(folder: Path) -> None:
    """Let go of a pack that this process has read."""
    state = (folder / DATA).stat()
    if (state.st_dev, state.st_ino) in _open:
        _let_go((state.st_dev, state.st_ino))


def index_records(
    splits: Mapping[SplitName, tuple[ImageFiles, np.ndarray, np.ndarray]],
) -> dict[bytes, bytes]:
    """The records that say which image is what.

    Args:
        splits: by name, the raw data set, which of it are packed, and the number of the record of each.
    """
    found = {}
    for split, (raw, kept, numbers) in splits.items():
        offsets, names = JoinedNames.of(JoinedNames(*JoinedNames.of(raw.names)).picked(kept))
        parts = (offsets, names, raw.targets[kept], numbers)
        found.update({_key(split, part): _dump(array) for part, array in zip(_PARTS, parts, strict=True)})
    return found


def _key(split: str, part: str) -> bytes:
    return f"{split}/{part}".encode()


def _dump(array: np.ndarray) -> bytes:
    return checked(array.dtype.str.encode().ljust(8) + np.ascontiguousarray(array).tobytes())


class Pack:
    """A finished pack.

    Args:
        folder: its place.
        description: what it says of itself.

    Raises:
        ConfigError: where it is not finished, or is damaged.
    """

    def __init__(self, folder: Path, description: Description) -> None:
        self.folder, self.description = folder, description
        packed, all_ = sum(description.samples.values()), sum(description.counts.values())
        if not description.complete:
            raise ConfigError(
                f"{folder}: a pack that is not finished; the command that began it goes on with it "
                f"(python main.py task=pack ... out={folder})",
                _SEE,
            )
        data = folder / DATA
        size = data.stat().st_size if data.is_file() else None
        if size is None:
            raise ConfigError(
                f"{data}: no such file, but {DESCRIPTION} beside it says that it is a pack; {_ANEW}", _SEE
            )
        if size != description.size:
            raise ConfigError(
                f"{data}: has {size} bytes of {description.size}: half a copy? Copy it again", _SEE
            )
        self.remarks = [f"packed copy of {description.source['name']}: {_text(description.options)}"]
        if packed < all_:
            self.remarks.append(
                f"{all_ - packed} of {all_} images could not be read when it was packed (rejects.csv)"
            )

    @property
    def splits(self) -> list[SplitName]:
        """The splits of the folder that was packed; `train` alone where it had none."""
        return list(self.description.counts)

    def images(self, split: SplitName, channels: int) -> StoredImages:
        """The images of a split, as the folder had them.

        Args:
            split: one of `splits`.
            channels: 1 or 3.
        """
        transaction = reading(self.folder / DATA)
        parts = []
        for part in _PARTS:
            value = transaction.get(_key(split, part))
            data = b"" if value is None else bytes(value[_CHECKSUM:])
            if value is None or zlib.crc32(data) != int.from_bytes(value[:_CHECKSUM], "little"):
                raise ConfigError(
                    f"{self.folder / DATA}: its index is damaged ({split}/{part}); {_ANEW}", _SEE
                )
            parts.append(np.frombuffer(data[8:], dtype=np.dtype(data[:8].decode().strip())))
        offsets, names, targets, numbers = parts
        return StoredImages(
            self.folder, PackedRecords(self.folder), numbers, JoinedNames(offsets, names), targets, channels,
            self.description.classes, self.description.digests[split],
        )  # fmt: skip


def _text(options: Mapping[str, Any]) -> str:
    if options["size"] is None:
        return "the files as they were"
    return f"short side {options['size']}, quality {options['quality']}"


def find_pack(folder: Path, task: str = "classification") -> Pack | None:
    """The pack in `folder`; None where it is an ordinary folder.

    Args:
        folder: any.
        task: that its targets are for.

    Raises:
        ConfigError: for half a pack, a damaged one, one of a later version, and one of other targets.
    """
    description = read_description(folder)
    if description is None:
        if (folder / DATA).is_file():
            raise ConfigError(
                f"{folder}: holds {DATA} without {DESCRIPTION}: not a pack; task=pack makes one of images in "
                "folders",
                _SEE,
            )
        return None
    if description.task != task:
        raise ConfigError(
            f"data.module.data_root_dir: {folder}: a pack for {description.task}, data.task is {task}", _SEE
        )
    return Pack(folder, description)


def digest_of(raw: StoredImages, parts: Iterable[bytes]) -> str:
    """What a split of a pack contains, in 32 hexadecimal digits.

    Args:
        raw: its names and targets.
        parts: of each of its images, in order, a digest of the bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _chained(raw, parts):
        digest.update(part)
    return digest.hexdigest()


def _chained(raw: StoredImages, parts: Iterable[bytes]) -> Iterator[bytes]:
    yield from raw.names.content()
    yield raw.targets.tobytes()
    yield from parts
