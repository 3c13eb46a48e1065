"""Which files of a folder are images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from crucible.options import ConfigError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_USUAL = (".jpg", ".JPEG", ".png", ".jpeg", ".JPG", ".PNG")  # looked for first: a million names are asked
_OF_OTHER_PROGRAMS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found"}  # not of the data


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_OTHER_PROGRAMS


def images_in(folder: Path) -> bool:
    """Whether images lie directly in `folder`."""
    with os.scandir(folder) as entries:
        return any(_is_image(e.name) and not e.is_dir() for e in entries)


def holds_images(folder: Path) -> bool:
    """Whether there is an image below `folder`, at any depth."""
    return images_in(folder) or any(holds_images(folder / name) for name in subfolders(folder))


def _is_image(name: str) -> bool:
    return not _passed_over(name) and name.lower().endswith(EXTENSIONS)


def image_files(folder: Path, called: str = "") -> list[str]:
    """The images below `folder`, relative to it, sorted; hidden files and folders are passed over.

    Args:
        folder: is searched.
        called: stands before each name.
    """
    found: list[str] = []
    pending = [""]
    while pending:
        relative = pending.pop()
        with _listed(folder / relative) as listed:
            entries = list(listed)
        inner = [entry.name for entry in entries if entry.is_dir()]
        names = [
            name
            for entry in entries
            if ((name := entry.name).endswith(_USUAL) or name.lower().endswith(EXTENSIONS)) and name[0] != "."
        ]
        if inner:
            names = list(set(names).difference(inner))
            pending += [f"{relative}{name}/" for name in inner if not _passed_over(name)]
        names.sort()
        before = called + relative
        found += [before + name for name in names]
    if len(found) > len(names):  # those of several folders
        found.sort()
    return found


def _listed(folder: Path) -> Any:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise ConfigError(
            f"data.module.data_root_dir: {folder}: cannot be listed ({error.strerror})"
        ) from error


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted; hidden ones are passed over."""
    with _listed(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not _passed_over(e.name))
