"""Any folder of images sorted by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.images import ImageFiles, image_files, subfolders

VALIDATION_FOLDERS = ("val", "valid", "validation")
TestFraction = Annotated[float, "[0, 1)", "fraction held out as the test split where there is none; 0: none"]


def class_folders(folder: Path, channels: int, classes: Sequence[str] | None = None) -> ImageFiles:
    """The images of `folder/<class>/...`, at any depth, numbered in the order of the sorted class names.

    Args:
        folder: of the class folders.
        channels: 1 or 3.
        classes: the names that may occur, and their order; None: those found.

    Raises:
        ConfigError: for a missing folder, no classes, a class that is not in `classes`, or, where `classes`
            are not given, a class without images.
    """
    option = f"data.module.data_root_dir: {folder}"
    if not folder.is_dir():
        raise ConfigError(f"{option}: no such folder")
    found = subfolders(folder)
    if not found:
        raise ConfigError(f"{option}: holds no class folders (images belong in {folder.name}/<class>/)")
    unknown = sorted(set(found) - set(classes if classes is not None else found))
    if unknown:
        raise ConfigError(f"{option}/{unknown[0]}: the training images have no such class")
    names: list[str] = []
    targets: list[np.ndarray] = []
    for label, name in enumerate(found if classes is None else classes):
        files = image_files(folder / name) if name in found else []
        if not files and classes is None:
            raise ConfigError(f"{option}/{name}: holds no images")
        names += [f"{name}/{file}" for file in files]
        targets.append(np.full(len(files), label))
    return ImageFiles(folder, names, np.concatenate(targets), channels, found if classes is None else classes)


class ImageFolderDataModule(BaseDataModule):
    """Images in class folders, directly under the root or in its `train`, `val` and `test` folders.

    The validation folder may also be called `valid` or `validation`.

    A split without a folder is held out of the training images: test by `test_split`, validation by
    `val_split`. Images may have any size; the policy resizes them.

    Args:
        test_split: fraction held out as the test split where there is no `test` folder; 0: none.
        kwargs: as for `BaseDataModule`.
    """

    def __init__(self, *, test_split: TestFraction = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.test_split = test_split

    def setup(self, stage: str) -> None:
        root = self.data_path
        split = (root / "train").is_dir()
        train = class_folders(root / "train" if split else root, self.input_channels)
        if split and (root / "test").is_dir():
            self.train_dataset = train
            self.test_dataset = class_folders(root / "test", self.input_channels, train.classes)
        else:
            self.hold_out_test(train, self.test_split)
        for name in VALIDATION_FOLDERS:
            if split and (root / name).is_dir():
                self.val_dataset = class_folders(root / name, self.input_channels, train.classes)
                break
