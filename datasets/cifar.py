"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in memory, from the original release or from image folders."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torchvision import datasets as torchvision_datasets

from crucible.files import missing, replacing
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.image_folder import class_folders, images_to_score
from datasets.images import Arrays, ImageFiles, with_channels
from datasets.layout import split_folder

_SIDE = 32
_LOCK = ".download.lock"
_DEFAULT = Path("data")  # where data lie unless data_dir says otherwise; it need not be there yet


class _CifarDataModule(BaseDataModule):
    """50,000 training and 10,000 test images of 32x32 pixels.

    Under the root lies the original release, which is downloaded when there is nothing, or image folders
    `train/<class>/` and `test/<class>/` (classes in sorted order, decoded once into one array).
    """

    source: ClassVar[type[torchvision_datasets.CIFAR10]]

    def prepare_data(self) -> None:
        """Download the original release where there are no data.

        Raises:
            ConfigError: where that fails.
        """
        if self.data_root_dir is None:
            raise ConfigError("data.module.data_root_dir is missing: the folder of the data")
        root = Path(self.data_root_dir).expanduser()
        if self._present(root) or (self.elsewhere and root.is_dir()):
            return
        if root.is_symlink() and not root.exists():
            raise ConfigError(f"data.module.data_root_dir={self.data_root_dir}: {missing(root)}")
        if not root.parent.is_dir() and root.parent != _DEFAULT:
            known = next(p for p in root.parents if p.is_dir())
            raise ConfigError(
                f"data.module.data_root_dir={self.data_root_dir}: {root.parent} is not there (only {known} is), and "
                f"{self.source.__name__} is not downloaded there; make that folder, or mend the path"
            )
        made = [path for path in (root, root.parent) if not path.exists()]
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # seconds; by default a dead connection is waited for without end
        try:
            root.mkdir(parents=True, exist_ok=True)
            with (root / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together download once
                if not self._present(root):
                    self.source(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"data.module.data_root_dir={self.data_root_dir}: no {self.source.__name__} there, and the "
                f"download failed ({error})"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
            _remove_if_empty(made)  # a download that failed leaves nothing

    def _present(self, root: Path) -> bool:
        return (root / self.source.base_folder).is_dir() or split_folder(root, "train").is_dir()

    def setup(self, stage: str) -> None:
        root = self.data_path
        if (root / self.source.base_folder).is_dir():
            self.train_dataset, self.test_dataset = (self._original(root, train) for train in (True, False))
        elif self.elsewhere:
            images, self.remarks = images_to_score(root, self.input_channels, self.trained_classes or ())
            self.hold_out_test(decoded(images, root), 0.0)
        else:
            train = class_folders(split_folder(root, "train"), self.input_channels)
            test = class_folders(split_folder(root, "test"), self.input_channels, train.classes)
            self.train_dataset, self.test_dataset = decoded(train, root), decoded(test, root)

    def _original(self, root: Path, train: bool) -> Arrays:
        try:
            raw: Any = self.source(str(root), train=train)
        except RuntimeError as error:
            raise ConfigError(
                f"data.module.data_root_dir={self.data_root_dir}: {self.source.base_folder} in it is "
                "damaged; remove it to download it again"
            ) from error
        images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
        return Arrays(with_channels(images, self.input_channels), raw.targets, raw.classes)


def _remove_if_empty(folders: Iterable[Path]) -> None:
    """Remove folders with nothing but our lock in them, the inner ones first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            if all(path.name == _LOCK for path in folder.iterdir()):
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()


class CIFAR10DataModule(_CifarDataModule):
    """CIFAR-10: 10 classes, the original release or `train/<class>/` and `test/<class>/` folders."""

    source = torchvision_datasets.CIFAR10


class CIFAR100DataModule(_CifarDataModule):
    """CIFAR-100: 100 classes, the original release or `train/<class>/` and `test/<class>/` folders."""

    source = torchvision_datasets.CIFAR100


def decoded(files: ImageFiles, root: Path) -> Arrays:
    """All images in one array, kept in `root/.decoded` for the next run where that can be written."""
    key = hashlib.blake2b(digest_size=8)
    for name in files.names:
        status = (files.root / name).stat()
        # a copy that keeps size and time of writing still has another time of change
        key.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0".encode())
    cache = root / ".decoded" / f"{files.root.name}-{key.hexdigest()}-{files.channels}.npy"
    shape = (len(files), files.channels, _SIDE, _SIDE)
    images = _kept(cache, shape)
    if images is None:
        images = np.empty(shape, dtype=np.uint8)
        for i in range(len(files)):
            image = files[i][0]
            if image.size != (_SIDE, _SIDE):
                raise ConfigError(
                    f"data.module.data_root_dir: {files.root / files.names[i]} has {image.width}x"
                    f"{image.height} pixels, not {_SIDE}x{_SIDE}; other sizes work with data=image_folder"
                )
            images[i] = np.asarray(image).reshape(_SIDE, _SIDE, -1).transpose(2, 0, 1)
        _keep(cache, images)
    return Arrays(torch.from_numpy(images), files.targets, files.classes)


def _kept(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """What an earlier run decoded; None where there is nothing, or it is damaged."""
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _keep(path: Path, images: np.ndarray) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, images)
    except OSError:
        return  # a read-only or full disk only costs the time to decode again
