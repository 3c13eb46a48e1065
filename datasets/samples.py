"""What a loader reads: samples with their policy, whole batches at a time; errors name the sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from augmentation.policies.base import Policy
from crucible.batch import Batch
from crucible.keyed import keyed_rng, keyed_uniform, stream_key, visited
from datasets.groups import sample_of
from datasets.images import Arrays, SampleError, naming, rows, sample_name
from datasets.sampling import KeyedBatch

OnUnreadable = Literal["raise", "blank", "replace", "drop"]
_BLANK = 64  # pixels a side
_STAND_INS = 32  # that are tried for one sample


class Samples(Dataset):
    """Some samples of a raw data set with a policy's sample part; an item is a whole batch.

    A sample that cannot be read is dealt with by `on_unreadable`: an error (`raise`); a blank of the number
    -1 - index (`blank`, for predictions); another sample of the split in its place, drawn by the key of (seed, epoch,
    visit), so that batches keep their size and no other sample changes (`replace`, for training); or a batch without it
    (`drop`, for evaluation).

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
        self.on_unreadable: OnUnreadable = "raise"
        self.unread: Tensor | None = None  # (len(raw),) uint8 that loader workers share; 1: could not be read
        self.without_input = False  # the inputs lie where the batches go, which need no copy of them

    def __len__(self) -> int:
        return len(self.raw) if self.indices is None else len(self.indices)

    @property
    def keeps(self) -> bool:
        """Whether the samples lie in memory and need no work of their own."""
        return isinstance(self.raw, Arrays) and self.policy.keeps(self.raw.inputs)

    def mark_unreadable(self) -> None:
        """Mark what cannot be read in `unread` from now on, whichever process reads it."""
        self.unread = torch.zeros(len(self.raw), dtype=torch.uint8).share_memory_()

    def __getitem__(self, batch: KeyedBatch) -> Batch:
        epoch, visits = batch[0], np.asarray(batch[1], dtype=np.int64)
        indices = visited(visits)
        if self.indices is not None:
            places, indices = indices, self.indices[indices]
            visits = visits - places + indices
        if self.keeps and not self.raw.lacks(indices):
            index = torch.from_numpy(indices)
            inputs = self.raw.inputs[:0] if self.without_input else rows(self.raw.inputs, index)
            return Batch(inputs, _targets(self.raw.targets[indices]), torch.from_numpy(visits))
        return self._made(epoch, visits)

    def example(self) -> Batch:
        """A batch of one sample: the first, or the first of some that can be read where others are passed over."""
        for place in range(min(len(self), _STAND_INS)):
            try:
                return self[0, [place]]
            except SampleError:
                if self.on_unreadable == "raise":
                    raise
        return self[0, [0]]

    def _made(self, epoch: int, visits: np.ndarray) -> Batch:
        indices = visited(visits)
        inputs, used, targets, numbers = None, 0, [], []
        blanks: list[int] = []
        wishes = zip(indices.tolist(), visits.tolist(), self._draws(epoch, visits), strict=True)
        for wanted, visit, draws in wishes:
            index, found = wanted, None
            try:
                found = self._sample(epoch, wanted, visit, draws)
            except SampleError:
                if self.on_unreadable == "raise":
                    raise
                self._mark(wanted)
                if self.on_unreadable == "drop":
                    continue
                if self.on_unreadable == "replace":
                    index, visit, found = self._stand_in(epoch, wanted, visit)
            if found is None:
                blanks.append(used)
                targets.append(self.raw.targets[wanted])
                numbers.append(-1 - wanted)
            else:
                input, target = found
                if inputs is None:
                    inputs, first = _room(len(indices), input), index
                elif input.shape != inputs.shape[1:] or input.dtype != inputs.dtype:
                    self._refuse_shape(input, inputs[0], index, first)
                inputs[used] = input
                targets.append(target)
                numbers.append(visit)
            used += 1
        if inputs is None:
            if not blanks:
                raise SampleError(f"{self.why_unreadable(int(indices[0]))}; nor can the others of its batch")
            inputs = _room(len(indices), self.policy.sample(self._blank()))
        inputs[blanks] = 0
        inputs = inputs[:0] if self.without_input and self.keeps else inputs[:used]
        return Batch(inputs, _targets(np.asarray(targets)), torch.tensor(numbers))

    def _draws(self, epoch: int, visits: np.ndarray) -> Iterator[Sequence[float] | None]:
        """The random numbers of each sample; None where the policy makes its own."""
        if not (count := self.policy.draws):
            return iter([None if count is None else ()] * len(visits))
        # of the batch part's stream: it crops what lies in memory, by the same numbers
        key, first = stream_key(self.seed, "batch", epoch), self.policy.first_draw
        return iter(keyed_uniform(key, torch.from_numpy(visits), first + count)[:, first:].tolist())

    def _sample(
        self, epoch: int, index: int, visit: int, draws: Sequence[float] | None
    ) -> tuple[Tensor, Any]:
        with naming(self.raw, index, self.split):
            if draws is not None:
                input, target = sample_of(self.raw, index, self.policy.large_enough(draws))
                return self.policy.from_draws(input, draws), target
            input, target = self.raw[index]
            with keyed_rng(stream_key(self.seed, self.stream, epoch, visit)):
                return self.policy.sample(input), target

    def _stand_in(self, epoch: int, index: int, visit: int) -> tuple[int, int, tuple[Tensor, Any]]:
        """The number of another sample, its visit, and what is made of it."""
        key = stream_key(self.seed, "stand-in", epoch)
        for draw in keyed_uniform(key, torch.tensor([visit]), _STAND_INS)[0].tolist():
            place = int(draw * len(self))
            other = place if self.indices is None else int(self.indices[place])
            its = visit - index + other  # as often before as the sample in whose place it stands
            try:
                return other, its, self._sample(epoch, other, its, next(self._draws(epoch, np.array([its]))))
            except SampleError:
                self._mark(other)
        raise SampleError(
            f"{self.why_unreadable(index)}; nor can {_STAND_INS} others, drawn to take its place"
        )

    def _mark(self, index: int) -> None:
        if self.unread is not None:
            self.unread[index] = 1

    def _blank(self) -> Image.Image:
        return Image.new("L" if getattr(self.raw, "channels", 3) == 1 else "RGB", (_BLANK, _BLANK))

    def why_unreadable(self, index: int) -> str:
        """What is wrong with the sample `index` of the raw data; empty where it can be read."""
        try:
            self._sample(0, index, index, next(self._draws(0, np.array([index]))))
        except SampleError as error:
            return str(error)
        return ""

    def _refuse_shape(self, input: Tensor, other: Tensor, index: int, others: int) -> NoReturn:
        names = [sample_name(self.raw, int(i)) for i in (index, others)]
        shapes = ["x".join(map(str, x.shape)) for x in (input, other)]
        if input.dtype != other.dtype:
            shapes = [
                f"{s} {str(x.dtype).removeprefix('torch.')}"
                for s, x in zip(shapes, (input, other), strict=True)
            ]
        raise SampleError(
            f"sample {names[0]} of the {self.split} split is {shapes[0]}, {names[1]} is {shapes[1]}: all samples of a "
            f"batch have one shape; a policy with a size (data.module.train_transforms, test_transforms) makes it so"
        )


def _room(count: int, input: Tensor) -> Tensor:
    """Space for so many inputs like this one, a pixel's channels together where they are in it.

    A loader's worker has it where the batch is handed on, which then needs no copy.
    """
    together = input.ndim == 3 and input.stride(0) == 1 < input.stride(2)
    shape = (*input.shape[1:], input.shape[0]) if together else input.shape
    room = torch.empty((count, *shape), dtype=input.dtype)
    if get_worker_info() is not None:
        room.share_memory_()
    return room.permute(0, 3, 1, 2) if together else room


def _targets(values: np.ndarray) -> Tensor:
    kind = np.float32 if values.dtype.kind == "f" else np.int64
    return torch.from_numpy(values.astype(kind, copy=False))
