"""Test images under the corruptions of `augmentation.corruptions`, made as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from augmentation.corruptions import COMMON, EXTRA, SEVERITIES, corrupt, prepare
from crucible.batch import Batch
from crucible.options import ConfigError, suggest
from datasets.samples import Samples
from datasets.sampling import KeyedBatch

SEE = "docs/data.md"
GROUPS = {"all": COMMON, "extra": EXTRA}
_FEW_PIXELS = 1 << 20  # of all test images: starting workers takes longer than corrupting these


class Cell(NamedTuple):
    """One corruption at one severity."""

    corruption: str
    severity: int


def wanted_cells(corruption: str | Sequence[str] | None, severity: int | str | None) -> list[Cell]:
    """The cells that the options name, by corruption, then severity.

    Args:
        corruption: a name, several, `all` (the 15 common ones) or `extra` (the four others).
        severity: 1 to 5; `all` or None: all five.

    Raises:
        ConfigError: for a corruption that there is not, or a severity without one.
    """
    if corruption is None:
        raise ConfigError(
            f"data.module.severity={severity}: of which data.module.corruption? all, or one of {', '.join(COMMON)}",
            see=SEE,
        )
    names: list[str] = []
    for name in [corruption] if isinstance(corruption, str) else corruption:
        if name not in GROUPS and name not in COMMON and name not in EXTRA:
            hint = suggest(str(name), [*GROUPS, *COMMON, *EXTRA])
            raise ConfigError(f"data.module.corruption={name}: no such corruption{hint}", see=SEE)
        names += GROUPS.get(name, (name,))
    severities = SEVERITIES if severity in (None, "all") else (int(severity or 0),)
    return [Cell(name, s) for name in dict.fromkeys(names) for s in severities]


class CorruptedSamples(Dataset):
    """Samples as a loader reads them, each picture corrupted as it would go to the network.

    Args:
        samples: an item `(epoch, places)` of it is a `Batch` of uint8 pictures.
        cell: what is done to them.
        split: their name in errors.
    """

    keeps = False  # a copy of the pictures in memory or on the device is of whole ones

    def __init__(self, samples: Samples, cell: Cell, split: str = "test") -> None:
        self.samples = samples
        self.cell = cell
        first = samples[(0, [0])].input
        if first.ndim != 4 or first.dtype != torch.uint8 or first.shape[1] not in (1, 3):
            shape = "x".join(map(str, first.shape[1:]))
            raise ConfigError(
                f"data.module.corruption={cell.corruption}: for pictures of one or three channels in 8 bits; a {split} "
                f"sample is {shape}, {str(first.dtype).removeprefix('torch.')}",
                see=SEE,
            )
        prepare(cell.corruption, *first.shape[2:])
        self._pixels = len(samples) * first.shape[2] * first.shape[3]

    def __len__(self) -> int:
        return len(self.samples)

    def __getattr__(self, name: str) -> Any:
        if name == "samples":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.samples, name)

    @property
    def few(self) -> bool:
        """Whether a loader does better without workers."""
        return self._pixels <= _FEW_PIXELS

    def example(self) -> Batch:
        """A batch of one."""
        return self[(0, [0])]

    def __getitem__(self, batch: KeyedBatch) -> Batch:
        whole: Batch = self.samples[batch]
        pictures = [
            torch.from_numpy(corrupt(picture.numpy(), *self.cell, index))
            for picture, index in zip(whole.input, whole.index.tolist(), strict=True)
        ]
        return whole._replace(input=torch.stack(pictures))
