"""What a loader reads: samples with their policy, whole batches at a time; errors name the sample."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from augmentation.policies.base import Policy
from crucible.batch import Batch
from crucible.keyed import keyed_rng, stream_key
from datasets.images import Arrays, SampleError, naming, sample_name
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
        split: their name in errors.
    """

    def __init__(
        self, raw: Any, indices: np.ndarray | None, policy: Policy, stream: str, seed: int, split: str = ""
    ) -> None:
        self.raw = raw
        self.indices = indices
        self.policy = policy
        self.stream = stream
        self.seed = seed
        self.split = split
        self.skips = False  # what cannot be read is a blank of the number -1 - index, instead of an error

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
        for place, input in enumerate(inputs):
            if input.shape != inputs[0].shape:
                self._refuse_shape(input, inputs[0], indices[place], indices[0])
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

    def _refuse_shape(self, input: Tensor, other: Tensor, index: int, others: int) -> NoReturn:
        names = [sample_name(self.raw, int(i)) for i in (index, others)]
        shapes = ["x".join(map(str, x.shape)) for x in (input, other)]
        raise SampleError(
            f"sample {names[0]} of the {self.split} split is {shapes[0]}, {names[1]} is {shapes[1]}: all samples of a "
            f"batch have one shape; a policy with a size (data.module.train_transforms, test_transforms) makes it so"
        )

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, Any]:
        with naming(self.raw, index, self.split):
            input, target = self.raw[index]
            with keyed_rng(stream_key(self.seed, self.stream, epoch, index)):
                return self.policy.sample(input), target


def _targets(values: np.ndarray) -> Tensor:
    kind = np.float32 if values.dtype.kind == "f" else np.int64
    return torch.from_numpy(values.astype(kind, copy=False))
