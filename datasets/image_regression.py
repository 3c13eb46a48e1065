"""Images with a value each, listed in a CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.image_folder import TestFraction
from datasets.images import ImageFiles


class ImageRegressionDataModule(BaseDataModule):
    """A CSV file with a header; a row is an image file and its value.

    Args:
        csv_file: relative to the root, or absolute.
        file_column: header of the column of file names, relative to the root.
        value_column: header of the column of values.
        test_split: fraction held out as the test split; 0: none.
        kwargs: as for `BaseDataModule`.
    """

    def __init__(
        self,
        *,
        csv_file: Annotated[str, "relative to data_root_dir"] = "labels.csv",
        file_column: str = "file",
        value_column: str = "value",
        test_split: TestFraction = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.csv_file = csv_file
        self.file_column = file_column
        self.value_column = value_column
        self.test_split = test_split

    def setup(self, stage: str) -> None:
        root = self.data_path
        names, values = self._read(root)
        targets = np.asarray(values, dtype=np.float32)
        self.hold_out_test(ImageFiles(root, names, targets, self.input_channels), self.test_split)

    def _read(self, root: Path) -> tuple[list[str], list[float]]:
        path = root / self.csv_file
        if not path.is_file():
            raise ConfigError(f"data.module.csv_file={self.csv_file}: no such file in {root}")
        names: list[str] = []
        values: list[float] = []
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            for option in ("file_column", "value_column"):
                column = getattr(self, option)
                if column not in (reader.fieldnames or []):
                    raise ConfigError(
                        f"data.module.{option}={column}: {path} has the columns "
                        f"{', '.join(reader.fieldnames or ['none'])}"
                    )
            for row in reader:
                name, text = row[self.file_column], row[self.value_column]
                try:
                    value = float(text)
                except (TypeError, ValueError):
                    value = math.nan
                where = f"data.module.csv_file: {path}, line {reader.line_num}"
                if not math.isfinite(value):
                    raise ConfigError(f"{where}: {text!r} is not a number")
                if not name or not (root / name).is_file():
                    raise ConfigError(f"{where}: no such file: {name!r}")
                names.append(name)
                values.append(value)
        if not names:
            raise ConfigError(f"data.module.csv_file={self.csv_file}: {path} has no rows")
        return names, values
