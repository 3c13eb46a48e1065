"""ResNeXt: torchvision's networks with torchvision's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from network_checks import (
    NetworkChecks,
    assert_config_names_the_options,
    images,
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


def test_outputs_and_gradients_are_torchvisions() -> None:
    theirs = randomised(torchvision.models.resnext50_32x4d(num_classes=10))
    ours = ResNeXt50(num_classes=10).model
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images()), theirs.eval()(images()), atol=1e-5, rtol=1e-5)
    x = images(n=4, dtype=torch.float64)
    for network in (ours, theirs):
        network.double().train()(x).logsumexp(dim=1).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-7, msg=name)


def test_pretrained_names_torchvisions_file() -> None:
    names = [torchvision.models.get_model_weights(m.weights).DEFAULT.url for m in (ResNeXt50, ResNeXt101)]
    assert ["resnext50_32x4d" in names[0], "resnext101_32x8d" in names[1]] == [True, True]


def test_the_config_names_exactly_the_models_own_options() -> None:
    assert_config_names_the_options("resnext", ResNeXt50)


class TestResNeXt(NetworkChecks):
    num_groups = 16

    def build(self, **options: Any) -> nn.Module:
        options = {"num_outputs": 10, "se_rd_ratio": 0.25, "stochastic_depth": 0.2, **options}
        return ResNet(Bottleneck32x4d, (1, 1), **options)
