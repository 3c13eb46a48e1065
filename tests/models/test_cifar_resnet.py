"""CIFAR ResNets: the paper's depths, sizes and shortcuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_checks import NetworkChecks, images, multiply_adds, parameters
from torch import Tensor, nn

from crucible.options import ConfigError
from models.cifar_resnet import CifarResNet
from models.layers import BasicBlock, PaddedShortcut, ShakeDrop, SqueezeExcitation


@pytest.mark.parametrize(
    ("depth", "millions"),
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)],  # table 6 of the paper
)
def test_parameters_are_the_papers(depth: int, millions: float) -> None:
    with torch.device("meta"):
        network = CifarResNet(depth=depth).model
    weights = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)
    assert len(weights) == depth  # the shortcuts have none


def test_depth_20_has_41_million_multiply_adds() -> None:
    with torch.device("meta"):
        network = CifarResNet(depth=20).model
    assert multiply_adds(network, 3, 32, 32) == pytest.approx(40.55, abs=0.01)


def test_stages_have_16_32_and_64_channels_at_32_16_and_8_pixels() -> None:
    seen: list[tuple[int, ...]] = []
    network = CifarResNet(depth=8).model
    for name in network.stages:
        network.get_submodule(name).register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape[1:])))
    network(images())
    assert seen == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_shortcut_a_takes_every_second_position_and_adds_zeros(input_dim: int) -> None:
    x = torch.randn(2, 3, *(5,) * input_dim)
    out = PaddedShortcut(4, 2)(x)
    kept = x
    for dim in range(2, x.ndim):
        kept = kept.index_select(dim, torch.tensor([0, 2, 4]))
    assert torch.equal(out[:, :3], kept)
    assert out.shape == (2, 7, *(3,) * input_dim) and not out[:, 3:].any()


def test_shortcut_b_is_a_convolution_with_a_norm() -> None:
    with torch.device("meta"):
        a, b = CifarResNet(depth=20).model, CifarResNet(depth=20, shortcut="B").model
    assert parameters(b) - parameters(a) == 16 * 32 + 32 * 64 + 2 * (32 + 64)


def reference(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The network in evaluation, from its weights and the paper's description."""

    def norm(x: Tensor, name: str) -> Tensor:
        values = [state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values)

    x = norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(norm(y, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
            y = norm(y, f"{name}.bn2")
            shortcut = x[:, :, ::stride, ::stride]
            y[:, : x.shape[1]] += shortcut
            x = y.relu()
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_outputs_are_those_of_the_papers_description() -> None:
    torch.manual_seed(0)
    network = CifarResNet(depth=14).model.double()
    x = images(n=4, dtype=torch.float64)
    network(x)  # moves the norms' statistics away from their initial values
    torch.testing.assert_close(network.eval()(x), reference(network.state_dict(), x, blocks=2))


@pytest.mark.parametrize(("depth", "named"), [(21, "20 or 26"), (9, "8 or 14"), (18, "14 or 20")])
def test_a_depth_between_is_refused_with_its_neighbours(depth: int, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.depth must be 6n \+ 2, such as {named}, got {depth}$"):
        CifarResNet(depth=depth)


def test_each_option_reaches_the_network() -> None:
    network = CifarResNet(depth=8, zero_init_residual=True, resnet_dropout=0.1, shakedrop=True).model
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock)]
    assert all((m.bn2.weight == 0).all() for m in blocks)
    assert network.dropout.p == 0.1
    assert [m.drop_path.rate for m in blocks] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert all(isinstance(m.drop_path, ShakeDrop) for m in blocks)
    network = CifarResNet(depth=8, stochastic_depth=0.3, squeeze_excitation=True).model
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock)]
    assert [m.drop_path.p for m in blocks] == pytest.approx([0.1, 0.2, 0.3])
    assert all(isinstance(m.se, SqueezeExcitation) for m in blocks)


class TestCifarResNet(NetworkChecks):
    num_groups = 8

    def build(self, num_outputs: int = 10, cifar_size: bool = True, **options: Any) -> nn.Module:
        return CifarResNet(depth=8, num_classes=num_outputs, **options).model
