"""Posters whose file names begin with the value to predict."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

import numpy as np

from crucible.listing import image_files
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.image_folder import TestFraction
from datasets.images import ImageFiles


def value_in_name(name: str) -> float:
    """The number before the first `_` of a file name; NaN where there is none."""
    try:
        return float(PurePath(name).name.split("_", 1)[0])
    except ValueError:
        return math.nan


class PosterRegressionDataModule(BaseDataModule):
    """All `*.jpg` below the root; the target is the number before the first `_` of the file name.

    Args:
        test_split: fraction held out as the test split; 0: none.
        kwargs: as for `BaseDataModule`.
    """

    def __init__(self, *, test_split: TestFraction = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.test_split = test_split

    def setup(self, stage: str) -> None:
        root = self.data_path
        names = [name for name in image_files(root) if name.lower().endswith(".jpg")]
        if not names:
            raise ConfigError(f"data.module.data_root_dir={self.data_root_dir}: no *.jpg in it")
        values = np.asarray([value_in_name(name) for name in names], dtype=np.float32)
        if not np.isfinite(values).all():
            wrong = names[int(np.argmin(np.isfinite(values)))]
            raise ConfigError(
                f"data.module.data_root_dir: {root / wrong}: no number before the first '_' of its name"
            )
        self.hold_out_test(ImageFiles(root, names, values, self.input_channels), self.test_split)
