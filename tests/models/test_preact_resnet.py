"""Pre-activation ResNets: timm's network with timm's weights, and what each option does."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import timm
import torch
from network_checks import (
    NetworkChecks,
    assert_same_function,
    images,
    multiply_adds,
    parameters,
    randomised,
)
from torch import Tensor, nn

from crucible.options import ConfigError
from models.layers import ShakeDrop
from models.preact_resnet import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActResNet,
    PreActResNet18,
    PreActResNet34,
    PreActResNet50,
    PreActResNet101,
    PreActResNet152,
)

BLOCKS = [PreActBasicBlock, PreActBottleneck]


def from_timm(state: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors of timm's `resnetv2` under our names: the same layers, in one list of blocks."""

    def ours(name: str) -> str:
        match = re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(\w+)\.(?:conv\.)?(\w+)", name)
        if match is None:
            return name.replace("head.", "")
        stage, block, layer, tensor = match.groups()
        layer = layer.replace("norm", "bn")
        inside = "branch." if layer not in ("bn1", "downsample") else ""
        return f"blocks.{sum(layers[: int(stage)]) + int(block)}.{inside}{layer}.{tensor}"

    return {ours(name): t.flatten(1) if "head" in name and t.ndim > 1 else t for name, t in state.items()}


@pytest.mark.parametrize(
    ("variant", "reference"),
    [pytest.param(PreActResNet18, "resnetv2_18", marks=pytest.mark.nightly), (PreActResNet50, "resnetv2_50")],
)
def test_outputs_and_gradients_are_timms_with_timms_weights(variant: Any, reference: str) -> None:
    theirs = randomised(timm.create_model(reference, num_classes=10))
    renamed = partial(from_timm, layers=variant.layers)
    assert_same_function(variant(num_classes=10).model, theirs, renamed, spatial=(48, 48))


@pytest.mark.parametrize(
    "variant", [PreActResNet18, PreActResNet34, PreActResNet50, PreActResNet101, PreActResNet152]
)
def test_variants_have_timms_size(variant: Any) -> None:
    with torch.device("meta"):
        ours = variant(num_classes=1000).model
        theirs = timm.create_model(variant.__name__.lower().replace("preactresnet", "resnetv2_"))
    assert parameters(ours) == parameters(theirs)
    if variant in (PreActResNet18, PreActResNet50):
        assert multiply_adds(ours, 3, 224, 224) == multiply_adds(theirs, 3, 224, 224)


class TestNetwork(NetworkChecks):
    num_groups = 32

    def build(self, num_outputs: int = 10, **options: Any) -> nn.Module:
        extras = {"shakedrop": True, "se_rd_ratio": 0.25, "resnet_dropout": 0.1, "block_dropout": 0.1}
        return PreActResNet(
            PreActBasicBlock, [[32], [64, 64]], num_outputs, stem_channels=32, **extras, **options
        )


# Options


@pytest.mark.parametrize("se_rd_ratio", [None, 0.25])
@pytest.mark.parametrize("shakedrop", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_zero_init_makes_each_block_its_shortcut(
    block: Any, shakedrop: bool, se_rd_ratio: float | None
) -> None:
    options: dict[str, Any] = {"shakedrop": shakedrop, "se_rd_ratio": se_rd_ratio, "stem_channels": 8}
    zeroed, usual = (
        PreActResNet(block, [[8, 8], [16]], zero_init_residual=zero, **options) for zero in (True, False)
    )
    for layer, other in zip(zeroed.blocks, usual.blocks, strict=True):
        x = torch.randn(2, layer.bn1.num_features, 8, 8)
        shortcut = layer.downsample(layer.act1(layer.bn1(x)) if layer.projects else x)
        torch.testing.assert_close(layer(x), shortcut)
        other.downsample = layer.downsample
        assert not torch.allclose(other(x), shortcut)


def test_the_shortcut_carries_the_input_itself_where_the_shape_stays() -> None:
    network = PreActResNet(PreActBasicBlock, [[64, 64], [128, 128]])
    assert [block.projects for block in network.blocks] == [False, False, True, False]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_branch_ends_with_a_norm_only_under_shakedrop(block: Any) -> None:
    last = len(block.kernels)
    assert list(dict(block(8, 8).branch.named_children()))[-1] == f"conv{last}"
    gated = block(8, 8, shakedrop=True, drop_path_rate=0.25)
    assert list(dict(gated.branch.named_children()))[-1] == f"bn{last + 1}"
    assert isinstance(gated.drop_path, ShakeDrop)


def test_cifar_size_keeps_the_resolution_through_the_stem() -> None:
    sizes = [
        tuple(PreActResNet(PreActBasicBlock, [[8]], stem_channels=8, cifar_size=c).stem(images()).shape[2:])
        for c in (True, False)
    ]
    assert sizes == [(32, 32), (8, 8)]


def test_each_option_reaches_the_network() -> None:
    network = PreActResNet50(
        num_classes=4,
        input_channels=1,
        cifar_size=True,
        zero_init_residual=True,
        resnet_dropout=0.1,
        stochastic_depth=0.2,
        squeeze_excitation=True,
        se_rd_ratio=0.125,
    ).model
    rates = [block.drop_path.p for block in network.blocks]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(1, 17)])
    assert network.blocks[-1].se.fc1.out_channels == 256
    assert (network.blocks[-1].branch.conv3.weight == 0).all()
    assert network.dropout.p == 0.1
    assert network.stem.conv.weight.shape == (64, 1, 3, 3)
    assert network.fc.out_features == 4


def test_regression_has_one_output() -> None:
    assert PreActResNet18(task="regression", cifar_size=True)(images(spatial=(8, 8))).shape == (2, 1)


def test_a_gate_width_without_gates_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.se_rd_ratio=0\.25 .* model\.squeeze_excitation"):
        PreActResNet18(se_rd_ratio=0.25)


@pytest.mark.parametrize("option", ["pretrained", "block_dropout"])
def test_options_that_the_family_lacks_are_errors(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{option}=0\.5: PreActResNet18 has no such option"):
        PreActResNet18(**{option: 0.5})
