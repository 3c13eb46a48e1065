"""ImageNet-1k (ILSVRC 2012), or any subset of its classes, as folders of JPEG files."""

from __future__ import annotations

from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.image_folder import class_folders, images_to_score, several_classes
from datasets.images import ImageFiles
from datasets.layout import split_folder
from datasets.packed import find_pack


class ImagenetDataModule(BaseDataModule):
    """`train/<class>/` and `val/<class>/` under the root, with the same classes in both.

    The `val` folder, on which the literature reports, is the test split here: it takes no part in choosing
    anything. Validation is held out of `train`; `val_split=test` validates on the `val` folder instead.
    """

    split_folders = {"train": "train", "test": "val"}

    def setup(self, stage: str) -> None:
        root, channels = self.data_path, self.input_channels
        train: ImageFiles
        test: ImageFiles
        if self.elsewhere:
            known = self.trained_classes or ()
            images, self.remarks = images_to_score(root, channels, known, ("val", "test", "train"))
            self.hold_out_test(images, 0.0)
            return
        if (pack := find_pack(root)) is not None:
            self.remarks = pack.remarks
            if missing_splits := {"train", "val"} - set(pack.splits):
                raise ConfigError(
                    f"data.module.data_root_dir: {root}: a pack without {' and '.join(sorted(missing_splits))}; "
                    "data=image_folder reads it"
                )
            train, test = several_classes(pack.images("train", channels)), pack.images("val", channels)
        else:
            train = several_classes(class_folders(split_folder(root, "train"), channels))
            test = class_folders(split_folder(root, "val"), channels, train.classes)
        missing = set(range(len(train.classes))) - set(test.targets.tolist())
        if missing:
            name = train.classes[min(missing)]
            raise ConfigError(f"data.module.data_root_dir: {test.root} has no images of class {name}")
        self.train_dataset, self.test_dataset = train, test
