"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in memory, from the original release or from image folders."""

from __future__ import annotations

import contextlib
import fcntl
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision import datasets as torchvision_datasets

from crucible.files import missing
from crucible.options import ConfigError
from crucible.pictures import Shape
from datasets.base_datamodule import BaseDataModule
from datasets.cache import OnError, OtherShape, decoded
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
        beside = None if self.cache == "none" else root
        if (root / self.source.base_folder).is_dir():
            self.train_dataset, self.test_dataset = (self._original(root, train) for train in (True, False))
        elif self.elsewhere:
            images, self.remarks = images_to_score(root, self.input_channels, self.trained_classes or ())
            self.hold_out_test(_all_decoded(images, beside, self.on_error), 0.0)
        else:
            train = class_folders(split_folder(root, "train"), self.input_channels)
            test = class_folders(split_folder(root, "test"), self.input_channels, train.classes)
            self.train_dataset, self.test_dataset = (
                _all_decoded(files, beside, self.on_error) for files in (train, test)
            )

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


def _all_decoded(files: ImageFiles, beside: Path | None, on_error: OnError) -> Arrays:
    """The images in memory, whatever `data.module.cache` says: `none` keeps no copy for the next run."""
    try:
        return decoded(files, Shape(_SIDE, _SIDE), beside, on_error)
    except OtherShape as error:
        raise ConfigError(
            f"data.module.data_root_dir: {error}; other sizes work with data=image_folder"
        ) from None
