"""`python main.py task=pack data=... out=PACK`: a resized copy of image files in one LMDB file, read back at the end.

Records are written in the order of the data, some seconds' worth at a time, each time all or none; so that after any
end, a kill included, the number of the next one is known and the same command goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from crucible.cells import cell
from crucible.command_line import option
from crucible.configuration import Config
from crucible.console import console, is_live, say
from crucible.files import replacing, why_not_writable
from crucible.machine import core_count
from crucible.options import ConfigError, read_options
from crucible.pictures import PictureError, decode, grey, shape_of
from crucible.writing import unwritable
from datasets.images import ImageFiles, SampleError, fingerprint
from datasets.layout import SplitName
from datasets.packed import (
    DATA,
    DESCRIPTION,
    Description,
    Pack,
    PackedRecords,
    PackOptions,
    checked,
    close,
    digest_of,
    import_lmdb,
    index_records,
    read_description,
)
from datasets.stored import StoredImages
from lab.build import build_data

REJECTS = "rejects.csv"
_SEE = "docs/data.md"
_COMMIT_S, _COMMIT_BYTES = 2.0, 64 << 20  # what a kill may cost
_FIRST_MAP = 256 << 20  # bytes of address space; doubled where it is full
_REQUESTS = 16  # at once, of remote shards
_AHEAD = 4  # images in work for each thread
_LINE_S = 30.0  # between two lines where there is no terminal


class _Split(NamedTuple):
    raw: ImageFiles
    first: int  # number of the record of its first image


def pack(config: Config) -> int:
    """Make, or go on with, or verify the pack that a checked configuration asks for; the exit status.

    Raises:
        ConfigError: for what cannot be packed, and a folder that holds something else.
        Unwritable: where there is no room.
    """
    options = read_options(PackOptions, config["pack"], "pack")
    if config["out"] is None:
        raise ConfigError("out is missing: the folder of the pack, out=PATH", _SEE)
    out = Path(config["out"]).expanduser().resolve()
    import_lmdb()
    if options.verify:
        return _verify(out)
    _refuse_place(out, config["data"]["module"])
    splits = _splits(config)
    raw_sets = [split.raw for split in splits.values()]
    source = {
        "name": config["data"]["module"]["name"], "folder": str(config["data"]["module"].get("data_root_dir")),
        "fingerprint": fingerprint(raw_sets),
    }  # fmt: skip
    wanted = Description(
        options={"size": options.size, "quality": options.quality}, source=source, task=config["data"]["task"],
        classes=list(raw_sets[0].classes), counts={name: len(split.raw) for name, split in splits.items()},
        made={**_versions(), "begun": _now()},
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        known = read_description(out)
        if known is None:
            wanted.write(out)
        else:
            _same(out, known, wanted)
            if known.complete:
                found = Pack(out, known)
                say(f"{out}: packed before ({_contents(known)}); pack.verify=true reads it whole")
                return 1 if found.description.samples != known.counts else 0
            wanted = replace(wanted, made=known.made)
        workers = config["data"]["module"]["num_workers"]
        remote = any("://" in raw.where(0) for raw in raw_sets)  # where each image waits for an answer
        threads = max(core_count(), _REQUESTS * remote) if workers == "auto" else max(1, workers)
        skips = config["data"]["module"].get("on_error") == "skip"
        return _Packing(out, wanted, splits, threads, skips).run()


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("lmdb", "pillow")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# what is packed, and where


def _splits(config: Config) -> dict[SplitName, _Split]:
    """The images of the data set by the split of its folder, before anything is held out."""
    data: Any = build_data(config)
    if hasattr(data, "test_split"):
        data.test_split = 0.0  # what has no folder is held out when it is read
    data.cache = "none"
    data.prepare_data()
    data.setup("fit")
    found: dict[SplitName, _Split] = {}
    first = 0
    for split, name in data.split_folders.items():
        raw = getattr(data, f"{split}_dataset")
        if raw is None:
            continue
        if not isinstance(raw, ImageFiles):
            raise ConfigError(
                f"task=pack packs image files; those of data.module.name={data.name} are {type(raw).__name__}",
                _SEE,
            )
        if not len(raw):
            raise ConfigError(
                f"data.module.data_root_dir: {raw.root}: the {name} split holds no images", _SEE
            )
        found[name] = _Split(raw, first)
        first += len(raw)
    return found


def _refuse_place(out: Path, module: Mapping[str, Any]) -> None:
    root = module.get("data_root_dir")
    if root is not None and "://" not in root:
        place = Path(root).expanduser().resolve()
        if out == place or place in out.parents:
            raise ConfigError(
                f"out={out}: lies inside the images that are packed ({place}); name another folder", _SEE
            )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: a file stands there; name a folder", _SEE)
    others = [] if not out.is_dir() else sorted(p.name for p in out.iterdir())
    if others and DESCRIPTION not in others:
        raise ConfigError(
            f"out={out}: holds something else ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); "
            "name an empty folder or a new one",
            _SEE,
        )
    if reason := why_not_writable(out):
        raise ConfigError(f"out={out}: cannot be written ({reason}); out=PATH is elsewhere", _SEE)


def _same(out: Path, known: Description, wanted: Description) -> None:
    """What was begun there is what is asked for now."""
    differ = [n for n in wanted.options if known.options.get(n) != wanted.options[n]]
    if differ:
        was, now = (", ".join(f"pack.{n}={d.options.get(n)}" for n in differ) for d in (known, wanted))
        raise ConfigError(f"out={out}: holds a pack with {was}, not {now}; another out= keeps both", _SEE)
    if known.source["fingerprint"] != wanted.source["fingerprint"] or known.counts != wanted.counts:
        what = "packed" if known.complete else "the packing began"
        raise ConfigError(
            f"out={out}: holds a pack of other images ({known.source['name']}, {known.source['folder']}), or they have "
            f"changed since {what}; another out= packs those of today",
            _SEE,
        )


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it with the process, however that ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(f"out={out}: another process is packing there", _SEE) from None
            # else a file system without locks
        yield
    finally:
        os.close(folder)


# packing

_NEXT, _REJECT = b"next", b"reject/"


class _Packing:
    """One attempt at a pack.

    Args:
        out: its folder.
        description: of the pack when it is done, but for what is in it.
        splits: what is packed.
        threads: that decode.
        skips: whether what the file system, or a server, does not give is a reject; else it ends the attempt.
    """

    def __init__(
        self,
        out: Path,
        description: Description,
        splits: Mapping[SplitName, _Split],
        threads: int,
        skips: bool,
    ) -> None:
        self.out, self.description, self.splits, self.threads = out, description, splits, threads
        self.skips = skips
        self.total = sum(description.counts.values())

    def run(self) -> int:
        lmdb = import_lmdb()
        with _full_disk_in_a_line(self.out):
            data = self.out / DATA
            room = max(_FIRST_MAP, 2 * data.stat().st_size) if data.exists() else _FIRST_MAP
            environment = lmdb.open(str(self.out), map_size=room, lock=False, meminit=False)
            try:
                writer = _Writer(environment)
                begin = writer.next()
                if 0 < begin < self.total:
                    say(f"{self.out}: goes on at image {begin + 1} of {self.total}")
                with _Shown(f"packing {self.description.source['name']}", self.total, begin) as shown:
                    self._write(writer, begin, shown)
                samples = self._write_index(writer, writer.rejects())
                rejects = writer.rejects()
            finally:
                environment.close()
        size = (self.out / DATA).stat().st_size
        self._list_rejects(rejects)
        done = replace(self.description, samples=samples, size=size, complete=True)
        with _Shown("reading it back", sum(samples.values()), 0) as shown:
            digests, changed = _read_back(Pack(self.out, done), shown, self.threads)
        if changed:
            raise ConfigError(
                f"{self.out / DATA}: record {changed[0]} reads otherwise than it was written: the disk is not to be "
                "trusted; another out= packs elsewhere",
                _SEE,
            )
        made = {**self.description.made, "done": _now()}
        done = replace(done, digests=digests, made=made)
        done.write(self.out)
        say(f"{self.out}: {_contents(done)}, verified")
        root = option("data.module.data_root_dir", self.out)
        say(f"train from it: the same command without task=pack, with {root}")
        for line in _reject_lines(rejects, self.out):
            say(line)
        return 1 if rejects else 0

    def _write(self, writer: _Writer, begin: int, shown: _Shown) -> None:
        size, quality = self.description.options["size"], self.description.options["quality"]

        def images() -> Iterator[tuple[int, ImageFiles, int]]:
            for split in self.splits.values():
                for index in range(max(0, begin - split.first), len(split.raw)):
                    yield split.first + index, split.raw, index

        def work(item: tuple[int, ImageFiles, int]) -> tuple[int, bytes | str]:
            number, raw, index = item
            try:
                return number, checked(repacked(raw, index, size, quality))
            except SampleError as error:
                if isinstance(error, _NotGiven) and not self.skips:  # which may pass, as a reject does not
                    raise _NotGiven(
                        f"{error}; {number} of {self.total} images are done, and the same command goes on there; "
                        "with data.module.on_error=skip it leaves such images out",
                        _SEE,
                    ) from error
                return number, str(error)

        try:
            for number, result in _in_order(work, images(), self.threads):
                writer.put(number, result)
                shown.advance()
        except _NotGiven:
            writer.commit()
            raise
        writer.commit()

    def _write_index(self, writer: _Writer, rejects: Mapping[int, str]) -> dict[SplitName, int]:
        index, samples = {}, {}
        for name, split in self.splits.items():
            numbers = np.arange(split.first, split.first + len(split.raw))
            kept = np.flatnonzero(~np.isin(numbers, list(rejects)))
            self._refuse_without_images(name, split, kept, rejects)
            index[name] = (split.raw, kept, numbers[kept])
            samples[name] = len(kept)
        writer.put_all(index_records(index))
        return samples

    def _refuse_without_images(
        self, name: str, split: _Split, kept: np.ndarray, rejects: Mapping[int, str]
    ) -> None:
        raw = split.raw
        labels = np.asarray(raw.targets if raw.classes else np.zeros(len(raw), dtype=np.int64))
        lost = np.setdiff1d(labels, labels[kept])
        if not len(lost):
            return
        of = f" of class {raw.classes[lost[0]]}" if len(kept) else ""
        why = rejects[split.first + int(np.flatnonzero(labels == lost[0])[0])]
        raise ConfigError(f"the {name} split: no image{of} could be read, the first: {why}", _SEE)

    def _list_rejects(self, rejects: Mapping[int, str]) -> None:
        if not rejects:
            (self.out / REJECTS).unlink(missing_ok=True)
            return
        with (
            replacing(self.out / REJECTS) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream,
        ):
            stream.write("split,file,reason\n")
            for number, reason in rejects.items():
                name, split = next(
                    (n, s) for n, s in self.splits.items() if s.first <= number < s.first + len(s.raw)
                )
                cells = (name, split.raw.names[number - split.first], reason)
                stream.write(",".join(_quoted(cell(text)) for text in cells) + "\n")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _reject_lines(rejects: Mapping[int, str], out: Path) -> list[str]:
    if not rejects:
        return []
    shown = [f"  {reason}" for reason in itertools.islice(rejects.values(), 5)]
    return [f"{len(rejects)} images could not be read and are not in it ({out / REJECTS}):", *shown]


class _NotGiven(SampleError):
    """The bytes of an image were not to be had; of a broken image they are."""


def _encoded(raw: ImageFiles, index: int) -> bytes:
    """The bytes of an image file.

    Raises:
        _NotGiven: for an error of the file system or of the server.
        SampleError: where what is stored is broken.
    """
    try:
        return raw.encoded(index)
    except SampleError as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__
        if cause is None:
            raise
        reason = cause.strerror or str(cause) or type(cause).__name__
        raise _NotGiven(f"{raw.where(index)}: cannot be read ({reason})", _SEE) from error


def repacked(raw: ImageFiles, index: int, size: int | None, quality: int) -> bytes:
    """An image file as a pack holds it: its own bytes where its short side is at most `size`, else a smaller JPEG.

    The size is that of torchvision's `Resize(size)`, and so is the filter (PIL's bilinear one, with antialiasing):
    what an evaluation policy resizes to the same size is then, but for the JPEG coding, what it makes of the original.
    Colour is coded at half the resolution (4:2:0). Grey images stay grey; EXIF orientation is applied.

    Args:
        raw: the data set.
        index: which image.
        size: short side in pixels; None: the file as it is, when it can be read.
        quality: of the JPEG.

    Raises:
        SampleError: for what cannot be read.
    """
    content = _encoded(raw, index)
    try:
        pixels = decode(content, 3)  # what has no whole picture is no copy either
        if size is None or min(shape_of(content)) <= size:
            return content
        pixels = pixels if _has_color(content) else grey(pixels)
    except PictureError as error:
        raise SampleError(f"{raw.where(index)}: cannot be read as an image ({error})") from error
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    width, height = picture.size
    long = int(size * max(width, height) / min(width, height))
    scaled = (size, long) if width <= height else (long, size)
    file = io.BytesIO()
    picture.resize(scaled, Image.Resampling.BILINEAR).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _has_color(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return image.mode not in ("1", "L", "LA", "I") and not image.mode.startswith("I;16")


def _in_order(work: Callable[[Any], Any], items: Iterator[Any], threads: int) -> Iterator[Any]:
    """What `work` makes of the items, in their order, on several threads that run a little ahead."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= threads * _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class _Writer:
    """Records that are in the file all at once; and the number of the next one, with them."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._pending: dict[bytes, bytes] = {}
        self._bytes, self._since = 0, time.monotonic()
        self._lmdb = import_lmdb()

    def next(self) -> int:
        """The number of the first image that is neither in the file nor rejected."""
        with self._environment.begin() as transaction:
            return int(transaction.get(_NEXT, b"0"))

    def rejects(self) -> dict[int, str]:
        """Why which images are not in the file."""
        found = {}
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            for key, value in cursor.iternext() if cursor.set_range(_REJECT) else ():
                if not key.startswith(_REJECT):
                    break
                found[int.from_bytes(key[len(_REJECT) :], "big")] = value.decode(errors="surrogateescape")
        return found

    def put(self, number: int, result: bytes | str) -> None:
        """A record, or why there is none."""
        name = number.to_bytes(8, "big")
        if isinstance(result, str):
            self._pending[_REJECT + name] = result.encode(errors="surrogateescape")
        else:
            self._pending[name] = result
            self._bytes += len(result)
        self._pending[_NEXT] = str(number + 1).encode()
        if self._bytes >= _COMMIT_BYTES or time.monotonic() - self._since >= _COMMIT_S:
            self.commit()

    def put_all(self, records: Mapping[bytes, bytes]) -> None:
        """Records with names of their own."""
        self._pending.update(records)
        self.commit()

    def commit(self) -> None:
        """Let all that is waiting be in the file."""
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending.items():
                        transaction.put(key, value)
                break
            except self._lmdb.MapFullError:
                self._environment.set_mapsize(self._environment.info()["map_size"] * 2)
        self._pending.clear()
        self._bytes, self._since = 0, time.monotonic()


@contextlib.contextmanager
def _full_disk_in_a_line(out: Path) -> Iterator[None]:
    lmdb = import_lmdb()
    try:
        yield
    except lmdb.Error as error:
        number = getattr(error, "code", None) or errno.EIO
        if number == errno.EIO and shutil.disk_usage(out).free < _COMMIT_BYTES:
            number = errno.ENOSPC  # LMDB says of a write that was cut short that it failed
        raise unwritable(out / DATA, OSError(number, str(error))) from error


# reading back


def _read_back(found: Pack, shown: _Shown, threads: int) -> tuple[dict[SplitName, str], list[int]]:
    """The digests of the splits, and the records that are not what was written."""
    digests: dict[SplitName, str] = {}
    changed: list[int] = []
    records = PackedRecords(found.folder)
    for split in found.splits:
        raw = found.images(split, 3) if split in found.description.digests else _undigested(found, split)

        def read(number: int) -> bytes | int:
            try:
                return hashlib.blake2b(records.encoded(number), digest_size=16).digest()
            except SampleError:
                return number

        parts = []
        for result in _in_order(read, iter(raw.numbers.tolist()), threads):
            shown.advance()
            if isinstance(result, int):
                changed.append(result)
                result = b""
            parts.append(result)
        digests[split] = digest_of(raw, parts)
    close(found.folder)
    return digests, changed


def _undigested(found: Pack, split: SplitName) -> StoredImages:
    described = replace(found.description, digests={split: ""})
    return Pack(found.folder, described).images(split, 3)


def _verify(out: Path) -> int:
    known = read_description(out)
    if known is None:
        raise ConfigError(f"out={out}: no pack there; task=pack without pack.verify makes one", _SEE)
    found = Pack(out, known)
    with _Shown("reading", sum(known.samples.values()), 0) as shown:
        digests, changed = _read_back(found, shown, core_count())
    wrong = [split for split in known.counts if digests[split] != known.digests.get(split)]
    if not wrong:
        say(f"{out}: {_contents(known)}, verified")
        return 0
    records = f"; records that have changed: {', '.join(map(str, changed[:8]))}" if changed else ""
    raise ConfigError(
        f"{out}: not what was packed (split {', '.join(wrong)}{records}); task=pack with a new out= makes it anew",
        _SEE,
    )


# what is said


def _contents(known: Description) -> str:
    sizes = ", ".join(f"{known.samples[split]} {split}" for split in known.counts)
    return f"{sizes} images, {known.size / 2**20:.1f} MiB"


class _Shown:
    """A bar on a terminal, elsewhere a line now and then."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done
        self._said = self._begun = time.monotonic()
        self._first = done
        self._bar: Progress | None = None

    def __enter__(self) -> _Shown:
        if is_live():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                console=console(), transient=True,
            )  # fmt: skip
            self._bar.add_task(self._title, total=self._total, completed=self._done, rate="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            rate = f"{(self._done - self._first) / max(1e-9, time.monotonic() - self._begun):.0f} images/s"
            self._bar.update(self._bar.task_ids[0], completed=self._done, rate=rate)
        elif time.monotonic() - self._said >= _LINE_S:
            self._said = time.monotonic()
            say(f"{self._title}  {self._done}/{self._total}")
