"""Deformable convolution and its ResNets: the paper's formula, torchvision's weights, two dimensions only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from network_checks import (
    NetworkChecks,
    images,
    parameters,
)
from torch import Tensor, nn

from crucible.options import ConfigError
from models.deformable_resnet import (
    DeformableBottleneck,
    DeformableConv2d,
    DeformableResNet18,
    DeformableResNet50,
    DeformableResNet101,
)
from models.dynamic_resnet import ResNet
from models.layers import Bottleneck


@pytest.mark.parametrize("stride", [1, 2])
def test_it_starts_as_half_of_the_plain_convolution(stride: int) -> None:
    torch.manual_seed(0)
    layer = DeformableConv2d(4, 6, 3, stride).double()
    x = images(channels=4, spatial=(9, 9), dtype=torch.float64)
    torch.testing.assert_close(layer(x), 0.5 * F.conv2d(x, layer.weight, stride=stride, padding=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_applied_in_float32(dtype: torch.dtype) -> None:
    layer = DeformableConv2d(2, 3, 3).to(dtype)
    x = images(channels=2, spatial=(5, 5), dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, copy.deepcopy(layer).float()(x.float()).to(dtype))
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_each_tap_reads_at_its_offset_and_is_weighted() -> None:
    torch.manual_seed(0)
    layer = DeformableConv2d(2, 3, 3).double()
    nn.init.normal_(layer.offset_weight, std=0.3)
    nn.init.normal_(layer.offset_bias)
    x = images(n=1, channels=2, spatial=(6, 6), dtype=torch.float64)
    moved = F.conv2d(x, layer.offset_weight, layer.offset_bias, padding=1)[0]

    def read(y: Tensor, x_: Tensor) -> Tensor:
        """Bilinear, zero outside: `(C,)` at a point."""
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(6):
            for j in range(6):
                total = total + x[0, :, i, j] * (1 - (y - i).abs()).clamp(min=0) * (1 - (x_ - j).abs()).clamp(
                    min=0
                )
        return total

    out = layer(x)[0]
    for i, j in ((0, 0), (2, 3), (5, 1)):
        expected = torch.zeros(3, dtype=torch.float64)
        for tap in range(9):
            y = i + tap // 3 - 1 + moved[2 * tap, i, j]
            x_ = j + tap % 3 - 1 + moved[2 * tap + 1, i, j]
            mask = moved[18 + tap, i, j].sigmoid()
            expected = expected + mask * layer.weight[:, :, tap // 3, tap % 3] @ read(y, x_)
        torch.testing.assert_close(out[:, i, j], expected)


def test_the_layers_of_the_second_to_fourth_stage_are_deformable() -> None:
    with torch.device("meta"):
        network = DeformableResNet50().model
    names = [name for name, m in network.named_modules() if isinstance(m, DeformableConv2d)]
    assert len(names) == 4 + 6 + 3
    assert all(name.startswith(("layer2", "layer3", "layer4")) and name.endswith("conv2") for name in names)


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        (DeformableResNet18, torchvision.models.resnet18),
        (DeformableResNet50, torchvision.models.resnet50),
        (DeformableResNet101, torchvision.models.resnet101),
    ],
)
def test_torchvisions_weights_fit(model: Any, reference: Any) -> None:
    with torch.device("meta"):
        ours, theirs = model(num_classes=1000).model, reference()
    own = {k: v.shape for k, v in ours.state_dict().items() if ".offset_" not in k}
    assert own == {k: v.shape for k, v in theirs.state_dict().items()}
    offsets = sum(9 * 27 * m.in_channels + 27 for m in ours.modules() if isinstance(m, DeformableConv2d))
    assert parameters(ours) == parameters(theirs) + offsets


@pytest.mark.parametrize("input_dim", [1, 3])
def test_other_dimensions_are_refused(input_dim: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^data\.input_dim={input_dim}: deformable convolutions are for 2-D"
    ):
        DeformableResNet18(input_dim=input_dim)


class TestDeformableResNet(NetworkChecks):
    num_groups = 16

    def build(self, num_outputs: int = 10, **options: Any) -> nn.Module:
        blocks = (Bottleneck, DeformableBottleneck)
        network = ResNet(blocks, (1, 1), num_outputs, width=32, stochastic_depth=0.2, **options)
        for module in network.modules():
            if isinstance(module, DeformableConv2d):
                nn.init.normal_(module.offset_weight, std=0.01)
        return network

    @pytest.mark.parametrize("input_dim", [2])
    def test_maps_n_c_spatial_to_n_outputs(self, input_dim: int) -> None:
        super().test_maps_n_c_spatial_to_n_outputs(input_dim)
