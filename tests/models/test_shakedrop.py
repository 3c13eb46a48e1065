"""ShakeDrop: the factors of its two passes, their distributions, and where it sits in the networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet18
from models.layers import BasicBlock, ShakeDrop, drop_path_rates
from models.preact_resnet import PreActResNet18, PreActResNet50
from models.pyramidnet import PyramidNet110, PyramidNet272
from models.wide_resnet import WRN2810

N = 20_000
FAMILIES = [
    (ResNet18, {}),
    (PreActResNet18, {}),
    (PreActResNet50, {}),
    (WRN2810, {"depth": 10, "widen_factor": 1}),
    (PyramidNet110, {"depth": 20, "alpha": 9}),
    (PyramidNet272, {"depth": 11, "alpha": 9}),
]


def factors(rate: float, shape: tuple[int, ...] = (N, 1, 1, 1)) -> tuple[Tensor, Tensor]:
    """The factors of the forward and of the backward pass, element by element."""
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    out = ShakeDrop(rate).train()(x)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_an_open_gate_passes_and_a_closed_one_scales_both_ways_independently(rate: float) -> None:
    forward, backward = (f.flatten().numpy() for f in factors(rate))
    opened = forward == 1
    assert abs(opened.mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / N)
    assert (backward[opened] == 1).all()
    alpha, beta = forward[~opened], backward[~opened]
    assert stats.kstest(alpha, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(beta, stats.uniform(0, 1).cdf).pvalue > 1e-3
    assert stats.pearsonr(alpha, beta).pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_evaluation_scales_by_the_expectation(rate: float) -> None:
    forward, _ = factors(rate)
    variance = rate / 3 + rate * (1 - rate)  # of b + alpha - b alpha
    assert abs(forward.mean() - (1 - rate)) < 4 * math.sqrt(variance / N)
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(ShakeDrop(rate).eval()(x), x * (1 - rate))


@pytest.mark.parametrize("shape", [(64, 3, 5), (64, 3, 5, 4), (64, 3, 2, 5, 4)])
def test_one_sample_has_one_factor_and_each_its_own(shape: tuple[int, ...]) -> None:
    for factor in factors(1.0, shape):
        rows = factor.flatten(1)
        assert (rows == rows[:, :1]).all()
        assert rows[:, 0].unique().numel() == 64


def test_mixed_precision_draws_the_same_factors() -> None:
    layer = ShakeDrop(0.5).train()
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        outputs.append(layer(torch.ones(256, 1, 1, 1, dtype=dtype)))
    assert outputs[1].dtype == torch.bfloat16
    assert torch.equal(outputs[0].bfloat16(), outputs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision_draw_the_same_factors_too(dtype: torch.dtype) -> None:
    x = torch.ones(256, 1, 1, 1, dtype=dtype)
    torch.manual_seed(0)
    expected = ShakeDrop(0.5).train()(x)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # as in a step under bf16-true and 64-true
    try:
        assert torch.equal(ShakeDrop(0.5).train()(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_memory_format_is_kept() -> None:
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = ShakeDrop(0.5).train()(x)
    out.sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_compiled_without_a_graph_break_it_is_the_same_both_ways() -> None:
    torch._dynamo.reset()
    layer = ShakeDrop(0.5).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        torch.manual_seed(0)
        x = torch.ones(32, 2, 3, requires_grad=True)
        out = call(x)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# In the networks


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_gates_close_more_often_with_depth_and_the_last_half_of_the_time(
    family: Any, options: dict[str, Any]
) -> None:
    gates = [m for m in family(shakedrop=True, **options).modules() if isinstance(m, ShakeDrop)]
    depth = len(gates)
    assert depth >= 3
    torch.manual_seed(0)
    for block, gate in enumerate(gates, 1):
        rate = (gate.train()(torch.ones(4000, 1)) != 1).float().mean()
        assert abs(rate - 0.5 * block / depth) < 4 * math.sqrt(0.25 / 4000)
    assert not any(isinstance(m, ShakeDrop) for m in family(**options).modules())


def test_survival_decays_by_the_papers_linear_rule() -> None:
    p = [1 - rate for rate in drop_path_rates(0.0, depth=8, shakedrop=True)]
    assert p == pytest.approx([1 - block / 8 * (1 - 0.5) for block in range(1, 9)])


def test_a_block_of_a_resnet_takes_it_too() -> None:
    torch.manual_seed(0)
    block = BasicBlock(8, 8, drop_path_rate=0.5, shakedrop=True).double().eval()
    x = torch.rand(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x), (x + 0.5 * block.branch(x)).relu())


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_with_stochastic_depth_it_is_refused(family: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.shakedrop=true and model\.stochastic_depth=0\.2"):
        family(shakedrop=True, stochastic_depth=0.2, **options)
