"""Images in shards: tar files as WebDataset writes them, Parquet and Arrow files as Hugging Face's data sets are.

And LMDB files of the ModelZoo (PistonY's, by torch-toolbox), to be packed anew.

Nothing is streamed. An index of each tar file (which image lies where) is made once and kept; Parquet is read by the
row group, Arrow by the row. So any image can be read by its number, and order, draws, splits and resume are those of
files in folders. Shards may lie on object storage (`https://`, `s3://`, ... by fsspec), where an image is one request.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from crucible.files import absolute, missing, write_atomically
from crucible.listing import EXTENSIONS
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.classes import listed, match_classes
from datasets.image_folder import TestFraction, several_classes
from datasets.images import SampleError, cache_folder
from datasets.layout import SplitName, split_of
from datasets.packed import reading
from datasets.stored import JoinedNames, Records, StoredImages

FORMATS = {".tar": "tar", ".parquet": "parquet", ".arrow": "arrow", ".lmdb": "LMDB"}
_SEE = "docs/data.md"
_IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
_LABELS = ("cls", "json")  # of a sample in a tar file
_FIELDS = ("label", "cls", "class", "class_id", "target")  # of its JSON
_COLUMNS = {
    "image": ("image", "img", "jpg", "png"),
    "label": ("label", "labels", "fine_label", "cls", "target"),
}
_TRIES = 4  # of a request
_SAMPLED, _PIECE = (
    64,
    64 << 10,
)  # images of a shard whose beginnings are part of its digest, and bytes of them
_GROUPS = 4  # row groups that a process keeps
_THREADS = 8  # for the indices of shards: on a network each waits for its answers


# where shards lie


def is_remote(place: str) -> bool:
    """Whether a place is an address and no path."""
    return "://" in place


class Storage:
    """Files by their place, local or remote; what is open belongs to one process, and is not pickled."""

    def __init__(self) -> None:
        self._process = 0
        self._local: dict[str, int] = {}
        self._remote: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def _own(self) -> None:
        if self._process != os.getpid():
            self._process, self._local, self._remote = os.getpid(), {}, {}

    def read(self, place: str, offset: int, size: int) -> bytes:
        """Bytes of a file.

        Raises:
            OSError: where they cannot be read.
        """
        self._own()
        if not is_remote(place):
            if place not in self._local:
                self._local[place] = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._local[place], size, offset)
            if len(data) != size:
                raise OSError(f"ends after {len(data)} of {size} bytes")
            return data
        return _tried(lambda: self._request(place, offset, size))

    def _request(self, place: str, offset: int, size: int) -> bytes:
        data: bytes = self.system(place).cat_file(place, start=offset, end=offset + size)
        if len(data) != size:
            raise OSError("the server gives other bytes than were asked for: it has no byte ranges")
        return data

    def open(self, place: str) -> Any:
        """A stream of a file that can be searched."""
        if not is_remote(place):
            return Path(place).open("rb")
        return self.system(place).open(place, "rb")

    def state(self, place: str) -> str:
        """What changes with the file: its size, and when it was written, or its tag."""
        if not is_remote(place):
            found = Path(place).stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        info = _tried(lambda: self.system(place).info(place))
        tags = [
            str(info[key])
            for key in ("ETag", "etag", "LastModified", "mtime", "last_modified")
            if key in info
        ]
        return " ".join([str(info.get("size")), *tags])

    def system(self, place: str) -> Any:
        """The file system of an address, of this process."""
        self._own()
        protocol = place.partition("://")[0]
        if protocol not in self._remote:
            self._remote[protocol] = _file_system(protocol)
        return self._remote[protocol]


def _file_system(protocol: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(protocol, skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(
            f"{protocol}:// needs a package ({error}): pip install -e '.[shards]' has what http needs",
            "README.md",
        ) from error
    except ValueError as error:
        raise ConfigError(f"{protocol}://: no such kind of storage ({error})", _SEE) from error


def _tried(request: Any) -> Any:
    for attempt in range(_TRIES):
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            if attempt == _TRIES - 1:
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(0.25 * 2**attempt)
    raise AssertionError


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: `{000..012}` counts, `{a,b}` lists."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        step = 1 if int(first) <= int(last) else -1
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + step, step)]
    else:
        parts = inside.split(",")
    return [
        name for part in parts for name in expanded(pattern[: match.start()] + part + pattern[match.end() :])
    ]


# what is in a shard


class ShardIndex(NamedTuple):
    """What lies where in one shard; no Python object an image.

    Attributes:
        names: of the images, joined.
        labels: as texts, joined.
        offsets: (N,) int64 first byte of each image; of Parquet and Arrow the row within its group.
        sizes: (N,) int64 bytes of each image; of Parquet and Arrow the number of its group.
        classes: names of the classes where the shard says them.
        digest: of what is in it.
    """

    names: JoinedNames
    labels: JoinedNames
    offsets: np.ndarray
    sizes: np.ndarray
    classes: list[str]
    digest: str

    def write(self, path: Path) -> None:
        file = io.BytesIO()
        (a, b), (c, d) = JoinedNames.of(self.names), JoinedNames.of(self.labels)
        texts = np.frombuffer(json.dumps([self.classes, self.digest]).encode(), dtype=np.uint8)
        np.savez(file, a=a, b=b, c=c, d=d, offsets=self.offsets, sizes=self.sizes, texts=texts)
        with contextlib.suppress(OSError):  # without a place to keep it, it is made again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, file.getvalue())

    @staticmethod
    def read(path: Path) -> ShardIndex | None:
        try:
            with np.load(path, allow_pickle=False) as found:
                classes, digest = json.loads(found["texts"].tobytes())
                names, labels = JoinedNames(found["a"], found["b"]), JoinedNames(found["c"], found["d"])
                return ShardIndex(names, labels, found["offsets"], found["sizes"], classes, digest)
        except (OSError, ValueError, KeyError, EOFError):
            return None


def _index_tar(storage: Storage, place: str, image: str | None, label: str | None) -> ShardIndex:
    """Read the headers of a tar file from its beginning to its end, and the labels."""
    names: list[str] = []
    labels: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    kind, _, field = (label or "").partition(".")

    def end(key: str, parts: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> None:
        if not parts:
            return
        shown = next((e for e in ([image] if image else _IMAGES) if e in parts), None)
        said = next((e for e in ([kind] if kind else _LABELS) if e in parts), None)
        if shown is None or said is None:
            lacks = (
                f"no picture ({image or 'jpg, png, ...'})"
                if shown is None
                else f"no label ({label or 'cls, json'})"
            )
            raise ConfigError(
                f"{place}: sample {key} has {lacks}: it has {', '.join(parts)}; data.module.image and "
                "data.module.label say what is what",
                _SEE,
            )
        stream = tar.extractfile(parts[said])
        text = stream.read().decode(errors="replace") if stream else ""
        names.append(f"{key}.{shown}")
        labels.append(_label_in(text, said, field, f"{place}: {key}.{said}"))
        offsets.append(parts[shown].offset_data)
        sizes.append(parts[shown].size)

    with storage.open(place) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                current, parts = "", dict[str, tarfile.TarInfo]()
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, slash, file = member.name.rpartition("/")
                    stem, _, extension = file.partition(".")
                    if (key := f"{folder}{slash}{stem}") != current:
                        end(current, parts, tar)
                        current, parts = key, {}
                    parts[extension.lower()] = member
                    tar.members = []  # type: ignore[attr-defined]  # of which it would keep all
                end(current, parts, tar)
        except tarfile.TarError as error:
            raise ConfigError(
                f"{place}: no tar file that can be read by the piece ({error}); unpack a compressed one",
                _SEE,
            ) from error
    digest = hashlib.blake2b(np.asarray(sizes, dtype=np.int64).tobytes(), digest_size=16)
    for i in range(0, len(names), max(1, len(names) // _SAMPLED)):
        digest.update(storage.read(place, offsets[i], min(sizes[i], _PIECE)))
    return _index(names, labels, offsets, sizes, [], digest)


def _label_in(text: str, kind: str, field: str, where: str) -> str:
    if kind != "json":
        return text.strip()
    try:
        content = json.loads(text)
        name = next(f for f in ([field] if field else _FIELDS) if f in content)
        return str(content[name])
    except (ValueError, StopIteration, TypeError):
        wanted = field or ", ".join(_FIELDS)
        raise ConfigError(
            f"{where}: has none of {wanted}; data.module.label=json.NAME names it", _SEE
        ) from None


def _index(
    names: Sequence[str], labels: Sequence[str], offsets: Any, sizes: Any, classes: list[str], digest: Any
) -> ShardIndex:
    if not len(names):
        raise ConfigError("holds no samples", _SEE)
    joined_names, joined_labels = (JoinedNames(*JoinedNames.of(texts)) for texts in (names, labels))
    first, second = (np.asarray(part, dtype=np.int64) for part in (offsets, sizes))
    return ShardIndex(joined_names, joined_labels, first, second, classes, digest.hexdigest())


def _index_table(storage: Storage, place: str, image: str | None, label: str | None) -> ShardIndex:
    """Read the labels and names of a Parquet or an Arrow file."""
    table = _Table(storage, place)
    column = {"image": image, "label": label}
    for role, known in _COLUMNS.items():
        named = column[role] or next((name for name in known if name in table.columns), None)
        if named not in table.columns:
            raise ConfigError(
                f"{place}: has no column {named or ' or '.join(known)}; it has {', '.join(table.columns)}; "
                f"data.module.{role}=NAME names it",
                _SEE,
            )
        column[role] = named
    labels = [str(value) for value in table.values(column["label"])]
    stem = Path(place).stem
    paths = table.paths(column["image"])
    names = [f"{stem}/{i:07}{f'-{Path(p).name}' if p else ''}" for i, p in enumerate(paths)]
    rows = np.concatenate([np.arange(n) for n in table.rows])
    groups = np.repeat(np.arange(len(table.rows)), table.rows)
    digest = hashlib.blake2b(str(table.rows).encode(), digest_size=16)
    step = max(1, len(names) // min(_SAMPLED, 2 * len(table.rows)))  # a row of a group costs the group
    for i in range(0, len(names), step):
        digest.update(table.image(column["image"], int(groups[i]), int(rows[i]))[:_PIECE])
    return _index(names, labels, rows, groups, table.classes(column["label"]), digest)


def _index_lmdb(storage: Storage, place: str, image: str | None, label: str | None) -> ShardIndex:
    """Read all records of an LMDB file of the ModelZoo's (torch-toolbox): the labels lie in them."""
    for option, value in (("image", image), ("label", label)):
        if value is not None:
            raise ConfigError(f"data.module.{option}={value}: the records of {place} have no names", _SEE)
    records = _ModelZoo(place)
    count = records.value(b"__len__")
    if not isinstance(count, int):
        raise ConfigError(f"{place}: says no number of images (__len__)", _SEE)
    labels, sizes = [], []
    digest = hashlib.blake2b(digest_size=16)
    for number in range(count):
        data, target = records.sample(number)
        labels.append(str(target))
        sizes.append(len(data))
        if number % max(1, count // _SAMPLED) == 0:
            digest.update(data[:_PIECE])
    digest.update(np.asarray(sizes).tobytes())
    noted = records.value(b"classes")
    classes = (
        [n if isinstance(n, str) else ", ".join(map(str, n)) for n in noted]
        if isinstance(noted, list)
        else []
    )
    return _index([f"{n:07}" for n in range(count)], labels, range(count), sizes, classes, digest)


class _ModelZoo:
    """An LMDB file whose records `0`, `1`, ... are `(image file, label)`, as pyarrow serialised them up to version 11.

    That form has no pickle in it where it is of bytes and numbers: a header of 16 bytes, then an Arrow stream. It is
    read as that, and nothing else is.
    """

    def __init__(self, place: str) -> None:
        self._place = Path(place)
        self._arrow = _pyarrow()[0]

    def value(self, key: bytes) -> Any:
        """What a key stands for; None where it is not there."""
        content = reading(self._place).get(key)
        if content is None:
            return None
        try:
            stream = self._arrow.ipc.open_stream(self._arrow.BufferReader(bytes(content[_HEADER:])))
            return stream.read_next_batch().column(0)[0].as_py()
        except (self._arrow.ArrowException, StopIteration, OSError) as error:
            raise ConfigError(
                f"{self._place}: record {key.decode()} is not as torch-toolbox wrote it; pickled records are not read, "
                "they may run anything: write them as files or as tar shards",
                _SEE,
            ) from error

    def sample(self, number: int) -> tuple[bytes, int]:
        """Image file and label."""
        value = self.value(str(number).encode())
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], bytes)):
            raise ValueError(f"record {number} holds no image and label")
        return value[0], int(value[1])


_HEADER = 16


class _Table:
    """A Parquet or an Arrow file, by groups of rows."""

    def __init__(self, storage: Storage, place: str) -> None:
        self.place = place
        arrow, parquet = _pyarrow()
        self._file: Any = None
        try:
            if place.endswith(".parquet"):
                self._file = parquet.ParquetFile(storage.open(place) if is_remote(place) else place)
                self.schema = self._file.schema_arrow
                self.rows = [
                    self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)
                ]
            else:
                if is_remote(place):
                    raise ConfigError(f"{place}: Arrow files are read where they lie; copy them here", _SEE)
                self._whole = _read_arrow(arrow, place)
                self.schema, self.rows = self._whole.schema, [self._whole.num_rows]
        except arrow.ArrowException as error:
            raise ConfigError(f"{place}: cannot be read ({' '.join(str(error).split())})", _SEE) from error
        self.columns = self.schema.names
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def values(self, column: str | None) -> list[Any]:
        """All of a small column."""
        table = self._whole if self._file is None else self._file.read([column], use_threads=False)
        return table.column(column).to_pylist()

    def paths(self, column: str | None) -> list[str | None]:
        """The names that images were given; None where there are none."""
        kind = self.schema.field(column).type
        if "path" not in [kind.field(i).name for i in range(kind.num_fields)]:
            return [None] * sum(self.rows)
        table = self._whole if self._file is None else self._file.read([f"{column}.path"], use_threads=False)
        found: list[str | None] = []
        for chunk in table.column(column).chunks:
            found += chunk.field("path").to_pylist()
        return found

    def classes(self, column: str | None) -> list[str]:
        """The names of the classes as Hugging Face notes them in the file; empty where it does not."""
        try:
            noted = json.loads((self.schema.metadata or {})[b"huggingface"])
            return [str(name) for name in noted["info"]["features"][column]["names"]]
        except (KeyError, ValueError, TypeError):
            return []

    def size_of_group(self) -> int:
        """Bytes of the largest group as they lie in the file; of Arrow, nothing more than a row is read."""
        if self._file is None:
            return 0
        groups = (self._file.metadata.row_group(i) for i in range(len(self.rows)))
        return max(sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups)

    def image(self, column: str | None, group: int, row: int) -> bytes:
        """The bytes of an image file.

        Raises:
            ValueError: where the row holds none.
        """
        with self._lock:
            if self._file is None:
                table = self._whole
            else:
                if group not in self._kept:
                    self._kept[group] = self._file.read_row_group(group, [column], use_threads=False)
                    if len(self._kept) > _GROUPS:
                        self._kept.popitem(last=False)
                table = self._kept[group]
            value = table.column(column)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the row holds no bytes of an image, perhaps the name of a file elsewhere")
        return data


def _read_arrow(arrow: Any, place: str) -> Any:
    source = arrow.memory_map(place)
    try:
        return arrow.ipc.open_file(source).read_all()
    except arrow.ArrowInvalid:
        source.seek(0)
        return arrow.ipc.open_stream(source).read_all()  # what Hugging Face's save_to_disk writes


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet and Arrow files need pyarrow: pip install -e '.[shards]'", "README.md"
        ) from error
    return pyarrow, pyarrow.parquet


class ShardRecords(Records):
    """The images of several shards, numbered through them.

    Args:
        places: of the shards.
        indices: of the shards.
        column: of the images, in Parquet and Arrow files.
    """

    def __init__(self, places: Sequence[str], indices: Sequence[ShardIndex], column: str | None) -> None:
        self.places = list(places)
        self._starts = np.cumsum([0, *(len(i.offsets) for i in indices)])
        self._offsets = np.concatenate([i.offsets for i in indices])
        self._sizes = np.concatenate([i.sizes for i in indices])
        self._column = column
        self._storage = Storage()
        self._process, self._tables = 0, dict[str, _Table]()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": 0, "_tables": {}}

    def _shard(self, number: int) -> str:
        return self.places[int(np.searchsorted(self._starts, number, side="right")) - 1]

    def encoded(self, number: int) -> bytes:
        place = self._shard(number)
        try:
            if place.endswith(".lmdb"):
                return _ModelZoo(place).sample(int(self._offsets[number]))[0]
            if place.endswith(".tar"):
                return self._storage.read(place, int(self._offsets[number]), int(self._sizes[number]))
            table = self.table(place)
            column = self._column or next(n for n in _COLUMNS["image"] if n in table.columns)
            return table.image(column, int(self._sizes[number]), int(self._offsets[number]))
        except ConfigError:
            raise
        except Exception as error:  # each kind of storage and of file has errors of its own
            raise SampleError(f"{self.where(number)}: cannot be read ({error})", _SEE) from error

    def table(self, place: str) -> _Table:
        """A Parquet or an Arrow file, opened by this process."""
        if self._process != os.getpid():
            self._process, self._tables = os.getpid(), {}
        if place not in self._tables:
            self._tables[place] = _Table(self._storage, place)
        return self._tables[place]

    def where(self, number: int) -> str:
        return self._shard(number)


# as a data module

_Shards = Annotated[str | list[str] | None, "shards of the split"]


class ShardsDataModule(BaseDataModule):
    """Images in tar shards (WebDataset), or in Parquet or Arrow files (Hugging Face), here or on object storage.

    A sample of a tar file is a picture and a label of one name: `0001.jpg` and `0001.cls` (a number or a name), or
    `0001.json` with a field for it. A row of a table has a column of pictures (bytes, or Hugging Face's
    `{bytes, path}`) and one of labels. Samples are numbered in the order of the shards' names, and as they lie in them.

    Args:
        train_shards: names in `data_root_dir`, or addresses; `{000..146}` counts, `*` finds; null: those whose
            names or folders say train, and where none says so, all.
        val_shards: likewise; null: those that say val or validation, if any.
        test_shards: likewise.
        image: extension (tar) or column (table) of the pictures; null: the usual ones.
        label: extension, with `json.NAME` a field of it, or column of the labels; null: the usual ones.
        classes_file: names of the classes, a line each in the order of their numbers; null: as the shards say, else
            the numbers themselves.
        test_split: fraction held out as the test split where there are no shards of one; 0: none.
        kwargs: as for `BaseDataModule`.
    """

    def __init__(
        self,
        *,
        train_shards: _Shards = None,
        val_shards: _Shards = None,
        test_shards: _Shards = None,
        image: str | None = None,
        label: str | None = None,
        classes_file: str | None = None,
        test_split: TestFraction = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.task != "classification":
            raise ConfigError(f"data.task={self.task}: shards are read for classification", _SEE)
        self.shards: dict[SplitName, str | list[str] | None] = {
            "train": train_shards, "val": val_shards, "test": test_shards,
        }  # fmt: skip
        self.image, self.label = image, label
        self.classes_file = classes_file
        self.test_split = test_split

    def setup(self, stage: str) -> None:
        places = self._places()
        storage = Storage()
        indices = dict(
            zip(*self._indexed(storage, [p for some in places.values() for p in some]), strict=True)
        )
        self.remarks = [self._remark(places, indices)]
        if self.elsewhere:
            split = next(s for s in ("test", "val", "train") if s in places)
            self.remarks.append(f"its {split} split")
            self.hold_out_test(
                self._images(places[split], indices, self._classes(places[split], indices)), 0.0
            )
            return
        if "train" not in places:
            raise ConfigError(
                f"data.module.train_shards: no shards to train on beside {', '.join(places)}", _SEE
            )
        classes = self._classes(places["train"], indices)
        found = {split: self._images(some, indices, classes) for split, some in places.items()}
        if "test" in found:
            self.train_dataset, self.test_dataset = found["train"], found["test"]
        else:
            self.hold_out_test(found["train"], self.test_split)
        self.val_dataset = found.get("val")
        several_classes(found["train"])

    def _places(self) -> dict[SplitName, list[str]]:
        """The shards of each split that has any, sorted."""
        given = {split: shards for split, shards in self.shards.items() if shards is not None}
        places: dict[SplitName, list[str]] = {}
        for split, shards in given.items():
            patterns = [shards] if isinstance(shards, str) else shards
            places[split] = [
                p for pattern in patterns for name in expanded(pattern) for p in self._found(split, name)
            ]
        if "train" not in given:
            for split, some in self._by_name().items():
                if split not in given:
                    places[split] = some
        for some in places.values():
            for place in some:
                if not place.endswith(tuple(FORMATS)):
                    raise ConfigError(f"{place}: not a shard: they end in {', '.join(FORMATS)}", _SEE)
        return places

    def _found(self, split: str, name: str) -> list[str]:
        root = self.data_root_dir or "."
        if is_remote(name) or not is_remote(root):
            here = Path(root).expanduser() / Path(name).expanduser()
            place = absolute(name if is_remote(name) else str(here))
        else:
            place = f"{root.rstrip('/')}/{name}"
        option = f"data.module.{split}_shards={name}"
        if not glob.has_magic(name):
            if not is_remote(place) and not Path(place).is_file():
                raise ConfigError(f"{option}: {missing(Path(place), 'file')} ({place})", _SEE)
            return [place]
        if is_remote(place):
            protocol = place.partition("://")[0]
            system = Storage().system(place)
            found = [p if is_remote(p) else f"{protocol}://{p}" for p in system.glob(place)]
        else:
            folder = Path(glob.escape(str(Path(root).expanduser().resolve())))
            found = glob.glob(str(folder / Path(name).expanduser()), recursive=True)  # noqa: PTH207  # an absolute one
        if not found:
            raise ConfigError(f"{option}: there are no such files", _SEE)
        return sorted(found)

    def _by_name(self) -> dict[SplitName, list[str]]:
        """The shards in the folder by what their names say, those of no split being for training."""
        if self.data_root_dir is not None and is_remote(self.data_root_dir):
            raise ConfigError(
                f"data.module.train_shards is missing: what is in {self.data_root_dir} cannot be listed; name them, "
                "such as train-{000..146}.tar",
                _SEE,
            )
        root = self.data_path
        files = sorted(p for p in root.rglob("*") if p.suffix in FORMATS and not p.name.startswith("."))
        if not files:
            raise ConfigError(
                f"data.module.data_root_dir: {root}: holds no shards ({', '.join(FORMATS)})", _SEE
            )
        if len({p.suffix for p in files}) > 1:
            raise ConfigError(
                f"data.module.train_shards: {root} holds shards of several formats; name those that are meant",
                _SEE,
            )
        by_split: dict[SplitName | None, list[str]] = {}
        for file in files:
            words = [w for part in file.relative_to(root).parts for w in re.findall("[A-Za-z]+", part)]
            split = next((s for w in words if (s := split_of(w)) is not None), None)
            by_split.setdefault(split, []).append(str(file.resolve()))
        others = by_split.pop(None, [])
        if others and "train" in by_split:
            raise ConfigError(
                f"data.module.train_shards: of which split is {listed([Path(p).name for p in others])}, beside those "
                "that say train? Name them",
                _SEE,
            )
        return {**({"train": others} if others else {}), **by_split}  # type: ignore[dict-item]

    def _indexed(self, storage: Storage, places: list[str]) -> tuple[list[str], list[ShardIndex]]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return places, list(pool.map(lambda place: self._index_of(storage, place), places))

    def _index_of(self, storage: Storage, place: str) -> ShardIndex:
        try:
            state = storage.state(place)
            key = json.dumps([1, place, state, self.image, self.label])
            kept = cache_folder("shards") / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.npz"
            if (known := ShardIndex.read(kept)) is not None:
                return known
            make = {".tar": _index_tar, ".lmdb": _index_lmdb}.get(Path(place).suffix, _index_table)
            found = make(storage, place, self.image, self.label)
            found.write(kept)
            return found
        except ConfigError as error:
            raise error if place in str(error) else ConfigError(f"{place}: {error}", error.see) from error
        except FileNotFoundError as error:
            raise ConfigError(f"{place}: no such file", _SEE) from error
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{place}: cannot be read by the piece ({' '.join(str(error).split())}); a server has to offer byte "
                "ranges; else copy the shards here",
                _SEE,
            ) from error

    def _classes(self, places: list[str], indices: dict[str, ShardIndex]) -> list[str]:
        if self.classes_file is not None:
            path = Path(self.classes_file).expanduser()
            if not path.is_file():
                raise ConfigError(
                    f"data.module.classes_file={self.classes_file}: {missing(path, 'file')}", _SEE
                )
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if noted := next((indices[p].classes for p in places if indices[p].classes), None):
            return noted
        labels = {label for place in places for label in _distinct(indices[place].labels)}
        if all(label.isdecimal() for label in labels):
            return [str(number) for number in range(max(map(int, labels)) + 1)]
        return sorted(labels)

    def _images(self, places: list[str], indices: dict[str, ShardIndex], classes: list[str]) -> StoredImages:
        some = [indices[place] for place in places]
        targets = np.concatenate([self._targets(p, i, classes) for p, i in zip(places, some, strict=True)])
        digest = hashlib.blake2b("".join(i.digest for i in some).encode(), digest_size=16).hexdigest()
        return StoredImages(
            Path(self.data_root_dir or "."), ShardRecords(places, some, self.image), np.arange(len(targets)),
            _chained([i.names for i in some]), targets, self.input_channels, classes, digest,
        )  # fmt: skip

    def _targets(self, place: str, index: ShardIndex, classes: list[str]) -> np.ndarray:
        texts = _distinct(index.labels)
        if all(text.isdecimal() for text in texts):
            if (most := max(map(int, texts))) >= len(classes):
                raise ConfigError(
                    f"{place}: has label {most}; the training shards have {len(classes)} classes", _SEE
                )
            return np.fromiter(map(int, index.labels), dtype=np.int64, count=len(index.labels))
        matched = match_classes(texts, classes, place, "the training shards have").tolist()
        numbers = dict(zip(texts, matched, strict=True))
        return np.fromiter((numbers[t] for t in index.labels), dtype=np.int64, count=len(index.labels))

    def _remark(self, places: dict[SplitName, list[str]], indices: dict[str, ShardIndex]) -> str:
        """What these shards can promise."""
        every = [place for some in places.values() for place in some]
        kinds = sorted({FORMATS[Path(place).suffix] for place in every})
        promise = "any image is read by itself; order and resume are exact, as of files"
        if any(is_remote(place) for place in every):
            promise += "; each image is a request: task=pack copies them here once"
        elif "parquet" in kinds:
            some = places.get("train", every)
            table = _Table(Storage(), next(p for p in [*some, *every] if p.endswith(".parquet")))
            promise = (
                f"order and resume are exact, as of files; an image costs its row group ({max(table.rows)} rows, "
                f"{table.size_of_group() / 2**20:.1f} MiB): task=pack makes each a record of its own"
            )
        return f"{len(every)} {' and '.join(kinds)} shards: {promise}"


def _distinct(labels: JoinedNames) -> list[str]:
    return sorted(set(labels))


def _chained(parts: Sequence[JoinedNames]) -> JoinedNames:
    offsets, joined = zip(*(JoinedNames.of(part) for part in parts), strict=True)
    ends = np.cumsum([0, *(len(b) for b in joined)])
    shifted = [o[1:] + e for o, e in zip(offsets, ends, strict=False)]
    return JoinedNames(np.concatenate([[0], *shifted]).astype(np.int64), np.concatenate(joined))
