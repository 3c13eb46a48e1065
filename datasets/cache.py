"""Pictures of one size, decoded once: a file that every process of the machine maps, beside the data or in a cache.

Only originals that all have one size are kept. A policy that crops at random needs whole photographs, each of another
size: what pays there is a pre-resized copy (`task=pack`), not a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crucible.files import replacing, why_not_writable
from crucible.machine import core_count
from crucible.memory import memory_free
from crucible.options import ConfigError
from crucible.pictures import PictureError, Shape, shape_of
from datasets.images import Arrays, ImageFiles, SampleError, cache_folder

Cache = Literal["auto", "device", "memory", "none"]
OnError = Literal["raise", "skip"]
MOST = 2 << 30  # bytes that cache=auto decodes; what is asked for by name may take more
OF_DISK, OF_MEMORY = (
    0.1,
    0.25,
)  # parts of what is free that cache=auto takes; half where it is asked for by name
_LOOKED_AT = 32  # files whose headers say whether it is worth a try
_CHUNK = 512
_MOST_WORKERS, _WORTH_WORKERS = 8, 4096
_SMALL = 64  # pixels a side up to which a batch is one gather, quicker with the channels apart
log = logging.getLogger("crucible")


def in_memory(files: ImageFiles, cache: Cache, on_error: OnError, beside: Path) -> Arrays | ImageFiles:
    """The pictures decoded, where `cache` wants it and they have one size and fit; else the files.

    Args:
        files: the pictures.
        cache: `auto`: what fits into 2 GiB, a tenth of the free disk and a quarter of the free memory. `device`,
            `memory`: whatever fits into half of both.
        on_error: of files that cannot be decoded.
        beside: the folder of the data.

    Raises:
        ConfigError: where it was asked for by name and cannot be.
        SampleError: then, under `raise`, for a file that cannot be read.
    """
    if cache == "none":
        return files
    try:
        shape = _one_shape(files)
        _check_room(files, shape, cache, beside)
        arrays = decoded(files, shape, beside, on_error)
    except SampleError:
        if cache == "auto":
            return files  # whoever reads it says so, and of which split it is
        raise
    except _Not as reason:
        if cache == "auto":
            return files
        raise ConfigError(f"data.module.cache={cache}: {reason}; cache=auto takes what fits") from None
    arrays.source = files
    return arrays


def decoded(files: ImageFiles, shape: Shape, beside: Path | None, on_error: OnError = "raise") -> Arrays:
    """All pictures in one array; kept in `beside/.decoded`, or in the user's cache.

    That is where the folder cannot be written, and for the records of packs and shards.
    The key is made of names, sizes and times of the files. A copy with holes is not kept.

    Args:
        files: pictures of one size.
        shape: that size.
        beside: the folder of the data; None: nothing is kept.
        on_error: `skip`: the array lacks those that cannot be read.

    Raises:
        SampleError: under `raise`.
        OtherShape: for a picture of another size.
    """
    if beside is None:
        return _arrays(files, *_decode(files, shape, on_error), shape)
    name = f"{files.root.name}-{_key(files)}-{files.channels}-{shape.height}x{shape.width}.npy"
    path = _place(files, beside, name)
    full = _layout(len(files), files.channels, shape)
    if (kept := _kept(path, full)) is not None:
        return _arrays(files, kept, {}, shape)
    with _alone(path):
        if (kept := _kept(path, full)) is not None:  # another process has made it meanwhile
            return _arrays(files, kept, {}, shape)
        images, lacking = _decode(files, shape, on_error)
        if not lacking and _keep(path, images) and (kept := _kept(path, full)) is not None:
            images = kept  # mapped: one copy for all processes
    return _arrays(files, images, lacking, shape)


class _Not(Exception):
    """Why pictures are not decoded into memory."""


class OtherShape(_Not):
    """A picture is not of the size that all should have."""


def _differs(path: str, found: Shape, wanted: Shape) -> str:
    return f"{path} has {found.width}x{found.height} pixels, not {wanted.width}x{wanted.height}"


def _one_shape(files: ImageFiles) -> Shape:
    shape: Shape | None = None
    for i in range(0, len(files), max(1, len(files) // _LOOKED_AT)):
        with contextlib.suppress(PictureError, SampleError):  # decoding them will say it
            found = shape_of(files.encoded(i))
            if found != (shape := shape or found):
                raise OtherShape(_differs(files.where(i), found, shape))
    if shape is None:
        raise _Not(f"no picture in {files.root} can be read")
    return shape


def _check_room(files: ImageFiles, shape: Shape, cache: Cache, beside: Path) -> None:
    needed = len(files) * files.channels * shape.height * shape.width
    folder = _place(files, beside, "")
    disk = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free
    parts = (OF_DISK, OF_MEMORY) if cache == "auto" else (0.5, 0.5)
    room = min(disk * parts[0], memory_free() * parts[1], MOST if cache == "auto" else float("inf"))
    if needed > room:
        raise _Not(f"{len(files)} pictures of {shape.width}x{shape.height} take {needed / 2**30:.1f} GiB, "
                   f"{room / 2**30:.1f} may be taken of disk and memory")  # fmt: skip


def _layout(count: int, channels: int, shape: Shape) -> tuple[int, ...]:
    small = max(shape) <= _SMALL
    return (count, channels, *shape) if small else (count, *shape, channels)


def _arrays(files: ImageFiles, images: np.ndarray, lacking: dict[int, str], shape: Shape) -> Arrays:
    inputs = torch.from_numpy(images)
    if max(shape) > _SMALL:
        inputs = inputs.permute(0, 3, 1, 2)
    return Arrays(inputs, files.targets, files.classes, lacking)


class _Chunks(Dataset):
    """The pictures by the chunk; of each what could be decoded, and what is wrong with the others."""

    def __init__(self, files: ImageFiles, shape: Shape) -> None:
        self.files = files
        self.shape = shape

    def __len__(self) -> int:
        return -(-len(self.files) // _CHUNK)

    def __getitem__(self, chunk: int) -> tuple[Tensor, dict[int, str], str]:
        """Pixels, why by number, and the first picture of another size."""
        begin = chunk * _CHUNK
        end = min(begin + _CHUNK, len(self.files))
        pixels = np.zeros(_layout(end - begin, self.files.channels, self.shape), dtype=np.uint8)
        lacking: dict[int, str] = {}
        channels_first = max(self.shape) <= _SMALL
        for i in range(begin, end):
            try:
                found = self.files.read(i).numpy()
            except SampleError as error:
                lacking[i] = str(error)
                continue
            if found.shape[1:] != self.shape:
                return torch.empty(0), {}, _differs(self.files.where(i), Shape(*found.shape[1:]), self.shape)
            pixels[i - begin] = found if channels_first else found.transpose(1, 2, 0)
        return torch.from_numpy(pixels), lacking, ""


def _decode(files: ImageFiles, shape: Shape, on_error: OnError) -> tuple[np.ndarray, dict[int, str]]:
    images = np.empty(_layout(len(files), files.channels, shape), dtype=np.uint8)
    lacking: dict[int, str] = {}
    # processes: a small picture is decoded in less time than threads take to hand the interpreter on
    workers = min(_MOST_WORKERS, core_count()) if len(files) >= _WORTH_WORKERS else 0
    chunks = DataLoader(
        _Chunks(files, shape), batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    for number, (pixels, unread, other) in enumerate(chunks):
        if other:
            raise OtherShape(other)
        if unread and on_error == "raise":
            raise SampleError(next(iter(unread.values())))
        images[number * _CHUNK : number * _CHUNK + len(pixels)] = pixels.numpy()
        lacking.update(unread)
    return images, lacking


def _key(files: ImageFiles) -> str:
    key, root = hashlib.blake2b(digest_size=8), os.fspath(files.root)
    if files.lie_elsewhere:
        for part in files.content():
            key.update(part)
        return key.hexdigest()
    for name in files.names:
        try:
            status = os.stat(f"{root}/{name}")  # noqa: PTH116  # a path object costs more than the call
        except OSError:
            continue  # decoding says what is wrong with it
        # a copy that keeps size and time of writing still has another time of change
        key.update(
            f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0".encode(
                "utf-8", "surrogateescape"
            )
        )
    return key.hexdigest()


def _place(files: ImageFiles, beside: Path, name: str) -> Path:
    own = beside / ".decoded"
    # records of a pack or of shards have no folder of their own: perhaps a server's, or one that is to stay as it is
    elsewhere = files.lie_elsewhere or why_not_writable(own)
    return (cache_folder("decoded") if elsewhere else own) / name


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of the processes that start together one decodes; the others wait for it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written, a file system without locks
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def _kept(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """What an earlier run decoded, mapped; None where there is nothing, or it is damaged."""
    try:
        images = np.load(path, allow_pickle=False, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _keep(path: Path, images: np.ndarray) -> bool:
    try:
        if shutil.disk_usage(path.parent).free * 0.5 < images.nbytes:
            return False
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, images)
    except OSError:
        return False  # a read-only or full disk only costs the time to decode again
    return True
