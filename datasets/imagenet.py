"""ImageNet-1k (ILSVRC 2012), or any subset of its classes, as folders of JPEG files; its stylized twin, and both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from crucible.files import missing
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.classes import folded, match_classes
from datasets.groups import Joint
from datasets.image_folder import class_folders, images_to_score, several_classes
from datasets.images import ImageFiles
from datasets.layout import split_folder
from datasets.packed import find_pack

StylizedRoot = Annotated[str | None, "a second tree, of the same pictures in other styles; null: none"]
GROUPS = ("in", "sin")  # as they are logged


class ImagenetDataModule(BaseDataModule):
    """`train/<class>/` and `val/<class>/` under the root, with the same classes in both.

    The `val` folder, on which the literature reports, is the test split here: it takes no part in choosing
    anything. Validation is held out of `train`; `val_split=test` validates on the `val` folder instead.

    With a second tree, such as Stylized-ImageNet (Geirhos et al., arXiv 1811.12231), both are one data set: trained
    together, evaluated together and each by itself, as the groups `in` and `sin`. The versions of one picture, files
    of the same name, are both held out or none is.

    Args:
        stylized_root_dir: a second tree, of the same classes; null: none.
        kwargs: as for `BaseDataModule`.
    """

    split_folders = {"train": "train", "test": "val"}

    def __init__(self, *, stylized_root_dir: StylizedRoot = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stylized_root_dir = stylized_root_dir

    def setup(self, stage: str) -> None:
        if self.elsewhere:
            self.remarks = []
            self.hold_out_test(self._joined(self._scored(self.data_path), self._scored), 0.0)
            return
        train = several_classes(self._split("train", self.data_path))
        test = self._split("val", self.data_path, train.classes)
        self.train_dataset = self._joined(train, lambda root: self._split("train", root, train.classes))
        self.test_dataset = self._joined(test, lambda root: self._split("val", root, train.classes))

    def _split(
        self, split: Literal["train", "val"], root: Path, classes: Sequence[str] | None = None
    ) -> ImageFiles:
        """A split of one tree, or of a pack of it, with images of every class."""
        if (pack := find_pack(root)) is None:
            found = class_folders(split_folder(root, split), self.input_channels, classes)
        elif split not in pack.splits:
            raise ConfigError(
                f"data.module.data_root_dir: {root}: a pack without {split}; data=image_folder reads it"
            )
        else:
            found = pack.images(split, self.input_channels)
            self.remarks += [r for r in pack.remarks if r not in self.remarks]
        if without := set(range(len(found.classes))) - set(found.targets.tolist()):
            name = found.classes[min(without)]
            raise ConfigError(f"data.module.data_root_dir: {found.root} has no images of class {name}")
        return found

    def _scored(self, root: Path) -> ImageFiles:
        images, remarks = images_to_score(
            root, self.input_channels, self.trained_classes or (), ("val", "test", "train")
        )
        self.remarks += remarks if self.stylized_root_dir is None else [f"{root}: {r}" for r in remarks]
        return images

    def _joined(self, first: ImageFiles, read: Callable[[Path], ImageFiles]) -> ImageFiles | Joint:
        """With what the second tree has, if there is one; labels are numbered alike."""
        if self.stylized_root_dir is None:
            return first
        root, option = Path(self.stylized_root_dir).expanduser(), "data.module.stylized_root_dir"
        if not root.is_dir():
            raise ConfigError(
                f"{option}={root}: {missing(root)}; give the folder of its train/ and val/, or set data_dir"
            )
        if root.resolve() == self.data_path.resolve():
            raise ConfigError(f"{option}={root}: is data_root_dir too; the second tree is another folder")
        try:
            second = read(root)
        except ConfigError as error:
            raise type(error)(str(error).replace("data.module.data_root_dir", option), error.see) from error
        known = {folded(name) for name in first.classes}
        union = [*first.classes, *(name for name in second.classes if folded(name) not in known)]
        if second.classes != union:
            second = second.relabelled(match_classes(second.classes, union, f"{option}: {root}"), union)
        if first.classes != union:
            first = first.relabelled(np.arange(len(first.classes)), union)
        return Joint(dict(zip(GROUPS, (first, second), strict=True)))
