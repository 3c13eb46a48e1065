"""Any folder of images sorted by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from crucible.listing import image_files, subfolders
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.classes import match_classes
from datasets.images import ImageFiles
from datasets.layout import SplitName, find_layout, split_of
from datasets.packed import find_pack

TestFraction = Annotated[float, "[0, 1)", "fraction held out as the test split where there is none; 0: none"]


def class_folders(
    folder: Path,
    channels: int,
    classes: Sequence[str] | None = None,
    within: SplitName | None = None,
) -> ImageFiles:
    """The images of `folder/<class>/...`, at any depth, numbered in the order of the sorted class names.

    Args:
        folder: of the class folders.
        channels: 1 or 3.
        classes: the names that may occur (in any case), and their order; None: those found.
        within: only the images in this split's folders of the classes; None: all.

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
    known = found if classes is None else classes
    numbers = match_classes(found, known, option)
    names: list[str] = []
    targets: list[np.ndarray] = []
    for label in range(len(known)):
        files: list[str] = []
        for i in np.flatnonzero(numbers == label):
            files += image_files(folder / found[i], f"{found[i]}/")
        if within is not None:
            files = [file for file in files if split_of(file.split("/")[1]) == within]
        if not files and classes is None:
            raise ConfigError(f"{option}/{known[label]}: holds no images")
        names += files
        targets.append(np.full(len(files), label))
    return ImageFiles(folder, names, np.concatenate(targets), channels, known)


def several_classes(train: ImageFiles) -> ImageFiles:
    """The training images, of more than one class.

    Raises:
        ConfigError: for one class, which every network "learns" at once.
    """
    if len(train.classes) < 2:
        raise ConfigError(
            f"data.module.data_root_dir: {train.root} holds one class only, {', '.join(train.classes)}; "
            "is it the folder of the class folders?"
        )
    return train


def images_to_score(
    root: Path, channels: int, known: Sequence[str], order: Sequence[SplitName] = ("test", "val", "train")
) -> tuple[ImageFiles, list[str]]:
    """The labelled images of a folder that a trained network has not learnt from, and how it was understood.

    All images of a folder without splits; of the splits, the first that is there.

    Args:
        root: the folder.
        channels: 1 or 3.
        known: the network's classes.
        order: of preference.
    """
    if (pack := find_pack(root)) is not None:
        split = next(s for s in order if s in pack.splits)
        return pack.images(split, channels), [*pack.remarks, f"its {split} split"]
    found = find_layout(root, known, training=False)
    if not found.splits:
        return class_folders(found.base, channels, found_classes(found.base)), found.remarks
    split = next(s for s in order if s in found.splits)
    remarks = [*found.remarks, f"its {split} split"]
    if found.by_class:
        return class_folders(found.base, channels, found_classes(found.base), within=split), remarks
    folder = found.base / found.splits[split]
    return class_folders(folder, channels, found_classes(folder)), remarks


def found_classes(folder: Path) -> list[str] | None:
    """The class folders as known ones, so that one may be without images; None where there are none."""
    return subfolders(folder) or None


class ImageFolderDataModule(BaseDataModule):
    """Images in class folders, directly under the root or in its folders for training, validation and test.

    The split folders may be called as people call them (`Train`, `validation`, `test_images`), lie within
    the class folders, or begin one level below the root (`datasets.layout`).

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
        if self.elsewhere:
            images, self.remarks = images_to_score(
                self.data_path, self.input_channels, self.trained_classes or ()
            )
            self.hold_out_test(images, self.test_split)
            return
        if (pack := find_pack(self.data_path)) is not None:
            self.remarks = pack.remarks
            self._set({split: pack.images(split, self.input_channels) for split in pack.splits})
            return
        found = find_layout(self.data_path)
        self.remarks = found.remarks

        def read(split: SplitName, classes: Sequence[str] | None = None) -> ImageFiles:
            if found.by_class:
                return class_folders(found.base, self.input_channels, classes, within=split)
            folder = found.base / found.splits[split] if found.splits else found.base
            return class_folders(folder, self.input_channels, classes)

        if found.splits and "train" not in found.splits:
            raise ConfigError(
                f"data.module.data_root_dir: {found.base}: there is no training split beside "
                f"{', '.join(found.splits.values())}"
            )
        train = read("train")
        others: list[SplitName] = [split for split in ("test", "val") if split in found.splits]
        self._set({"train": train, **{split: read(split, train.classes) for split in others}})

    def _set(self, splits: dict[SplitName, ImageFiles]) -> None:
        train = splits["train"]
        if "test" in splits:
            self.train_dataset, self.test_dataset = train, splits["test"]
        else:
            self.hold_out_test(train, self.test_split)
        if "val" in splits:
            self.val_dataset = splits["val"]
        several_classes(train)
