"""What a loader reads: samples with their policy, whole batches at a time; errors name the sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from augmentation.policies.base import Policy
from crucible.batch import Batch
from crucible.keyed import keyed_rng, stream_key
from datasets.images import Arrays, SampleError
from datasets.sampling import KeyedBatch

_BLANK = 64  # pixels a side


class Samples(Dataset):
    """Some samples of a raw data set with a policy's sample part; an item is a whole batch.

    Args:
        raw: gives `(input, target)` by number.
        indices: the numbers in `raw` of the samples, or None for all.
        policy: its `sample` is applied to each input.
        stream: name of the random stream.
        seed: of the random stream.
    """

    def __init__(self, raw: Any, indices: np.ndarray | None, policy: Policy, stream: str, seed: int) -> None:
        self.raw = raw
        self.indices = indices
        self.policy = policy
        self.stream = stream
        self.seed = seed
        self.skips = (
            False  # whether what cannot be read is a blank, its number -1 - index, instead of an error
        )

    def __len__(self) -> int:
        return len(self.raw) if self.indices is None else len(self.indices)

    @property
    def keeps(self) -> bool:
        """Whether the samples lie in memory and need no work of their own."""
        return isinstance(self.raw, Arrays) and self.policy.keeps(self.raw.inputs)

    def __getitem__(self, batch: KeyedBatch) -> Batch:
        epoch, places = batch
        indices = np.asarray(places, dtype=np.int64)
        if self.indices is not None:
            indices = self.indices[indices]
        index = torch.from_numpy(indices)
        if self.keeps:
            return Batch(self.raw.inputs[index], _targets(self.raw.targets[indices]), index)
        if self.skips:
            return self._readable(epoch, indices)
        inputs, targets = zip(*(self._sample(epoch, i) for i in indices.tolist()), strict=True)
        return Batch(torch.stack(inputs), _targets(np.asarray(targets)), index)

    def _readable(self, epoch: int, indices: np.ndarray) -> Batch:
        read: dict[int, tuple[Tensor, Any]] = {}
        for index in indices.tolist():
            with suppress(SampleError):
                read[index] = self._sample(epoch, index)
        blank = torch.zeros_like(next(iter(read.values()))[0]) if read else self.policy.sample(self._blank())
        inputs = [read[i][0] if i in read else blank for i in indices.tolist()]
        targets = [read[i][1] if i in read else self.raw.targets[i] for i in indices.tolist()]
        index = [i if i in read else -1 - i for i in indices.tolist()]
        return Batch(torch.stack(inputs), _targets(np.asarray(targets)), torch.tensor(index))

    def _blank(self) -> Image.Image:
        return Image.new("L" if getattr(self.raw, "channels", 3) == 1 else "RGB", (_BLANK, _BLANK))

    def why_unreadable(self, index: int) -> str:
        """What is wrong with the sample `index` of the raw data; empty where it can be read."""
        try:
            self._sample(0, index)
        except SampleError as error:
            return str(error)
        return ""

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, Any]:
        with naming(self.raw, index):
            input, target = self.raw[index]
            with keyed_rng(stream_key(self.seed, self.stream, epoch, index)):
                return self.policy.sample(input), target


@contextmanager
def naming(raw: Any, index: int) -> Iterator[None]:
    """Errors name the sample in their text: from a worker, nothing but the text arrives."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"sample {sample_name(raw, index)}: {type(error).__name__}: {error}") from error


def _targets(values: np.ndarray) -> Tensor:
    kind = np.float32 if values.dtype.kind == "f" else np.int64
    return torch.from_numpy(values.astype(kind, copy=False))


def sample_name(raw: Any, index: int) -> str:
    """The file of a sample, relative to the data's folder; for data without files, its number."""
    names = getattr(raw, "names", None)
    return str(index) if names is None else names[index]
