"""SE-ResNets: timm's networks with timm's weights."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from network_checks import (
    NetworkChecks,
    assert_same_function,
    multiply_adds,
    parameters,
    randomised,
)
from torch import nn

from crucible.options import ConfigError, check_arguments
from models.se_resnet import SEResNet18, SEResNet34, SEResNet50, SEResNet101, SEResNet152


@pytest.mark.parametrize(
    ("model", "millions", "giga"),
    [
        (SEResNet18, 11.779, 1.814),
        pytest.param(SEResNet34, 21.960, 3.664, marks=pytest.mark.nightly),
        (SEResNet50, 28.088, 4.092),  # the paper's table 1: 3.87 with the stride in the 1x1
        pytest.param(SEResNet101, 49.327, 7.806, marks=pytest.mark.nightly),
        pytest.param(SEResNet152, 66.822, 11.520, marks=pytest.mark.nightly),
    ],
)
def test_the_layout_and_the_figures_are_timms(model: Any, millions: float, giga: float) -> None:
    with torch.device("meta"):
        ours, theirs = model(num_classes=1000).model, timm.create_model(model.__name__.lower())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert parameters(ours) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert multiply_adds(ours, 3, 224, 224) / 1e3 == pytest.approx(giga, abs=0.01)


@pytest.mark.parametrize("model", [SEResNet18, SEResNet50])
def test_outputs_and_gradients_are_timms(model: Any) -> None:
    theirs = randomised(timm.create_model(model.__name__.lower(), num_classes=10))
    assert_same_function(model(num_classes=10).model, theirs)


def test_what_it_is_cannot_be_switched_off() -> None:
    with pytest.raises(ConfigError, match=r"^model\.squeeze_excitation must be one of True, got False$"):
        check_arguments(SEResNet50, {"squeeze_excitation": False}, "model")
    with pytest.raises(
        ConfigError, match=r"^model\.pretrained=true: torchvision has no weights of SEResNet50"
    ):
        SEResNet50(pretrained=True)


class TestSEResNet(NetworkChecks):
    num_groups = 16

    def build(self, num_outputs: int = 10, **options: Any) -> nn.Module:
        class Shallow(SEResNet50):
            layers = (1, 1)

        return Shallow(num_classes=num_outputs, **options).model
