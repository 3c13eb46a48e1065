"""The networks of the CIFAR rows against a reconstruction of those of MIC-DKFZ/image_classification (6c1266d).

The reconstructions are plain functions of named tensors, written from that repository's code and that of
MIC-DKFZ/dynamic-network-architectures (24d174f); the tensors are ours, mapped by hand. Parameters are those that its
own classes gave when they were run beside ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from hydra.utils import get_class
from network_checks import NetworkChecks, images, parameters, randomised
from torch import Tensor, nn

from crucible.corrections import versions_of
from crucible.options import ConfigError
from models.dynamic_resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152
from models.dynamic_vgg import VGG16, VGG19, StridedVGG
from models.layers import BasicBlock
from models.lip_resnet import LIPResNet50
from models.preact_resnet import PreActResNet18, PreActResNet50, PreActResNet101, PreActResNet152
from models.pyramidnet import PyramidBottleneck, PyramidNet110, PyramidNet272
from models.wide_resnet import WRN2810

PARAMETERS = {  # at 10 and at 100 classes
    "resnet18": (11_173_962, 11_220_132),
    "resnet34": (21_282_122, 21_328_292),
    "resnet50": (36_110_922, 36_157_092),
    "resnet152": (86_588_490, 86_634_660),
    "preact_resnet18": (11_171_146, 11_217_316),
    "preact_resnet34": (21_279_306, 21_325_476),
    "preact_resnet50": (36_108_106, 36_154_276),
    "preact_resnet152": (86_585_674, 86_631_844),
    "pyramidnet110": (18_323_787, 18_426_837),
    "pyramidnet272": (26_210_842, 26_288_692),
    "wrn2810": (36_481_434, 36_539_124),
    "vgg16": (13_692_106, 13_738_276),
    "grid": (21_282_122, 21_328_292),
}
NOT_OF_THE_NETWORK = {
    "lr", "weight_decay", "warmstart", "sam", "nesterov", "mixup", "mixup_alpha", "zero_init_residual",
}  # fmt: skip


@pytest.mark.parametrize("row", PARAMETERS)
def test_the_rows_networks_have_the_sizes_of_theirs(row: str) -> None:
    options = yaml.safe_load((ROOT / "cli_configs" / "recipe" / "cifar" / f"{row}.yaml").read_text())["model"]
    variant = get_class(options.pop("_target_"))
    options = {name: value for name, value in options.items() if name not in NOT_OF_THE_NETWORK}
    with torch.device("meta"):
        counts = [parameters(variant(num_classes=k, cifar_size=True, **options).model) for k in (10, 100)]
    assert tuple(counts) == PARAMETERS[row]


class Weights:
    """The tensors of a state under a prefix, and the layers that they are of, in evaluation."""

    def __init__(self, state: dict[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: Any) -> Weights:
        return Weights(self.state, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(f"{self.prefix}{name}.") for key in self.state)

    def of(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def conv(self, x: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.of("weight"), stride=stride, padding=self.of("weight").shape[-1] // 2)

    def norm(self, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.of(name)[:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.of("weight").T + self.of("bias")


def averaged(x: Tensor) -> Tensor:
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))


def post_activation(w: Weights, x: Tensor, stages: int) -> Tensor:
    """A stem of one 3x3, norm, relu; conv, norm, relu, conv, norm, sum, relu; an average before a shortcut's 1x1."""
    x = w["bn1"].norm(w["conv1"].conv(x)).relu()
    for stage in range(1, stages + 1):
        n = 0
        while f"layer{stage}.{n}" in w:
            block, stride = w[f"layer{stage}.{n}"], 2 if stage > 1 and n == 0 else 1
            shortcut = x
            if "downsample" in block:
                pooled = averaged(x) if stride == 2 else x
                shortcut = block["downsample.2"].norm(block["downsample.1"].conv(pooled))
            x = block["bn1"].norm(block["conv1"].conv(x, stride)).relu()
            x = (block["bn2"].norm(block["conv2"].conv(x)) + shortcut).relu()
            n += 1
    return w["fc"].linear(x.mean(dim=(2, 3)))


def pre_activation(w: Weights, x: Tensor, firsts: tuple[int, ...]) -> Tensor:
    """Norm, relu and conv, twice; the shortcut's 1x1 takes what is activated; the sum is averaged as it is."""
    x, n = w["stem.conv"].conv(x), 0
    while f"blocks.{n}" in w:
        block, stride = w[f"blocks.{n}"], 2 if n in firsts else 1
        active = block["bn1"].norm(x).relu()
        shortcut = block["downsample"].conv(active, stride) if "downsample" in block else x
        out = block["branch.conv1"].conv(active, stride)
        x = block["branch.conv2"].conv(block["branch.bn2"].norm(out).relu()) + shortcut
        n += 1
    return w["fc"].linear(x.mean(dim=(2, 3)))


def pyramid(w: Weights, x: Tensor, a_stage: int) -> Tensor:
    """Norm, 1x1, norm, relu, 3x3, norm, relu, 1x1, norm; kept with 1 - p; a shortcut of averages and zeros."""
    x, n = w["stem.bn"].norm(w["stem.conv"].conv(x)), 0
    while f"blocks.{n}" in w:
        block, stride = w[f"blocks.{n}"], 2 if n in (a_stage, 2 * a_stage) else 1
        out = block["branch.conv1"].conv(block["bn1"].norm(x))
        out = block["branch.conv2"].conv(block["branch.bn2"].norm(out).relu(), stride)
        out = block["branch.bn4"].norm(block["branch.conv3"].conv(block["branch.bn3"].norm(out).relu()))
        out = out * (1 - 0.5 * (n + 1) / (3 * a_stage))
        shortcut = averaged(x) if stride == 2 else x
        x = torch.cat((shortcut, torch.zeros_like(out[:, shortcut.shape[1] :])), dim=1) + out
        n += 1
    return w["fc"].linear(w["norm"].norm(x).relu().mean(dim=(2, 3)))


def strided(w: Weights, x: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Conv, norm, relu; the first convolution of each stage but the first has stride 2."""
    firsts = [sum(layers[:n]) for n in range(1, len(layers))]
    for n in range(sum(layers)):
        x = w[f"features.{3 * n + 1}"].norm(w[f"features.{3 * n}"].conv(x, 2 if n in firsts else 1)).relu()
    return w["fc"].linear(x.mean(dim=(2, 3)))


class Small(ResNet50):
    basic_layers = 1, 2, 1, 1


class SmallPreAct(PreActResNet50):
    basic_layers = 1, 2, 1, 1


class SmallVGG(VGG16):
    strided_layers = (1, 1, 1, 1, 1, 2), (1, 2, 1, 2)


RECONSTRUCTED: dict[str, tuple[Callable[[], Any], Callable[[Weights, Tensor], Tensor]]] = {
    "resnet": (
        lambda: Small(bottleneck=False, averaged_shortcut=True, cifar_size=True),
        lambda w, x: post_activation(w, x, 4),
    ),
    "wide_resnet": (
        lambda: WRN2810(depth=16, widen_factor=2, preactivation=False, cifar_size=True),
        lambda w, x: post_activation(w, x, 3),
    ),
    "preact_resnet": (
        lambda: SmallPreAct(bottleneck=False, final_norm=False, cifar_size=True),
        lambda w, x: pre_activation(w, x, (1, 3, 4)),
    ),
    "pyramidnet": (
        lambda: PyramidNet110(depth=20, alpha=15, bottleneck=True, shakedrop=True, cifar_size=True),
        lambda w, x: pyramid(w, x, 2),
    ),
    "vgg": (lambda: SmallVGG(strided=True, cifar_size=True), lambda w, x: strided(w, x, (1, 2, 1, 2))),
}


@pytest.mark.parametrize("family", RECONSTRUCTED)
def test_a_network_of_the_rows_has_the_outputs_of_its_reconstruction(family: str) -> None:
    build, reconstruction = RECONSTRUCTED[family]
    network = randomised(build().model).double().eval()
    x = images(n=3, spatial=(16, 16)).double()
    with torch.no_grad():
        expected = reconstruction(Weights(network.state_dict()), x)
        torch.testing.assert_close(network(x), expected, atol=1e-9, rtol=1e-9)


def test_widths_between_two_numbers_are_the_even_ones_and_so_another_network() -> None:
    with torch.device("meta"):
        blocks = PyramidNet110(bottleneck=True, cifar_size=True).model.blocks
    assert [block.branch.conv1.out_channels for block in blocks][:6] == [24, 31, 38, 46, 54, 61]
    assert len(blocks) == 36 and all(isinstance(block, PyramidBottleneck) for block in blocks)

    def version(target: str, **options: Any) -> int:
        config = {"model": {"_target_": f"models.pyramidnet.{target}", **options}}
        return versions_of(get_class(config["model"]["_target_"]).corrections, config).get(
            "model._target_", 1
        )

    assert version("PyramidNet110") == version("PyramidNet272") == 1
    assert version("PyramidNet110", bottleneck=True) == 2
    assert version("PyramidNet110", depth=20, alpha=13.5) == 2


@pytest.mark.parametrize("variant", [ResNet50, ResNet152, PreActResNet50, PreActResNet152])
def test_bottlenecks_may_be_asked_for_by_name_or_left_to_the_variant(variant: Any) -> None:
    with torch.device("meta"):
        named, asked, basic = [
            parameters(variant(bottleneck=value, num_classes=1000).model) for value in (None, True, False)
        ]
    assert named == asked != basic


@pytest.mark.parametrize(
    ("variant", "bottleneck", "kind"),
    [
        (ResNet18, True, "basic blocks"),
        (ResNet34, True, "basic blocks"),
        (ResNet101, False, "bottlenecks"),
        (PreActResNet18, True, "basic blocks"),
        (PreActResNet101, False, "bottlenecks"),
    ],
)
def test_blocks_that_a_variant_does_not_have_are_refused(variant: Any, bottleneck: bool, kind: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.bottleneck={str(bottleneck).lower()}: .* has {kind} only"
    ):
        variant(bottleneck=bottleneck)


def test_a_pyramidnet_of_either_block_keeps_its_published_depth() -> None:
    with torch.device("meta"):
        counts = {
            (variant, value): len(variant(bottleneck=value).model.blocks)
            for variant in (PyramidNet110, PyramidNet272)
            for value in (True, False)
        }
    assert list(counts.values()) == [36, 54, 90, 135]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ResNet50(pretrained=True, bottleneck=False), r"pretrained=true .* model\.bottleneck=false"),
        (
            lambda: ResNet50(pretrained=True, averaged_shortcut=True),
            r"pretrained=true .* model\.averaged_shortcut",
        ),
        (lambda: LIPResNet50(averaged_shortcut=True), r"model\.averaged_shortcut=true: LIPResNet pools"),
        (lambda: WRN2810(preactivation=False, block_dropout=0.3), r"model\.block_dropout=0\.3"),
    ],
    ids=["weights of bottlenecks", "weights of strides", "LIP", "dropout"],
)
def test_what_contradicts_itself_is_refused_in_one_line(build: Callable[[], Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=said):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda **options: ResNet34(cifar_size=True, **options).model.fc,
        lambda **options: PreActResNet18(final_norm=False, **options).model.fc,
        lambda **options: PyramidNet110(depth=11, bottleneck=True, **options).model.fc,
        lambda **options: WRN2810(depth=10, preactivation=False, **options).model.fc,
        lambda **options: SmallVGG(strided=True, **options).model.fc,
        lambda **options: VGG19(cifar_size=True, **options).model.classifier[-1],
    ],
    ids=["resnet", "preact_resnet", "pyramidnet", "wide_resnet", "vgg", "vgg with pooling"],
)
def test_the_head_starts_as_it_is_told(build: Callable[..., nn.Linear]) -> None:
    torch.manual_seed(0)
    told, usual = build(num_classes=1000, head_std=0.001), build(num_classes=1000)
    assert float(told.weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    assert not told.bias.any() and usual.bias.any()
    assert float(usual.weight.detach().std()) > 0.005


def test_gates_and_blocks_that_start_as_shortcuts_work_in_post_activation_wide_resnets() -> None:
    network = WRN2810(
        depth=10, widen_factor=1, preactivation=False, squeeze_excitation=True, zero_init_residual=True
    ).model
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    assert len(blocks) == 3 and not any(block.bn2.weight.any() for block in blocks)
    assert [block.se.fc2.out_channels for block in blocks] == [16, 32, 64]


class TestStridedVGG(NetworkChecks):
    num_groups = 32

    def build(self, num_outputs: int = 10, cifar_size: bool = True, **options: Any) -> nn.Module:
        return StridedVGG((1,) * (4 if cifar_size else 6), num_outputs, dropout=0.1, **options)
