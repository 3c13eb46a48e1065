"""ResNeXt: torchvision's networks with torchvision's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from network_checks import (
    NetworkChecks,
    assert_same_function,
    multiply_adds,
    parameters,
    randomised,
)
from torch import nn

from models.dynamic_resnet import ResNet
from models.resnext import Bottleneck32x4d, ResNeXt50, ResNeXt101


@pytest.mark.parametrize(
    ("model", "reference", "millions", "giga"),
    [
        (ResNeXt50, torchvision.models.resnext50_32x4d, 25.028904, 4.23),
        (ResNeXt101, torchvision.models.resnext101_32x8d, 88.791336, 16.41),
    ],
)
def test_the_layout_is_torchvisions_and_so_are_its_figures(
    model: Any, reference: Any, millions: float, giga: float
) -> None:
    with torch.device("meta"):
        ours, theirs = model(num_classes=1000).model, reference()
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert parameters(ours) / 1e6 == pytest.approx(millions)
    assert multiply_adds(ours, 3, 224, 224) / 1e3 == pytest.approx(giga, abs=0.01)


@pytest.mark.slow
def test_outputs_and_gradients_are_torchvisions() -> None:
    theirs = randomised(torchvision.models.resnext50_32x4d(num_classes=10))
    assert_same_function(ResNeXt50(num_classes=10).model, theirs)


def test_pretrained_names_torchvisions_file() -> None:
    names = [torchvision.models.get_model_weights(m.weights).DEFAULT.url for m in (ResNeXt50, ResNeXt101)]
    assert ["resnext50_32x4d" in names[0], "resnext101_32x8d" in names[1]] == [True, True]


class TestResNeXt(NetworkChecks):
    num_groups = 16

    def build(self, **options: Any) -> nn.Module:
        options = {"num_outputs": 10, "se_rd_ratio": 0.25, "stochastic_depth": 0.2, **options}
        return ResNet(Bottleneck32x4d, (1, 1), **options)
