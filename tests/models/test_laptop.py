"""The networks for a laptop: their sizes, their order of layers, and what input they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_checks import NetworkChecks, images, parameters, randomised
from torch import Tensor, nn

from crucible.options import ConfigError
from models.laptop import SHAPES, Laptop, LaptopNet


class TestLaptopNet(NetworkChecks):
    num_groups = 8
    cifar_sizes = (True,)

    def build(self, *, cifar_size: bool = True, **options: Any) -> nn.Module:
        return LaptopNet(SHAPES["S"], **options)

    def test_small_input_of_any_size(self) -> None:
        with torch.no_grad():
            for name, shape in SHAPES.items():
                network = LaptopNet(shape).eval()
                assert network(images(spatial=(shape.smallest, 33))).isfinite().all()
                with pytest.raises(
                    ConfigError, match=rf"at least {shape.smallest} .*, got {shape.smallest - 1}x33"
                ):
                    network(images(spatial=(shape.smallest - 1, 33)))
                assert name == "S" or shape.smallest > SHAPES["S"].smallest


@pytest.mark.parametrize(("type", "count"), [("S", 627_562), ("M", 1_166_506), ("L", 1_089_754)])
def test_sizes(type: Any, count: int) -> None:
    assert parameters(Laptop(type=type, num_classes=10).model) == count


@pytest.mark.parametrize("type", SHAPES)
def test_is_convolution_pooling_norm_activation_convolution_norm_activation_maximum_and_a_linear_layer(
    type: str,
) -> None:
    shape = SHAPES[type]
    network = randomised(LaptopNet(shape)).eval()
    tensors = list(network.state_dict().values())

    def normed(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, _: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias).relu()

    with torch.no_grad():
        x = F.conv2d(images(), tensors.pop(0), stride=shape.stride, padding=shape.padding)
        x = normed(x, *(tensors.pop(0) for _ in range(5)))
        for _ in shape.widths:
            x = F.max_pool2d(F.conv2d(x, tensors.pop(0), padding=1), 2)
            x = normed(x, *(tensors.pop(0) for _ in range(5)))
            x = F.conv2d(x, tensors.pop(0), padding=1)
            x = normed(x, *(tensors.pop(0) for _ in range(5)))
        weight, bias = tensors
        expected = F.linear(x.amax(dim=(2, 3)), weight, bias)
        torch.testing.assert_close(network(images()), expected, atol=1e-5, rtol=1e-5)
