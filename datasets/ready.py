"""Ready corrupted test images: the folders of ImageNet-C and the arrays of CIFAR-10-C."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2F

from augmentation.corruptions import COMMON, EXTRA, SEVERITIES
from augmentation.policies.base import Policy
from crucible.options import ConfigError
from datasets.base_datamodule import BaseDataModule
from datasets.classes import folded
from datasets.corrupted import SEE, Cell
from datasets.image_folder import class_folders, found_classes
from datasets.images import Arrays, fingerprint, with_channels

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class AsTheyAre(Policy):
    """A policy for pictures that may have the network's size already: those are neither resized nor cropped.

    Args:
        policy: does all else.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def sample(self, image: Image.Image | Tensor) -> Tensor:
        size = getattr(self.policy, "size", None)
        width, height = image.size if isinstance(image, Image.Image) else image.shape[-2:]
        if (width, height) != (size, size):
            return self.policy.sample(image)
        return image if isinstance(image, Tensor) else v2F.pil_to_tensor(image)

    def keeps(self, input: Tensor) -> bool:
        return input.dtype == torch.uint8 and input.shape[-2:] == (getattr(self.policy, "size", None),) * 2

    def batch(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        return self.policy.batch(input, index, key)


class Ready(NamedTuple):
    """Where ready corrupted images lie: `files` holds the .npy file or the folder of each corruption."""

    root: Path
    files: dict[str, Path]
    arrays: bool


def find_ready(root: str | None) -> Ready | None:
    """The ready corruptions in a folder; None where it holds something else.

    `<corruption>.npy` beside `labels.npy`, as CIFAR-10-C, or `<corruption>/<severity>/<class>/`, as ImageNet-C, also
    with the folders of its archives between (`noise/gaussian_noise/...`).
    """
    folder = Path(root or "").expanduser()
    if root is None or not folder.is_dir():
        return None
    names = (*COMMON, *EXTRA)
    arrays = {n: folder / f"{n}.npy" for n in names if (folder / f"{n}.npy").is_file()}
    if arrays and (folder / "labels.npy").is_file():
        return Ready(folder, arrays, True)
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in names)]
    trees = {n: place / n for place in reversed(places) for n in names if _severities_in(place / n)}
    return Ready(folder, {n: trees[n] for n in names if n in trees}, False) if trees else None


def _severities_in(folder: Path) -> list[int]:
    return [s for s in SEVERITIES if (folder / str(s)).is_dir()]


class ReadyCorruptionsDataModule(BaseDataModule):
    """Ready corrupted images; `corrupt` says which of them are the test split. They train nothing."""

    def setup(self, stage: str) -> None:
        ready = find_ready(self.data_root_dir)
        assert ready is not None, "only built for such a folder"
        self.ready = ready
        self.test_transforms = AsTheyAre(self.test_transforms)
        name = next(iter(ready.files))
        first = Cell(name, 1 if ready.arrays else _severities_in(ready.files[name])[0])
        self.train_dataset = self.test_dataset = self._read(first)
        self.content = fingerprint([self.train_dataset])

    def corrupt(self, cell: Cell | None) -> None:
        """Let the test split be the images of this cell."""
        self._load()
        assert cell is not None, "there are no others"
        self.test_dataset = self._read(cell)
        self._match_labels()

    def _read(self, cell: Cell) -> Any:
        option = f"data.module.data_root_dir={self.data_root_dir}"
        place = self.ready.files.get(cell.corruption)
        if place is None:
            raise ConfigError(
                f"{option}: no {cell.corruption} there; it has {', '.join(self.ready.files)}", see=SEE
            )
        if self.ready.arrays:
            return self._array(place, cell.severity)
        folder = place / str(cell.severity)
        if not folder.is_dir():
            found = ", ".join(map(str, _severities_in(place)))
            raise ConfigError(f"{option}: {place} has no severity {cell.severity}; it has {found}", see=SEE)
        return class_folders(folder, self.input_channels, found_classes(folder))

    def _array(self, file: Path, severity: int) -> Arrays:
        images, labels = _loaded(file), _loaded(self.ready.root / "labels.npy")
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) % 5:
            shape = "x".join(map(str, images.shape))
            raise ConfigError(
                f"{file}: is {shape} {images.dtype}; it must be uint8 (5 N, height, width, 3), N for each severity"
            )
        count = len(images) // 5
        part = slice((severity - 1) * count, severity * count)
        if labels.shape not in ((len(images),), (count,)) or labels.dtype.kind not in "iu":
            raise ConfigError(
                f"{self.ready.root / 'labels.npy'}: is {labels.shape} {labels.dtype}; {file.name} needs whole numbers, "
                f"({len(images)},) or ({count},)"
            )
        numbers = np.asarray(labels[part] if len(labels) == len(images) else labels, dtype=np.int64)
        pictures = torch.from_numpy(np.ascontiguousarray(images[part].transpose(0, 3, 1, 2)))
        return Arrays(with_channels(pictures, self.input_channels), numbers, self._names(numbers))

    def _names(self, numbers: np.ndarray) -> list[str]:
        """The classes of numbered labels: CIFAR-10's, where the network has these; else by position."""
        known = self.trained_classes or []
        if {folded(n) for n in known} == set(_CIFAR10):
            return list(_CIFAR10)
        count = len(known) or int(numbers.max()) + 1
        if numbers.min() < 0 or numbers.max() >= count:
            raise ConfigError(
                f"{self.ready.root / 'labels.npy'}: has labels from {numbers.min()} to {numbers.max()}; the network "
                f"has {count} classes"
            )
        remark = "labels are numbers, taken as the position of the class in the network's"
        self.remarks = [remark]
        return known or [str(i) for i in range(count)]


def _loaded(file: Path) -> np.ndarray:
    with contextlib.suppress(OSError, ValueError, EOFError):
        content: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        return content
    raise ConfigError(f"{file}: cannot be read as an array of NumPy; is the download whole?")
