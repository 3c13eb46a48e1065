"""Randomness as a function of a key: nothing to save, and the same for any worker, device or world size.

A key is made of what a draw belongs to, such as `stream_key(seed, "augment", epoch, index)`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

Numbers = TypeVar("Numbers", Tensor, np.ndarray)


def stream_key(*parts: int | str) -> int:
    """A 63-bit key of `parts`, the same in every process and on every machine (about 1 µs)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def keyed_rng(key: int) -> Iterator[None]:
    """Seed torch's CPU generator, `random` and numpy's global generator with `key`; restore them after.

    A loader's worker has no other use for its generators: there nothing is restored, which is cheaper.
    """
    restore = get_worker_info() is None
    if restore:
        states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    # torch.manual_seed would seed every device as well and costs a hundred times as much
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    try:
        yield
    finally:
        if restore:
            torch.default_generator.set_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])


def seed_generators(key: int, device: torch.device) -> None:
    """Seed the generators that layers draw from: torch's on the CPU, and that of `device`."""
    # torch.manual_seed would seed every device as well and costs a hundred times as much
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)
    elif device.type == "mps":
        torch.mps.manual_seed(key)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


# splitmix64 (Steele, Lea, Flood 2014); int64 products wrap as uint64 ones do, shifts need the sign masked off
_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_GAMMA_INVERSE = _signed(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_INDEX_STRIDE = _signed(0xD1342543DE82EF95)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MULTIPLIERS[0]
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MULTIPLIERS[1]
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def scrambled(index: Tensor) -> Tensor:
    """(N,) int64 that look drawn, one for each of the (N,) int64 numbers of samples, and never the same for two."""
    return _mix(index * _INDEX_STRIDE)


_INDEX_BITS = 32  # of a visit, the lower half


def visits(index: Numbers, before: Numbers) -> Numbers:
    """Numbers for the visits of samples, which may come up several times in an epoch, each time drawn for anew.

    Args:
        index: (N,) int64 numbers of the samples, of 32 bits.
        before: (N,) int64 below 2**31, how often each came up before in the epoch.

    Returns:
        (N,) int64: the index itself at a first visit, and never the same for two.
    """
    return index + (before << _INDEX_BITS)


def visited(visit: Numbers) -> Numbers:
    """(N,) int64 numbers of the samples that `visits` were made of."""
    return (visit << _INDEX_BITS) >> _INDEX_BITS


def keyed_uniform(key: int | Tensor, index: Tensor, draws: int) -> Tensor:
    """Uniform numbers that depend only on the key, the sample's index (or visit) and the number of the draw.

    Counter-based integer arithmetic: the same bits on every device, whatever else is in the batch.

    Args:
        key: from `stream_key`; a 0-dimensional int64 tensor keeps a compiled caller from recompiling.
        index: (N,) int64, the samples' numbers, or `Batch.visit`.
        draws: numbers per sample.

    Returns:
        (N, draws) float32 in [0, 1), multiples of 2**-24.
    """
    state = _mix(index * _INDEX_STRIDE + key)
    number = torch.arange(1, draws + 1, device=index.device)
    # state + number * gamma; inductor would compute number * gamma as an index, which must not overflow
    bits = _mix(((state * _GAMMA_INVERSE)[:, None] + number[None, :]) * _GAMMA)
    return ((bits >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24
