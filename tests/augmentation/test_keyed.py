"""The keyed random stream: a function of its key and nothing else."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from crucible.keyed import keyed_rng, keyed_uniform, stream_key


def test_a_key_is_the_same_in_every_process():
    code = "from crucible.keyed import stream_key; print(stream_key(3, 'augment', 1, 42))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == stream_key(3, "augment", 1, 42)


def test_keys_fit_int64_and_differ_in_every_part():
    keys = {
        stream_key(seed, name, epoch, index)
        for seed in range(4)
        for name in ("augment", "order")
        for epoch in range(10)
        for index in range(50)
    }
    assert len(keys) == 4 * 2 * 10 * 50
    assert all(0 <= key < 2**63 for key in keys)


def test_a_key_takes_numpy_numbers_as_plain_ones():
    assert stream_key(np.int64(3), "augment") == stream_key(3, "augment")


def _draw_from_all() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_keyed_rng_seeds_all_three_generators_and_restores_them():
    before = _draw_from_all
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = [before(), before()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    first = _draw_from_all()
    with keyed_rng(stream_key("a")):
        inside = _draw_from_all()
    second = _draw_from_all()
    with keyed_rng(stream_key("a")):
        again = _draw_from_all()
    assert [first, second] == expected
    assert inside == again
    assert not set(inside) & set(first)


def test_keyed_rng_restores_after_an_error():
    state = torch.default_generator.get_state()
    with pytest.raises(ValueError), keyed_rng(1):
        torch.rand(3)
        raise ValueError
    assert torch.equal(state, torch.default_generator.get_state())


def splitmix64_reference(key: int, index: int, draw: int) -> float:
    """The documented arithmetic, in Python's unbounded integers."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = mix((index * 0xD1342543DE82EF95 + key) & mask)
    return (mix((state + draw * 0x9E3779B97F4A7C15) & mask) >> 40) / 2**24


def test_keyed_uniform_equals_unsigned_64_bit_arithmetic():
    key = stream_key("reference")
    index = torch.tensor([0, 1, 2, 10**6, 2**40])
    expected = [[splitmix64_reference(key, int(i), d) for d in (1, 2, 3)] for i in index]
    assert keyed_uniform(key, index, 3).tolist() == expected


def test_keyed_uniform_is_uniform_and_its_draws_are_independent():
    draws = keyed_uniform(stream_key(7), torch.arange(100_000), 2).double().numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    cells = np.histogram2d(*draws.T, bins=16)[0].ravel()
    assert stats.chisquare(cells).pvalue > 1e-3
    neighbours = np.histogram2d(draws[:-1, 0], draws[1:, 0], bins=16)[0].ravel()
    assert stats.chisquare(neighbours).pvalue > 1e-3


def test_neighbouring_keys_give_unrelated_draws():
    index = torch.arange(20_000)
    a, b = (keyed_uniform(key, index, 1).flatten().numpy() for key in (1000, 1001))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_a_sample_draws_the_same_whatever_else_is_in_the_batch():
    whole = keyed_uniform(5, torch.arange(100), 3)
    some = torch.tensor([40, 3, 99])
    assert torch.equal(keyed_uniform(5, some, 3), whole[some])
    assert torch.equal(keyed_uniform(5, some, 2), whole[some, :2])


def test_a_tensor_key_is_as_good_as_an_int():
    key, index = stream_key("x"), torch.arange(50)
    assert torch.equal(keyed_uniform(key, index, 2), keyed_uniform(torch.tensor(key), index, 2))


@pytest.mark.slow
def test_a_compiled_kernel_draws_the_same_bits():
    key, index = torch.tensor(stream_key("x")), torch.arange(-1, 2000)
    compiled = torch.compile(lambda k, i: keyed_uniform(k, i, 40), fullgraph=True)
    assert torch.equal(compiled(key, index), keyed_uniform(key, index, 40))
