"""Files of `torch.save` with a checksum, believed only when whole.

torch verifies none of the checksums in its files. The seal is the comment at the end of the file, which is a zip
archive: a CRC-32 of every byte before it. It goes where the file goes, and all that reads files of torch reads it.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

_SEAL = "crucible crc32 {:08x}"
_SEALED = re.compile(rb"crucible crc32 ([0-9a-f]{8})")
_LENGTH = len(_SEAL.format(0))
_END = 22  # bytes of the record at the end of a zip archive; its last two are the length of the comment
_CHUNK = 1 << 20


class Damaged(Exception):
    """A file that is not to be believed; the text goes on from the file's name: `is truncated`."""


class _Sealing:
    """What torch writes to. An error of the system waits until torch's C code is left."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._checksum = 0
        self._error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self._error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self._error = error
        self._checksum = zlib.crc32(data, self._checksum)
        return data.nbytes

    def flush(self) -> None:
        pass

    def seal(self) -> None:
        if self._error is not None:
            raise self._error
        self._stream.seek(-2, os.SEEK_END)
        self._stream.write(_LENGTH.to_bytes(2, "little") + _SEAL.format(self._checksum).encode())
        self._stream.flush()


def write(content: Any, path: Path) -> None:
    """`torch.save(content, path)`, sealed.

    Raises:
        OSError: where it cannot be written.
    """
    with path.open("wb") as stream:
        sealing = _Sealing(stream)
        torch.save(content, sealing)  # type: ignore[arg-type]
        sealing.seal()


def damage(path: Path) -> str:
    """What is wrong with a file of torch, as in `Damaged`; empty for one that is whole.

    One that bears no seal (of another program, or of an earlier version) is whole where its records are.
    """
    try:
        with path.open("rb") as stream:
            head, size = stream.read(4), stream.seek(0, os.SEEK_END)
            if not size:
                return "is empty"
            stream.seek(max(0, size - _LENGTH - _END))
            tail = stream.read()
            if match := _SEALED.fullmatch(tail[-_LENGTH:]):
                whole = _checksum(stream, size - _LENGTH - 2) == int(match[1], 16)
                length = int.from_bytes(tail[-_LENGTH - 2 : -_LENGTH], "little")
                return "" if whole and length == _LENGTH else "is damaged: its checksum is wrong"
        if head[:2] == b"\x80\x02":
            return ""  # torch's format of before 2020, which is a stream of pickles
        if head != b"PK\x03\x04":
            return "is no file of torch"
        if tail[-_END:][:4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
            return "is truncated, or damaged at its end"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    try:
        with zipfile.ZipFile(path) as archive:
            return "" if archive.testzip() is None else "is damaged: the checksum of a part is wrong"
    except Exception:  # zipfile raises about six kinds
        return "is damaged"


def _checksum(stream: BinaryIO, length: int) -> int:
    """Of the file as it was before its seal."""
    stream.seek(0)
    checksum, buffer = 0, bytearray(_CHUNK)
    view = memoryview(buffer)
    while length > 0 and (count := stream.readinto(view[: min(length, _CHUNK)])):  # type: ignore[attr-defined]
        checksum, length = zlib.crc32(view[:count], checksum), length - count
    return zlib.crc32(b"\0\0", checksum)


def read(path: Path) -> Mapping[str, Any]:
    """A whole file's content, mapped into memory; no code of the file is run.

    Raises:
        Damaged: for what is not to be believed, and for what holds other objects than a mapping of tensors and
            plain values.
    """
    if problem := damage(path):
        raise Damaged(problem)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training files hold one
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
            )
    except Exception as error:  # torch raises about ten kinds, with advice in many lines
        raise Damaged(
            "is damaged, or holds objects other than a training state, which are not loaded"
        ) from error
    if not isinstance(content, Mapping):
        raise Damaged(f"holds a {type(content).__name__}, no training state")
    return content
