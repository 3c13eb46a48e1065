"""ResNets without normalization: Fixup's initialisation, and that they train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from network_checks import NetworkChecks, parameters
from torch import Tensor, nn

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet18
from models.fixup_resnet import FixupBasicBlock, FixupResNet, ResNet18WithoutNorm, ResNet34WithoutNorm, Scalar
from norms import convert_norm
from optimizers import build_optimizer


def test_it_is_the_resnet_with_scalars_in_place_of_the_norms() -> None:
    with torch.device("meta"):
        ours, plain = ResNet18WithoutNorm(num_classes=1000).model, ResNet18(num_classes=1000).model
    norms = sum(parameters(m) for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    scalars = 2 + 8 * 5  # stem and head, five in each block
    assert parameters(ours) == parameters(plain) - norms + scalars == 11_679_954
    assert not any(hasattr(m, "running_mean") for m in ours.modules())


@pytest.mark.parametrize(("model", "blocks"), [(ResNet18WithoutNorm, 8), (ResNet34WithoutNorm, 16)])
def test_initialisation_is_fixups(model: Any, blocks: int) -> None:
    torch.manual_seed(0)
    network = model().model
    built = [m for m in network.modules() if isinstance(m, FixupBasicBlock)]
    assert len(built) == blocks
    assert not network.fc.weight.any() and not network.fc.bias.any()
    for block in built:
        he = math.sqrt(2 / (block.conv1.out_channels * 9))
        assert block.conv1.weight.std().item() == pytest.approx(he * blocks**-0.5, rel=0.05)
        assert not block.conv2.weight.any()
    for module in network.modules():
        if isinstance(module, Scalar):
            assert module.value.tolist() == [1.0 if module.multiplies else 0.0]


def block_and_branch(*channels: int, stride: int = 1) -> tuple[FixupBasicBlock, Tensor, Tensor, Tensor]:
    """A block with random scalars, an input, what its branch makes of it by the paper's formula, and its first bias."""
    torch.manual_seed(0)
    block = FixupBasicBlock(*channels, stride=stride).double()
    for module in block.modules():
        if isinstance(module, Scalar):
            nn.init.normal_(module.value)
    b1, b2, b3, b4 = (getattr(block, f"bias{i}").value for i in range(1, 5))
    x = torch.randn(2, channels[0], 5, 5, dtype=torch.float64)
    return block, x, block.conv2((block.conv1(x + b1) + b2).relu() + b3) * block.scale.value + b4, b1


def test_a_block_is_the_papers_formula() -> None:
    block, x, y, _ = block_and_branch(4, 4)
    torch.testing.assert_close(block(x), (y + x).relu())


def test_a_projected_shortcut_has_the_blocks_first_bias_before_it() -> None:
    block, x, y, b1 = block_and_branch(4, 6, stride=2)
    shortcut = nn.functional.conv2d(x + b1, block.downsample.weight, stride=2)
    torch.testing.assert_close(block(x), (y + shortcut).relu())


@pytest.mark.parametrize("options", [{}, {"undecay_norm": True}, {"layer_decay": 0.5}])
def test_scalars_and_biases_learn_at_a_tenth_of_the_weights_rate(options: dict[str, Any]) -> None:
    model = ResNet18WithoutNorm(lr=0.1, weight_decay=0.01, **options)
    optimizer = build_optimizer(model, model.optimizer_options, model.step.groups)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    block = model.model.layer2[0]
    wanted = {
        block.conv1.weight: 1.0, block.downsample.weight: 1.0, block.bias1.value: 0.1, block.bias4.value: 0.1,
        block.scale.value: 0.1,
    }  # fmt: skip
    of_the_layer = rate[block.conv1.weight]
    assert {p: rate[p] / of_the_layer for p in wanted} == pytest.approx(wanted)
    assert rate[model.model.fc.weight] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert rate[model.model.fc.bias] == pytest.approx(0.01)
    assert rate.keys() == set(model.parameters())


def test_it_trains_at_a_rate_for_networks_with_norms() -> None:
    torch.manual_seed(0)
    network = FixupResNet((2, 2, 2, 2), 4, input_channels=1, cifar_size=True, width=16)
    target = torch.arange(32) % 4
    x = torch.randn(4, 1, 8, 8)[target] + 0.5 * torch.randn(32, 1, 8, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4))  # the head starts at zero
    assert max(losses) < 2 * losses[0]
    assert losses[-1] < 0.1


class TestFixupResNet(NetworkChecks):
    def build(self, **options: Any) -> nn.Module:
        options = {"num_outputs": 10, "stochastic_depth": 0.2, **options}
        network = FixupResNet((1, 1), width=32, **options)
        nn.init.normal_(network.fc.weight, std=0.05)
        return network

    def test_every_norm_converts(self) -> None:
        with pytest.raises(ConfigError, match=r"^model\.norm=group: FixupResNet has no norm to convert$"):
            convert_norm(self.build(), "group")
