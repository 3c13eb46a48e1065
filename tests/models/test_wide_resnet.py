"""Wide ResNets: the paper's sizes, timm's blocks with timm's weights, and what each option does."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
from network_checks import (
    NetworkChecks,
    assert_same_function,
    images,
    multiply_adds,
    parameters,
    randomised,
)
from test_preact_resnet import from_timm
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from crucible.options import ConfigError
from models.wide_resnet import WRN2810


@pytest.mark.parametrize(
    ("depth", "widen_factor", "millions", "exact"),
    [  # the paper's table 4; exact where others publish it (github.com/osmr/imgclsmob)
        (40, 1, 0.6, None),
        (40, 2, 2.2, 2_243_546),
        (40, 4, 8.9, None),
        (40, 8, 35.7, 35_748_314),
        (28, 10, 36.5, 36_479_194),
        (28, 12, 52.5, None),
        (22, 8, 17.2, None),
        (22, 10, 26.8, None),
        (16, 8, 11.0, None),
        (16, 10, 17.1, 17_116_634),
    ],
)
def test_parameters_are_the_papers(depth: int, widen_factor: int, millions: float, exact: int | None) -> None:
    with torch.device("meta"):
        count = parameters(WRN2810(depth=depth, widen_factor=widen_factor, cifar_size=True).model)
    assert count / 1e6 == pytest.approx(millions, abs=0.051)
    assert exact is None or count == exact


def test_wrn_28_10_is_the_default_and_has_the_published_multiply_adds() -> None:
    with torch.device("meta"):
        network = WRN2810(cifar_size=True).model
    assert parameters(network) == 36_479_194
    # osmr/imgclsmob gives 5,246.98 M, norms included
    assert multiply_adds(network, 3, 32, 32) == pytest.approx(5246.98, rel=2e-3)


def test_outputs_and_gradients_are_those_of_timms_blocks() -> None:
    theirs = ResNetV2(
        layers=(2, 2, 2), channels=(32, 64, 128), stem_chs=16, num_classes=10, basic=True, bottle_ratio=1.0,
        conv_layer=create_conv2d, norm_layer=BatchNormAct2d,
    )  # fmt: skip
    theirs.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 16, 3, padding=1, bias=False)))
    randomised(theirs)
    ours = WRN2810(depth=16, widen_factor=2, cifar_size=True).model
    assert_same_function(ours, theirs, partial(from_timm, layers=(2, 2, 2)))


class TestNetwork(NetworkChecks):
    num_groups = 16

    def build(self, num_outputs: int = 10, **options: Any) -> nn.Module:
        extras = {"shakedrop": True, "squeeze_excitation": True, "block_dropout": 0.1}
        return WRN2810(num_classes=num_outputs, depth=10, widen_factor=2, **extras, **options).model


# Options


def test_dropout_lies_in_front_of_the_second_convolution() -> None:
    network = WRN2810(depth=10, widen_factor=1, cifar_size=True, block_dropout=0.3).model
    seen: list[Tensor] = []
    for block in network.blocks:
        assert list(dict(block.branch.named_children())) == ["conv1", "bn2", "act2", "dropout", "conv2"]
        block.branch.act2 = nn.SiLU()  # which has no zeros of its own
        block.branch.conv2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network.train()(images())
    assert all((x == 0).float().mean().item() == pytest.approx(0.3, abs=0.03) for x in seen)
    seen.clear()
    network.eval()(images())
    assert all((x != 0).all() for x in seen)


@pytest.mark.parametrize(("depth", "named"), [(27, "22 or 28"), (9, "10 or 16"), (30, "28 or 34")])
def test_a_depth_that_does_not_come_out_even_is_refused(depth: int, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.depth must be 6n \+ 4, such as {named}, got {depth}"):
        WRN2810(depth=depth)
