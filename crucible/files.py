"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def absolute(text: str) -> str:
    """A path made absolute; what has a scheme, such as `s3://bucket/data`, stays as typed."""
    return text if "://" in text else str(Path(text).expanduser().resolve())


def missing(path: Path, what: str = "folder") -> str:
    """What is to be said of a path at which there is no such thing."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there; mend the link or name another {what}"
    if path.exists():
        return f"not a {what}; name one"
    return f"no such {what}"


def why_not_writable(folder: Path) -> str:
    """Why no file can be written into `folder`, which may not be there yet; empty where one can. Leaves nothing."""
    there = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there}: {error.strerror}"


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
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # a process of this number was killed here
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Let `path` hold `content` (a text in UTF-8), at once and whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
