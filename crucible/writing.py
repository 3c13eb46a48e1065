"""What cannot be written: one line that names the file, what is wrong with its place, and the way on."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

_PLACES = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "larger than files may be there",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "input/output error of the device",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOENT: "its folder is gone",
    errno.ENOTDIR: "its folder is gone",
    errno.ESTALE: "its folder is gone",
}
FULL = (errno.ENOSPC, errno.EDQUOT)


class Unwritable(OSError):
    """A file that could not be written; what stood there before is as it was."""


def unwritable(path: Path, error: OSError, size: int = 0) -> Unwritable:
    """The line for a file that could not be written.

    Args:
        path: the file.
        error: what the system said; an `Unwritable` stays what it is.
        size: bytes that are needed, where they are known.
    """
    if isinstance(error, Unwritable):
        return error
    number = error.errno or 0
    reason = _PLACES.get(number) or (error.strerror or str(error)).lower()
    if number in FULL:
        needed = f" ({max(1, round(size / 2**20))} MB needed)" if size else ""
        return Unwritable(f"{path}: {reason}{needed}; after room is made the same command goes on")
    return Unwritable(f"{path}: {reason}; once it can be written the same command goes on")


def is_of_the_place(error: OSError) -> bool:
    """Whether an error of the system says that a disk is full or broken, whatever was to be written."""
    return error.errno in (*FULL, errno.EFBIG, errno.EROFS, errno.EIO)


class _Outlasting(io.FileIO):
    """A descriptor whose reader may go away, and whose disk may fill up: what is written then is lost, nothing else."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # for good: a pipe without a reader, a closed terminal
            if error.errno in (errno.EPIPE, errno.EIO):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())  # what this process starts inherits it
                os.close(nowhere)
            return memoryview(data).nbytes


def outlast_readers() -> None:
    """Let standard output and error outlast whoever reads them: `| head`, a closed terminal, a log on a full disk.

    A training must not end because a line about it could not be shown; main.log has what the console has. For the
    program's start, before anything has taken hold of the streams. A stream that was closed (`>&-`) goes nowhere: else
    the next file that is opened would have its number, and what libraries print would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        stream = getattr(sys, name)
        try:
            raw = _Outlasting(stream.fileno(), "w", closefd=False)
        except (OSError, AttributeError):  # no stream, or none of the system's
            continue
        stream.flush()
        through = stream.write_through
        lasting = io.TextIOWrapper(
            raw if through else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=through,
        )
        setattr(sys, name, lasting)


def fails_together(hook: Callable[..., None]) -> Callable[..., None]:
    """A callback's hook in which rank 0 writes: where it cannot, all ranks raise that, and none waits for it."""

    @wraps(hook)
    def together(self: Any, trainer: Any, *rest: Any) -> None:
        failure: Unwritable | None = None
        try:
            hook(self, trainer, *rest)
        except Unwritable as error:
            failure = error
        if trainer.world_size > 1:
            failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise failure

    return together
