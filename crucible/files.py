"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crucible.liveness import lives, this_process
from crucible.options import ConfigError
from crucible.writing import unwritable

_TEMPORARY = re.compile(r"\.(?P<pid>\d+)(?:-(?P<start>\d+)-(?P<space>\d+))?\.tmp$")


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


def is_put_aside(name: str) -> bool:
    """Whether a folder's name is that of a run which was run again afresh: `NAME.old-1`."""
    return re.search(r"\.old-\d+$", name) is not None


def folders_named(pattern: Path) -> list[Path]:
    """The folders that a path or a pattern names, sorted; what of it is there as it stands is no pattern.

    A pattern leaves out what was put aside, unless it says so itself (`*.old-1`).
    """
    base = next((p for p in (pattern, *pattern.parents) if p.exists()), Path())
    rest = pattern.relative_to(base)
    matches = [base] if rest == Path() else sorted(base.glob(str(rest)))
    asked = ".old-" in str(rest)
    return [
        p for p in matches
        if p.is_dir() and (asked or not any(map(is_put_aside, p.relative_to(base).parts)))
    ]  # fmt: skip


def why_not_writable(folder: Path) -> str:
    """Why no file can be written into `folder`, which may not be there yet; empty where one can. Leaves nothing."""
    there = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there}: {error.strerror}"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process, here, in another container or on another machine, uses."""
    own = this_process()
    known = f"-{own['start']}-{_number(own['space'])}" if {"start", "space"} <= own.keys() else ""
    return path.with_name(f".{path.name}.{own['host']}.{own['pid']}{known}.tmp")


def is_abandoned(temporary: Path, age: float, lost_after: float) -> bool:
    """Whether the process that made a temporary file has ended, or is taken to have, where that cannot be told.

    Args:
        temporary: named by `temporary_name`, now or by an earlier version.
        age: seconds since it was written.
        lost_after: seconds after which one of another machine or container counts as abandoned.
    """
    match = _TEMPORARY.search(temporary.name)
    if match is None:
        return False
    own, host = this_process(), socket.gethostname()
    here = temporary.name[: match.start()].endswith(f".{host}")
    if not here or match["space"] not in (None, _number(own.get("space", ""))):
        return age >= lost_after
    maker = {"host": host, "pid": int(match["pid"])}
    return not lives(maker if match["start"] is None else {**maker, "start": int(match["start"])})


def _number(space: str) -> str:
    return re.sub(r"\D", "", space)


@contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A name to write to; what stands there at the end takes the place of `path`.

    A reader or a killed process never sees half a file. Where writing fails, `path` stays as it was. A process that
    is killed before the renaming leaves the temporary file, which `is_abandoned` from then on.

    Args:
        path: the file.
        sync: wait until the disk has it, so that a machine that loses its power keeps one of the two whole: first
            the content, then the name.

    Raises:
        ConfigError: where a folder has the file's name.
        Unwritable: where it cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder stands where this file belongs; move it away", see="")
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # a process of this number was killed here
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary), str(path)):
            raise unwritable(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Let `path` hold `content` (a text in UTF-8), at once and whole; `sync` as in `replacing`."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
