"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crucible.writing import unwritable


def absolute(text: str) -> str:
    """A path made absolute; what has a scheme, such as `s3://bucket/data`, stays as typed."""
    return text if "://" in text else str(Path(text).expanduser().resolve())


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process, here or on another machine, uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A name to write to; what stands there at the end takes the place of `path`.

    A reader or a killed process never sees half a file. Where writing fails, `path` stays as it was.

    Args:
        path: the file.
        sync: wait until the disk has it, so that a machine that loses its power keeps one of the two whole.

    Raises:
        Unwritable: where it cannot be written.
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # a process of this number was killed here
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary), str(path)):
            raise unwritable(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Let `path` hold `content` (a text in UTF-8), at once and whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
