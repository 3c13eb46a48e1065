"""PyramidNets: the published sizes, the formulas of the paper, and what each option does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_checks import (
    NetworkChecks,
    images,
    multiply_adds,
    parameters,
    randomised,
)
from torch import Tensor, nn
from torch.nn import functional as F

from crucible.options import ConfigError
from models.pyramidnet import PyramidBasicBlock, PyramidBottleneck, PyramidNet110, PyramidNet272
from norms import convert_norm


@pytest.mark.parametrize(
    ("variant", "depth", "alpha", "channels", "count", "millions_of_multiply_adds"),
    [  # parameters and multiply-adds (norms included) as in github.com/osmr/imgclsmob
        (PyramidNet110, 110, 48, 64, 1_772_706, 408.37),
        pytest.param(PyramidNet110, 110, 84, 100, 3_904_446, 778.15, marks=pytest.mark.nightly),
        (PyramidNet110, None, None, 286, 28_485_477, 4730.60),
        (PyramidNet272, 164, 270, 1144, 27_216_021, 4608.81),
        pytest.param(PyramidNet272, 200, 240, 1024, 26_752_702, 4563.40, marks=pytest.mark.nightly),
        pytest.param(PyramidNet272, 236, 220, 944, 26_969_046, 4631.32, marks=pytest.mark.nightly),
        pytest.param(PyramidNet272, None, None, 864, 26_210_842, 4541.36, marks=pytest.mark.nightly),
    ],
)
def test_sizes_are_the_published_ones(
    variant: Any,
    depth: int | None,
    alpha: float | None,
    channels: int,
    count: int,
    millions_of_multiply_adds: float,
) -> None:
    with torch.device("meta"):
        network = variant(depth=depth, alpha=alpha, cifar_size=True).model
    assert network.fc.in_features == channels  # the authors' table
    assert parameters(network) == count
    if len(network.blocks) < 60:
        assert multiply_adds(network, 3, 32, 32) == pytest.approx(millions_of_multiply_adds, rel=0.015)


def test_channels_grow_by_equal_shares() -> None:
    blocks = PyramidNet110(depth=20, alpha=20, cifar_size=True).model.blocks
    widths = [block.branch.conv2.out_channels for block in blocks]
    assert widths == [18, 20, 23, 25, 27, 29, 32, 34, 36]  # 16 + 20 k / 9
    assert [block.branch.conv1.stride[0] for block in blocks] == [1, 1, 1, 2, 1, 1, 2, 1, 1]


def norm(x: Tensor, layer: Any) -> Tensor:
    """Batch norm in training, from its definition."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (8, 2), (7, 2)])
@pytest.mark.parametrize("block", [PyramidBasicBlock, PyramidBottleneck])
def test_a_block_is_the_papers_formula(block: Any, size: int, stride: int) -> None:
    layer = randomised(block(6, 9, stride)).double().train()
    x = images(3, 6, (size, size), torch.float64).requires_grad_()
    branch = layer.branch
    if block is PyramidBasicBlock:
        out = F.conv2d(norm(x, layer.bn1), branch.conv1.weight, stride=stride, padding=1)
        out = F.conv2d(norm(out, branch.bn2).relu(), branch.conv2.weight, padding=1)
        out = norm(out, branch.bn3)
    else:
        out = F.conv2d(norm(x, layer.bn1), branch.conv1.weight)
        out = F.conv2d(norm(out, branch.bn2).relu(), branch.conv2.weight, stride=stride, padding=1)
        out = F.conv2d(norm(out, branch.bn3).relu(), branch.conv3.weight)
        out = norm(out, branch.bn4)
    shortcut = x
    if stride == 2:  # means of 2x2 positions; of those that are there at an odd edge
        even = F.pad(x, (0, size % 2, 0, size % 2))
        there = F.pad(torch.ones_like(x), (0, size % 2, 0, size % 2))
        shortcut = F.avg_pool2d(even, 2) / F.avg_pool2d(there, 2)
    expected = out.clone()
    expected[:, :6] += shortcut
    torch.testing.assert_close(layer(x), expected)
    ours, theirs = (torch.autograd.grad(y.logsumexp(1).sum(), x)[0] for y in (layer(x), expected))
    torch.testing.assert_close(ours, theirs)


class TestNetwork(NetworkChecks):
    num_groups = 1

    def build(self, num_outputs: int = 10, **options: Any) -> nn.Module:
        extras = {"shakedrop": True, "squeeze_excitation": True}
        return PyramidNet110(num_classes=num_outputs, depth=8, alpha=20, **extras, **options).model


class TestBottleneckNetwork(NetworkChecks):
    num_groups = 1

    def build(self, num_outputs: int = 10, **options: Any) -> nn.Module:
        return PyramidNet272(
            num_classes=num_outputs, depth=11, alpha=7, stochastic_depth=0.3, resnet_dropout=0.1, **options
        ).model


# Options


@pytest.mark.parametrize("variant", [PyramidNet110, PyramidNet272])
def test_zero_init_makes_each_block_its_shortcut(variant: Any) -> None:
    blocks = variant(depth=20, alpha=20, cifar_size=True, zero_init_residual=True).model.blocks
    for block in blocks:
        x = torch.randn(2, block.bn1.num_features, 8, 8)
        torch.testing.assert_close(block(x), block.downsample(x))


def test_large_input_gets_the_stem_of_the_authors() -> None:
    names = [
        list(dict(PyramidNet110(depth=8, alpha=9, cifar_size=small).model.stem.named_children()))
        for small in (True, False)
    ]
    assert names == [["conv", "bn"], ["conv", "bn", "act", "maxpool"]]


@pytest.mark.parametrize(
    ("variant", "depth", "formula"),
    [
        (PyramidNet110, 111, r"6n \+ 2, such as 110 or 116"),
        (PyramidNet272, 109, r"9n \+ 2, such as 101 or 110"),
    ],
)
def test_a_depth_that_does_not_come_out_even_is_refused(variant: Any, depth: int, formula: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.depth must be {formula}, got {depth}"):
        variant(depth=depth)


def test_group_norm_with_more_than_one_group_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm_kwargs\.num_groups must divide 1"):
        convert_norm(PyramidNet110(depth=20, alpha=20).model, "group", num_groups=16)
