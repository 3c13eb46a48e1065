"""Local importance-based pooling and its ResNets: the paper's formula and the paper's costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_checks import (
    NetworkChecks,
    images,
    multiply_adds,
    parameters,
    randomised,
)
from torch import nn

from crucible.options import ConfigError
from models.convert import BlurPool, blur_downsampling
from models.layers import Bottleneck
from models.lip_resnet import LIP, LIPBottleneck, LIPMaxPool, LIPResNet50, LIPResNet101


@pytest.mark.parametrize(
    ("model", "millions", "giga"), [(LIPResNet50, 23.9, 5.33), (LIPResNet101, 42.9, 9.06)]
)  # arXiv 1908.04156, table 1
def test_costs_are_the_papers(model: Any, millions: float, giga: float) -> None:
    with torch.device("meta"):
        network = model(num_classes=1000).model
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.05)
    assert multiply_adds(network, 3, 224, 224) / 1e3 == pytest.approx(
        giga, rel=0.01
    )  # elementwise work apart


def test_each_window_is_averaged_with_the_weights_exp_of_the_logits() -> None:
    layer = randomised(LIP(3, 5, 1, 2)).double()
    x, features = (torch.randn(2, channels, 7, 7, dtype=torch.float64) for channels in (3, 5))
    logits = F.instance_norm(
        F.conv2d(features, layer.conv.weight), weight=layer.norm.weight, bias=layer.norm.bias
    )
    weight = torch.exp(12 / (1 + torch.exp(-logits)))
    expected = torch.empty(2, 3, 4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            window = (..., slice(max(2 * i - 1, 0), 2 * i + 2), slice(max(2 * j - 1, 0), 2 * j + 2))
            total = weight[window].sum(dim=(2, 3))
            expected[..., i, j] = (x * weight)[window].sum(dim=(2, 3)) / total
    torch.testing.assert_close(layer(x, features), expected)


def test_it_starts_as_the_plain_average() -> None:
    network = LIPResNet50().model
    pool = network.maxpool
    assert isinstance(pool, LIPMaxPool)
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(pool(x), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
    pools = [m for m in network.modules() if isinstance(m, LIP)]
    assert len(pools) == 1 + 2 * 3
    assert not any(m.conv.weight.any() for m in pools)


def test_the_weights_stay_finite_in_float16_range() -> None:
    layer = LIP(2, 2, 1, 2)
    nn.init.constant_(layer.norm.bias, 20.0)  # exp(12) = 162,755 is beyond float16
    x = torch.full((1, 2, 4, 4), 30.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, torch.randn(1, 2, 4, 4))
    torch.testing.assert_close(out.float(), torch.full((1, 2, 2, 2), 30.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_blur_in_the_pools_place_filters_in_float32_too(dtype: torch.dtype) -> None:
    layer = LIP(2, 2, 1, 2)
    nn.init.constant_(layer.norm.bias, 20.0)
    blur_downsampling(nn.Sequential(layer), 2)
    assert isinstance(layer.pool, BlurPool)
    x, features = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    expected = layer(x, features)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(layer(x, features), expected)
    narrow = layer.to(dtype)(x.to(dtype), features.to(dtype))
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), expected, atol=0.02, rtol=0.02)


def test_shapes_are_known_without_memory() -> None:
    with torch.device("meta"):
        assert LIPMaxPool(3, 2)(torch.empty(2, 3, 8, 8)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("stride", [1, 2])
def test_only_a_strided_block_differs_from_the_bottleneck(stride: int) -> None:
    block = LIPBottleneck(64, 16, stride)
    assert block.conv2.kernel_size == ((3, 3) if stride == 1 else (1, 1))
    assert {m.stride for m in block.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    assert block(torch.randn(2, 64, 8, 8)).shape == (2, 64, 8 // stride, 8 // stride)


@pytest.mark.parametrize("options", [{}, {"zero_init_residual": False}])
def test_it_starts_as_in_the_authors_code(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = LIPResNet50(num_classes=1000, **options).model
    blocks = [m for m in network.modules() if isinstance(m, Bottleneck)]
    assert len(blocks) == 16
    assert {bool(block.bn3.weight.any()) for block in blocks} == {bool(options)}
    assert not any(m.conv.weight.any() for m in network.modules() if isinstance(m, LIP))
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not network.fc.bias.any()


def test_the_pooled_shortcut_of_stem_d_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.stem=D pools before the shortcuts"):
        LIPResNet50(stem="D")


class TestLIPResNet(NetworkChecks):
    num_groups = 16
    spatial = {1: (64,), 2: (32, 32), 3: (24, 24, 24)}

    def build(self, num_outputs: int = 10, **options: Any) -> nn.Module:
        class Shallow(LIPResNet50):
            layers = (1, 1)

        return Shallow(num_classes=num_outputs, stochastic_depth=0.2, **options).model

    def test_small_input_of_any_size(self) -> None:
        network = self.build(cifar_size=True).eval()
        with torch.no_grad():
            for size in (8, 9, 33):
                assert network(images(spatial=(size, size + 1))).isfinite().all()
