"""What cannot be written: one line that names the file, what is wrong with its place, and the way on."""

from __future__ import annotations

import errno
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
