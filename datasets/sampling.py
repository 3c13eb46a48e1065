"""Which samples make which batch on which rank, and how a data set is split; all functions of their seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler

from crucible.keyed import stream_key, visits

KeyedBatch = tuple[int, list[int]]  # (epoch, visits of places among the samples)


def training_batches(samples: int, batch_size: int, world_size: int = 1, drop_last: bool = True) -> int:
    """Batches of an epoch, on each rank; a last one that is not full counts where it has a sample for each rank."""
    whole, rest = divmod(samples, batch_size * world_size)
    return whole + (not drop_last and rest >= world_size)


def times_before(order: np.ndarray) -> np.ndarray:
    """How often the sample of each place of (N,) int64 came up in the places before it, (N,) int64."""
    place = np.arange(len(order))
    # numbers that differ are sorted in a fraction of the time of a stable argsort
    by_sample = np.sort(order << 32 | place)
    first = np.flatnonzero(np.diff(by_sample >> 32, prepend=-1))
    times = np.empty_like(order)
    times[by_sample & 0xFFFFFFFF] = place - np.repeat(first, np.diff(first, append=len(order)))
    return times


class EpochSampler(Sampler[KeyedBatch]):
    """Training batches, in an order that is a function of (seed, epoch).

    Each rank takes its slice of each global batch, so that global batch b of an epoch is the same set of
    samples for any number of ranks with the same global batch size. What does not fill a global batch is
    left out, in each epoch something else; or it is a smaller batch, shared out evenly.

    Args:
        samples: number of samples.
        batch_size: per rank.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        replace: draw each sample independently, with replacement.
        start: (epoch, batch) to begin at; later epochs begin at 0.
        frozen: every epoch has the order of epoch 0.
        left_out: numbers of samples in whose places others stand, drawn; all else stays as it is.
        chances: (samples,) of each to be drawn, which then is independent and with replacement; None: they are equal.
        drop_last: leave out what does not fill a global batch; else only what cannot be shared out over the ranks.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        replace: bool = False,
        start: tuple[int, int] = (0, 0),
        frozen: bool = False,
        left_out: Collection[int] = (),
        chances: np.ndarray | None = None,
        drop_last: bool = True,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.replace = replace
        self.start = start
        self.frozen = frozen
        self.left_out = left_out
        self.chances = chances
        self.drop_last = drop_last
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration delivers; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, also where the first one begins in the middle."""
        return training_batches(self.samples, self.batch_size, self.world_size, self.drop_last)

    def size(self, batch: int) -> int:
        """Samples of a batch of an epoch, on each rank."""
        return min(self.batch_size, self.samples // self.world_size - batch * self.batch_size)

    def _visits(self, epoch: int) -> Tensor:
        """The epoch's order, (samples,) int64, each time that a place comes up by a number of its own."""
        generator = torch.Generator().manual_seed(stream_key(self.seed, "order", 0 if self.frozen else epoch))
        if self.chances is not None:
            upto = torch.from_numpy(self.chances).double().cumsum(0)
            draws = torch.rand(self.samples, dtype=torch.float64, generator=generator) * upto[-1]
            order = torch.searchsorted(upto, draws, right=True).clamp_(max=self.samples - 1)
        elif self.replace:
            order = torch.randint(self.samples, (self.samples,), generator=generator)
        else:
            order = torch.randperm(self.samples, generator=generator)
            if not self.left_out:
                return order  # once each
        counted: slice | Tensor = slice(None)
        if self.left_out:
            out = torch.tensor(sorted(self.left_out))
            others = torch.arange(self.samples)
            others = others[~torch.isin(others, out)]
            stand_ins = others[torch.randint(len(others), (self.samples,), generator=generator)]
            gone = torch.isin(order, out)
            order = torch.where(gone, stand_ins, order)
            counted = gone.int().argsort(stable=True)  # stand-ins last: nothing else becomes another visit
        before = torch.empty_like(order)
        before[counted] = torch.from_numpy(times_before(order[counted].numpy()))
        return visits(order, before)

    def __iter__(self) -> Iterator[KeyedBatch]:
        epoch = self.epoch
        order = self._visits(epoch)
        # a loader is iterated twice before its first batch, so that reading `start` must not use it up
        first = self.start[1] if epoch == self.start[0] else 0
        for batch in range(first, len(self)):
            size = self.size(batch)
            begin = batch * self.world_size * self.batch_size + self.rank * size
            yield epoch, order[begin : begin + size].tolist()


class FrozenEpochSampler(EpochSampler, SequentialSampler):  # type: ignore[misc]
    """An epoch sampler that Lightning takes for unshuffled, and leaves alone under `overfit_batches`."""


def batches_within(batches: int, limit: int | float | None) -> int:
    """How many of `batches` a limit leaves, as Lightning counts: a number of them, or a fraction, rounded down."""
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def representative(targets: np.ndarray, task: str, seed: int) -> np.ndarray:
    """All samples in an order of which every beginning has each class (or decile of values) in proportion.

    Args:
        targets: (N,) class indices or values.
        task: classification or regression.
        seed: of the order.

    Returns:
        The numbers of the samples, (N,) int64.
    """
    draw = np.random.Generator(np.random.Philox(stream_key(seed, "limited evaluation")))
    return _in_proportion(targets, task, draw)


class EvalSampler(SequentialSampler):
    """Evaluation batches: each sample once over all ranks, and as many batches on each rank.

    Full global batches come first, the rest is shared out evenly. Where the rest has fewer samples than
    there are ranks, it is added to the last full batches, which then have one sample more.

    Args:
        samples: number of samples, at least `world_size`.
        batch_size: per rank.
        rank: of this process.
        world_size: number of processes.
        order: in which they are taken, (samples,); None: as numbered.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        order: np.ndarray | None = None,
    ) -> None:
        if samples < world_size:
            raise ValueError(f"{samples} samples for {world_size} processes")
        self.samples = samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.order = order

    def seen(self, limit: int | float | None) -> int:
        """The number of samples, of all ranks, in the batches that a limit leaves."""
        return sum(self._rounds()[: batches_within(len(self), limit)])

    def _rounds(self) -> list[int]:
        """The number of samples in each global batch."""
        whole = self.batch_size * self.world_size
        rounds, rest = [whole] * (self.samples // whole), self.samples % whole
        if rounds and rest < self.world_size:
            rounds[-1] += rest
        elif rest:
            rounds.append(rest)
        return rounds

    def __len__(self) -> int:
        return len(self._rounds())

    def __iter__(self) -> Iterator[KeyedBatch]:  # type: ignore[override]
        begin = 0
        for size in self._rounds():
            each, more = divmod(size, self.world_size)
            start = begin + self.rank * each + min(self.rank, more)
            stop = start + each + (self.rank < more)
            yield 0, list(range(start, stop)) if self.order is None else self.order[start:stop].tolist()
            begin += size


def _strata(targets: np.ndarray, task: str) -> np.ndarray:
    if task == "classification":
        return targets
    ranks = np.argsort(np.argsort(targets, kind="stable"), kind="stable")
    return ranks * 10 // len(targets)  # ten bins of equally many samples


def _shuffled_by_stratum(strata: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    shuffled = draw.permutation(len(strata))
    return shuffled[np.argsort(strata[shuffled], kind="stable")]


def _in_proportion(targets: np.ndarray, task: str, draw: np.random.Generator) -> np.ndarray:
    strata = _strata(targets, task)
    order = _shuffled_by_stratum(strata, draw)
    _, first, counts = np.unique(strata[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, counts)
    # the k-th of n lies at (k + 1/2) / n of its class: the lowest of all, ties by lot, are in proportion
    part = (place + 0.5) / np.repeat(counts, counts)
    return order[np.lexsort((draw.random(len(order)), part))]


def _split_draw(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(stream_key(seed, "split")))


def hold_out(targets: np.ndarray, fraction: float, task: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off `round(fraction * N)` samples, at least 1, each class (or decile of values) in proportion.

    A class too small for its share is kept whole.

    Args:
        targets: (N,) class indices or values.
        fraction: in (0, 1).
        task: classification or regression.
        seed: of the choice.

    Returns:
        The sorted numbers of the samples kept, and of those held out.
    """
    order = _in_proportion(targets, task, _split_draw(seed))
    held = max(1, round(fraction * len(order)))
    return np.sort(order[held:]), np.sort(order[:held])


def fold_out(
    targets: np.ndarray, fold: int, folds: int, task: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fold number `fold` of `folds` as the part held out; each class is dealt out evenly over the folds.

    Returns:
        The sorted numbers of the samples kept, and of those held out.
    """
    order = _shuffled_by_stratum(_strata(targets, task), _split_draw(seed))
    member = np.arange(len(order)) % folds == fold
    return np.sort(order[~member]), np.sort(order[member])


def unseparated(
    units: np.ndarray,
    divide: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    targets: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A division of units instead of samples, so that those of one unit fall on the same side.

    Where each sample is a unit of its own, in order, it is the division of the samples.

    Args:
        units: (N,) int64, the unit of each sample.
        divide: makes two parts of (U,) targets, each the numbers of units.
        targets: (N,) class indices or values; a unit's is that of its first sample.

    Returns:
        The sorted numbers of the samples of the two parts.
    """
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    held = np.zeros(len(first), dtype=bool)
    held[divide(targets[first])[1]] = True
    of_held = held[unit.ravel()]
    return np.flatnonzero(~of_held), np.flatnonzero(of_held)
