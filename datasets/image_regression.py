"""Images with a value each, listed in a CSV file."""

from __future__ import annotations

import csv
import math
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.image_folder import TestFraction
from datasets.images import ImageFiles
from datasets.packed import find_pack

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


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
        if (pack := find_pack(root, "regression")) is not None:
            self.remarks = pack.remarks
            self.hold_out_test(pack.images("train", self.input_channels), self.test_split)
            return
        names, values = self._read(root)
        targets = np.asarray(values, dtype=np.float32)
        self.hold_out_test(ImageFiles(root, names, targets, self.input_channels), self.test_split)

    def _read(self, root: Path) -> tuple[list[str], list[float]]:
        path = root / self.csv_file
        if not path.is_file():
            raise ConfigError(f"data.module.csv_file={self.csv_file}: no such file in {root}")
        try:
            return self._read_rows(root, path)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(
                f"data.module.csv_file={self.csv_file}: {path} cannot be read as CSV in UTF-8 ({error})"
            ) from error

    def _read_rows(self, root: Path, path: Path) -> tuple[list[str], list[float]]:
        names: list[str] = []
        values: list[float] = []
        seen: dict[tuple[int, int], list[tuple[str, int]]] = {}
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            columns = [self._column(option, header, path) for option in ("file_column", "value_column")]
            for row in reader:
                if not any(row):
                    continue
                where = f"data.module.csv_file: {path}, line {reader.line_num}"
                if any(cell.strip() for cell in row[len(header) :]):
                    raise ConfigError(
                        f"{where}: {len(row)} fields, the header has {len(header)}; a decimal comma?"
                    )
                name, text = (row[column] if column < len(row) else None for column in columns)
                if not (text and _NUMBER.fullmatch(text.strip()) and math.isfinite(float(text))):
                    raise ConfigError(f"{where}: {text!r} is not a number")
                state = _state_of(root / name) if name else None
                if name is None or state is None:
                    raise ConfigError(f"{where}: no such file: {name!r}")
                same = seen.setdefault((state.st_dev, state.st_ino), [])
                for other, line in same:
                    if os.path.realpath(root / other).casefold() == os.path.realpath(root / name).casefold():
                        raise ConfigError(
                            f"{where}: {name} is listed in line {line} already; it might train and be tested on"
                        )
                same.append((name, reader.line_num))
                names.append(name)
                values.append(float(text))
        if not names:
            raise ConfigError(f"data.module.csv_file={self.csv_file}: {path} has no rows")
        return names, values

    def _column(self, option: str, header: list[str], path: Path) -> int:
        column = getattr(self, option)
        if header.count(column) != 1:
            has = "has" if column not in header else "has it twice:"
            raise ConfigError(
                f"data.module.{option}={column}: {path} {has} the columns {', '.join(header or ['none'])}"
            )
        return header.index(column)


def _state_of(path: Path) -> os.stat_result | None:
    """Of a file; None where there is none."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return state if stat.S_ISREG(state.st_mode) else None
