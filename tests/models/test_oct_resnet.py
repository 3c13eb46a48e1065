"""Octave convolution and its ResNets: the paper's formula and the paper's costs."""

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
)
from torch import Tensor, nn

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet18, ResNet50, ResNet152
from models.oct_resnet import (
    OctaveBasicBlock,
    OctaveBottleneck,
    OctaveConv,
    OctaveResNet,
    OctResNet18,
    OctResNet50,
    OctResNet152,
)


@pytest.mark.parametrize(
    ("alpha", "giga"),
    [
        (0.125, 3.6),
        *(pytest.param(*row, marks=pytest.mark.nightly) for row in [(0.25, 3.1), (0.5, 2.4), (0.75, 1.9)]),
    ],
)  # arXiv 1904.05049, table 3
def test_multiply_adds_of_octresnet_50_are_the_papers(alpha: float, giga: float) -> None:
    with torch.device("meta"):
        network = OctResNet50(alpha=alpha, num_classes=1000).model
    assert multiply_adds(network, 3, 224, 224) / 1e3 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize(
    ("octave", "plain", "more"),
    [
        (OctResNet18, ResNet18, 64 * 64 + 2 * 64),  # the first block's shortcut splits the octaves
        (OctResNet50, ResNet50, 0),
        (OctResNet152, ResNet152, 0),
    ],
)
def test_it_has_as_many_parameters_as_the_resnet(octave: Any, plain: Any, more: int) -> None:
    with torch.device("meta"):
        ours, theirs = octave(num_classes=1000).model, plain(num_classes=1000).model
    assert parameters(ours) - parameters(theirs) == more


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_is_the_papers_formula(stride: int, size: int) -> None:
    torch.manual_seed(0)
    layer = OctaveConv((6, 2), (3, 5), 3, stride, 2).double()
    high = torch.randn(2, 6, size, size, dtype=torch.float64)
    low = torch.randn(2, 2, (size + 1) // 2, (size + 1) // 2, dtype=torch.float64)

    def halved(x: Tensor) -> Tensor:
        """The mean of each 2x2 window; at an odd border of what is there."""
        padded = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=float("nan"))
        windows = padded.unfold(2, 2, 2).unfold(3, 2, 2)
        return windows.nanmean(dim=(4, 5))

    def doubled(x: Tensor, size: int) -> Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :size, :size]

    def convolved(x: Tensor, path: nn.Module) -> Tensor:
        return F.conv2d(x, path.weight, padding=1)

    if stride == 1:
        expected_high = convolved(high, layer.high_to_high) + doubled(convolved(low, layer.low_to_high), size)
        expected_low = convolved(low, layer.low_to_low) + convolved(halved(high), layer.high_to_low)
    else:
        expected_high = convolved(halved(high), layer.high_to_high) + convolved(low, layer.low_to_high)
        expected_low = convolved(halved(low), layer.low_to_low)
        expected_low = expected_low + convolved(halved(halved(high)), layer.high_to_low)
    new_high, new_low = layer((high, low))
    torch.testing.assert_close(new_high, expected_high)
    torch.testing.assert_close(new_low, expected_low)


def test_the_octaves_part_after_the_stem_and_meet_in_the_last_stage() -> None:
    network = OctResNet50().model
    seen: list[list[tuple[int, ...]]] = []
    for name in network.stages:
        network.get_submodule(name)[0].register_forward_hook(
            lambda m, x, y: seen.append([tuple(t.shape[1:]) for t in (y if isinstance(y, tuple) else [y])])
        )
    network(images(spatial=(64, 64)))
    assert seen == [
        [(224, 16, 16), (32, 8, 8)],
        [(448, 8, 8), (64, 4, 4)],
        [(896, 4, 4), (128, 2, 2)],
        [(2048, 2, 2)],
    ]


def test_drop_paths_take_both_octaves_at_once() -> None:
    torch.manual_seed(0)
    layer = OctaveBasicBlock(16, 16, 1, alpha_in=0.5, alpha_out=0.5, drop_path_rate=0.5).double()
    high, low = (torch.rand(64, 8, size, size, dtype=torch.float64) for size in (4, 2))
    new_high, new_low = layer((high, low))
    dropped = [torch.isclose(a, b).flatten(1).all(dim=1) for a, b in ((new_high, high), (new_low, low))]
    assert torch.equal(*dropped)
    assert 16 < dropped[0].sum() < 48


def test_zero_init_makes_each_block_its_shortcut() -> None:
    network = OctResNet18(zero_init_residual=True, alpha=0.5).model
    block = network.layer2[1]
    octaves = torch.rand(2, 64, 4, 4), torch.rand(2, 64, 2, 2)
    for out, given in zip(block(octaves), octaves, strict=True):
        torch.testing.assert_close(out, given)


def test_an_octave_without_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.alpha=0\.01 leaves the first stage without a low octave"):
        OctResNet18(alpha=0.01)


class TestOctResNet(NetworkChecks):
    num_groups = 8

    def build(self, **options: Any) -> nn.Module:
        options = {"num_outputs": 10, "stochastic_depth": 0.2, **options}
        return OctaveResNet(OctaveBottleneck, (1, 1, 1), width=32, alpha=0.25, **options)
