"""Raw data sets: images in files and arrays in memory, untransformed, light in memory, safe to pickle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crucible.files import write_atomically
from crucible.options import ConfigError
from crucible.pictures import Decoder, Least, PictureError, decode, grey

SCHEME = 2  # of the fingerprint of files; 1 read no content, only sizes of some files
_FILES_READ = 4096  # of more files than can be read whole, and of so many pieces
_FILES_SIZED = 65536
_READ_WHOLE = 256 << 20  # bytes in all
_PIECE = 16 << 10  # bytes; four of a large file
_AT_ONCE = 1 << 16  # names that are copied in one go
_READERS = 8  # threads: on a network drive each file waits for its answer
_SETTLED_S = 2.0  # a file that was just written may be written again within its time stamp's tick


class SampleError(ConfigError):
    """A sample could not be read: one line that names its file.

    A loader's worker hands over an error as the text of its traceback. The line is the end of it; the rest is a note,
    which `main.log` holds.
    """

    def __init__(self, message: str, see: str = "") -> None:
        lines = message
        if message.startswith("Caught SampleError in"):
            lines = message.rpartition(f"{type(self).__name__}: ")[2]
            self.add_note(message)
        super().__init__(" ".join(lines.split()), see)


@contextlib.contextmanager
def naming(raw: Any, index: int, split: str = "") -> Iterator[None]:
    """Errors name the sample, its data set and its split in their text: from a worker, nothing but the text arrives."""
    of = f" of the {split} split" if split else ""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{error}{of and f' (a sample{of})'}") from error
    except Exception as error:
        name = f"sample {sample_name(raw, index)}{of} ({type(raw).__name__})"
        raise SampleError(
            f"{name}: {type(error).__name__}: {error}; main.log or HYDRA_FULL_ERROR=1 shows where"
        ) from error


def sample_name(raw: Any, index: int) -> str:
    """The file of a sample, relative to the data's folder; for data without files, its number."""
    names = getattr(raw, "names", None)
    return str(index) if names is None else names[index]


def unreadable(path: str | Path, what: str, error: Exception) -> SampleError:
    """The error for a file that cannot be read as `what`; an empty text: not at all."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = reason.replace(repr(str(path)), "it") or type(error).__name__
    return SampleError(
        f"{path}: cannot be read{what} ({reason}); replace or remove it, then give the command again, "
        "or leave such samples out with data.module.on_error=skip"
    )


def load_image(path: str | Path, channels: int, decoder: Decoder = "auto") -> Tensor:
    """The picture in a file as uint8 (channels, height, width), as `crucible.pictures.decode` makes it.

    Raises:
        SampleError: where it cannot be read, or is no picture.
    """
    try:
        return decode(read_file(path), channels, decoder)
    except PictureError as error:
        raise unreadable(path, " as an image", error) from error


def read_file(path: str | Path) -> bytes:
    """What is in the file of a sample.

    Raises:
        SampleError: where it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            content = os.read(descriptor, size + 1)
            while len(content) < size and (more := os.read(descriptor, size - len(content) + 1)):
                content += more
            return content
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, " as an image", error) from error


class Names(Sequence[str]):
    """Many strings in two arrays; workers that read them copy no pages, as they would of a list."""

    def __init__(self, names: Iterable[str]) -> None:
        names = names if isinstance(names, list) else list(names)
        joined = np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)
        ends = np.flatnonzero(joined == 0)
        if len(ends) != max(0, len(names) - 1):
            raise ValueError("a name has a null character")
        self._offsets = np.zeros(len(names) + 1, dtype=np.int64)
        if names:
            self._offsets[1:-1] = ends - np.arange(len(ends))
            self._offsets[-1] = len(joined) - len(ends)
        self._bytes = joined[joined != 0]

    def take(self, indices: np.ndarray) -> Names:
        """Those of the names, in this order."""
        chosen = Names([])
        lengths = np.diff(self._offsets)[indices]
        chosen._offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        chosen._bytes = np.empty(chosen._offsets[-1], dtype=np.uint8)
        for begin in range(0, len(indices), _AT_ONCE):
            part = slice(begin, begin + _AT_ONCE)
            first, size = chosen._offsets[begin], lengths[part]
            shift = np.repeat(self._offsets[indices[part]] - chosen._offsets[:-1][part], size)
            chosen._bytes[first : first + len(shift)] = self._bytes[
                shift + np.arange(first, first + len(shift))
            ]
        return chosen

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes())

    def content(self) -> Iterator[bytes]:
        """The names, without making strings of them."""
        yield self._offsets.tobytes()
        yield self._bytes.tobytes()


class ImageFiles(Dataset):
    """Images in files and their targets.

    Args:
        root: the folder that `names` are relative to.
        names: the files.
        targets: (N,) int64 class indices or float32 values.
        channels: 1 or 3.
        classes: the names of the classes.
    """

    decoder: Decoder = "auto"
    lie_elsewhere = False  # not in files of their own
    lenient = False  # whether a file that cannot be read is one without content, for `content`

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        targets: Iterable[int] | Iterable[float] | np.ndarray,
        channels: int,
        classes: Sequence[str] = (),
    ) -> None:
        self.root = root
        self._folder = os.fspath(
            root
        )  # joining paths as objects costs a tenth of what reading a small picture does
        self.names = names if isinstance(names, Names) else Names(names)
        self.targets = np.asarray(targets)
        self.channels = channels
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.read(index), self.targets[index]

    def read(self, index: int, least: Least | None = None) -> Tensor:
        """The picture, uint8 (channels, height, width).

        Args:
            index: of the picture.
            least: where it may be decoded smaller than it is, as for `crucible.pictures.decode`.

        Raises:
            SampleError: where it cannot be read, or is no picture.
        """
        try:
            return decode(self.encoded(index), self.channels, self.decoder, least)
        except PictureError as error:
            raise unreadable(self.where(index), " as an image", error) from error

    def encoded(self, index: int) -> bytes:
        """The bytes of the image file.

        Raises:
            SampleError: where they cannot be read.
        """
        return read_file(f"{self._folder}/{self.names[index]}")

    def where(self, index: int) -> str:
        """Where the image lies, for an error."""
        return f"{self._folder}/{self.names[index]}"

    def subset(self, indices: np.ndarray) -> ImageFiles:
        """Those of the files, as a data set of their own."""
        names = self.names.take(indices)
        return ImageFiles(self.root, names, self.targets[indices], self.channels, self.classes)

    def content(self, scheme: int = SCHEME) -> Iterator[bytes]:
        """What makes these data: names, targets, and what is in the files.

        Up to 256 MiB are read whole; of more, 64 KiB each of 4096 files spread evenly over them, and the
        sizes of 65,536.
        """
        yield from self.names.content()
        yield self.targets.tobytes()
        if scheme == 1:
            sizes = [_state(path, self.lenient).st_size for path in self._spread(_FILES_READ)]
            yield np.asarray(sizes, dtype=np.int64).tobytes()
        else:
            yield self._of_the_files()

    def _spread(self, files: int) -> list[Path]:
        step = max(1, len(self) // files)
        return [self.root / self.names[i] for i in range(0, len(self), step)]

    def _of_the_files(self) -> bytes:
        """A digest of sizes and content; kept for files whose time, size and place have not changed."""
        paths = self._spread(_FILES_SIZED)
        states = [_state(path, self.lenient) for path in paths]
        sizes = np.asarray([s.st_size for s in states], dtype=np.int64)
        stamps = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]
        key = hashlib.blake2b(np.asarray(stamps, dtype=np.uint64).tobytes(), digest_size=16)
        for part in (str((SCHEME, str(self.root.absolute()), len(self))).encode(), *self.names.content()):
            key.update(part)
        kept = cache_folder("fingerprints")
        with contextlib.suppress(OSError):
            if len(digest := (kept / key.hexdigest()).read_bytes()) == 16:
                return digest
        whole = len(paths) == len(self) and int(sizes.sum()) <= _READ_WHOLE
        content = hashlib.blake2b(sizes.tobytes(), digest_size=16)
        with ThreadPoolExecutor(_READERS) as pool:
            read = partial(_digest, whole=whole, lenient=self.lenient)
            for part in pool.map(read, paths if whole else self._spread(_FILES_READ)):
                content.update(part)
        newest = max((s.st_ctime_ns for s in states), default=0)
        if time.time_ns() - newest > _SETTLED_S * 1e9:
            with contextlib.suppress(OSError):  # without a place to keep it, it is read again
                kept.mkdir(parents=True, exist_ok=True)
                write_atomically(kept / key.hexdigest(), content.digest())
        return content.digest()

    def relabelled(self, numbers: np.ndarray, classes: Sequence[str]) -> ImageFiles:
        """The same files with `numbers[label]` for each label; those of negative numbers are left out."""
        targets = numbers[self.targets]
        changed = ImageFiles(self.root, self.names, targets, self.channels, classes)
        return changed.subset(np.flatnonzero(targets >= 0)) if (targets < 0).any() else changed


def cache_folder(kind: str) -> Path:
    """Where a user's things of a kind are kept that can be made again."""
    with contextlib.suppress(RuntimeError):  # a user without a home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crucible" / kind
    return Path(tempfile.gettempdir()) / "crucible" / kind


def _state(path: Path, lenient: bool) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        if lenient:
            return os.stat_result([0] * os.stat_result.n_fields)
        raise unreadable(path, "", error) from error


def _digest(path: Path, whole: bool, lenient: bool) -> bytes:
    try:
        return _digest_of(path, whole)
    except OSError as error:
        if lenient:
            return b""
        raise unreadable(path, "", error) from error


def _digest_of(path: Path, whole: bool) -> bytes:
    with path.open("rb") as stream:
        if whole:
            return hashlib.file_digest(stream, _blake2b).digest()
        size, parts = os.fstat(stream.fileno()).st_size, []
        for piece in range(4):
            stream.seek(max(0, size - _PIECE) * piece // 3)
            parts.append(stream.read(_PIECE))
        return _blake2b(b"".join(parts)).digest()


def _blake2b(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


class Arrays(Dataset):
    """Samples and targets in memory.

    Args:
        inputs: (N, C, ...) uint8 or float.
        targets: (N,) int64 or float32.
        classes: the names of the classes.
        lacking: why it could not be read, of each sample whose input is not there; taking one is an error.
    """

    source: ImageFiles | None = None  # the files that it was decoded from, where they are what the data are

    def __init__(
        self,
        inputs: Tensor,
        targets: np.ndarray | Sequence[int],
        classes: Sequence[str] = (),
        lacking: Mapping[int, str] | None = None,
    ) -> None:
        self.inputs = inputs
        self.targets = np.asarray(targets)
        self.classes = list(classes)
        self.lacking = dict(lacking or {})
        self._lacking = np.asarray(sorted(self.lacking), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if index in self.lacking:
            raise SampleError(self.lacking[index])
        return self.inputs[index], self.targets[index]

    @property
    def names(self) -> Names | None:
        """Of the files, where they are known."""
        return None if self.source is None else self.source.names

    def lacks(self, indices: np.ndarray) -> bool:
        """Whether one of them could not be read."""
        return len(self._lacking) > 0 and bool(np.isin(indices, self._lacking).any())

    def subset(self, indices: np.ndarray) -> Arrays:
        """Those of the samples, as a data set of their own."""
        chosen = Arrays(rows(self.inputs, torch.from_numpy(indices)), self.targets[indices], self.classes)
        if self.lacking:
            lacking = {n: self.lacking[i] for n, i in enumerate(indices.tolist()) if i in self.lacking}
            chosen = Arrays(chosen.inputs, chosen.targets, chosen.classes, lacking)
        if self.source is not None:
            chosen.source = self.source.subset(indices)
        return chosen

    def relabelled(self, numbers: np.ndarray, classes: Sequence[str]) -> Arrays:
        """The same samples with `numbers[label]` for each label; those of negative numbers are left out."""
        targets = numbers[self.targets]
        changed = Arrays(self.inputs, targets, classes, self.lacking)
        return changed.subset(np.flatnonzero(targets >= 0)) if (targets < 0).any() else changed

    def content(self, scheme: int = SCHEME) -> Iterator[bytes | memoryview]:
        """What makes these data: all of them, or the files that they come from."""
        if self.source is not None:
            yield from self.source.content(scheme)
            return
        yield str((tuple(self.inputs.shape), self.inputs.dtype)).encode()
        yield self.inputs.contiguous().view(-1).view(torch.uint8).numpy().data
        yield self.targets.tobytes()


def rows(inputs: Tensor, index: Tensor) -> Tensor:
    """`inputs[index]` in a tenth of the time: row by row as they lie, a pixel's channels together or apart."""
    if inputs.ndim == 4 and inputs.stride(1) == 1 < inputs.stride(3):
        return inputs.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return inputs.index_select(0, index)


class Relabelled(Dataset):
    """Any raw data set with other numbers for its classes.

    Args:
        raw: gives `(input, target)` by number.
        targets: (N,) its targets.
        numbers: the new number of each old one; samples of negative numbers are left out.
        classes: the names of the classes, by new number.
    """

    def __init__(self, raw: Any, targets: np.ndarray, numbers: np.ndarray, classes: Sequence[str]) -> None:
        self.raw = raw
        self.kept = np.flatnonzero(numbers[targets] >= 0)
        self.targets = numbers[targets][self.kept]
        self.classes = list(classes)
        if (names := getattr(raw, "names", None)) is not None:
            take = getattr(names, "take", None)
            self.names = take(self.kept) if take else [names[i] for i in self.kept.tolist()]
        for of_a_sample in ("group_numbers", "units"):
            if (values := getattr(raw, of_a_sample, None)) is not None:
                setattr(self, of_a_sample, np.asarray(values)[self.kept])
        self.groups = list(getattr(raw, "groups", None) or ())

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.raw[int(self.kept[index])][0], self.targets[index]


def fingerprint(datasets: Iterable[Any], scheme: int = SCHEME) -> str:
    """16 hexadecimal digits of the content of raw data sets, whatever folder they lie in.

    A data set says by `content()` what it is made of; of any other, the length, the targets and 256
    samples spread evenly over it are taken. None stands for a missing one. `scheme` is that of files; the
    others' is the same in all.
    """
    digest = hashlib.blake2b(digest_size=8)
    for dataset in datasets:
        digest.update(b"none" if dataset is None else str(len(dataset)).encode())
        if dataset is None:
            continue
        if isinstance(dataset, (ImageFiles, Arrays)):
            parts: Iterable[Any] = dataset.content(scheme)
        else:
            parts = dataset.content() if hasattr(dataset, "content") else _content(dataset)
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _content(dataset: Any) -> Iterator[bytes]:
    if hasattr(dataset, "targets"):
        yield np.asarray(dataset.targets).tobytes()
    for index in range(0, len(dataset), max(1, len(dataset) // 256)):
        with naming(dataset, index):
            image, target = dataset[index]
        yield np.ascontiguousarray(image).tobytes() + str(target).encode()


def with_channels(images: Tensor, channels: int) -> Tensor:
    """(N, 1 or 3, H, W) uint8 images in grey or in colour, by PIL's formula (ITU-R 601-2)."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    return grey(images)
