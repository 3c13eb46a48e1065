"""VGG with batch norm: torchvision's network with torchvision's weights, and what each option does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from network_checks import (
    NetworkChecks,
    images,
    multiply_adds,
    parameters,
    randomised,
)
from torch import nn

from crucible.options import ConfigError
from models.dynamic_vgg import VGG, VGG16, VGG19

SHALLOW = (1, 1, 1, 1, 1)
PAIRS = [(VGG16, "vgg16_bn"), (VGG19, "vgg19_bn")]


@pytest.mark.parametrize(
    ("variant", "reference"), [PAIRS[0], pytest.param(*PAIRS[1], marks=pytest.mark.nightly)]
)
def test_keys_outputs_and_gradients_are_torchvisions(variant: Any, reference: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, reference)(num_classes=10, init_weights=False)
        ours = variant(num_classes=10).model
    theirs = randomised(theirs.to_empty(device="cpu"))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for network in (ours, theirs):  # its gradient has 400 MB
        network.classifier[0].weight.requires_grad_(False)
    x = images(spatial=(64, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
    gradients = []
    for network in (ours, theirs):
        wanted = [p for p in network.parameters() if p.requires_grad]
        torch.manual_seed(0)  # of the dropout
        loss = network.train()(x).logsumexp(dim=1).sum()
        gradients.append(torch.autograd.grad(loss, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("variant", "reference"), PAIRS)
def test_sizes_are_the_published_ones(variant: Any, reference: str) -> None:
    published = torchvision.models.get_model_weights(reference).DEFAULT.meta
    with torch.device("meta"):
        network = variant(num_classes=1000).model
    assert parameters(network) == published["num_params"]
    assert multiply_adds(network, 3, 224, 224) / 1e3 == pytest.approx(published["_ops"], abs=1e-3)


@pytest.mark.parametrize(("variant", "count"), [(VGG16, 14_728_266), (VGG19, 20_040_522)])
def test_small_input_gets_one_linear_layer(variant: Any, count: int) -> None:
    with torch.device("meta"):
        network = variant(cifar_size=True).model
    assert parameters(network) == count
    assert [type(m) for m in network.classifier] == [nn.Linear]
    assert network.classifier[0].in_features == 512


class TestNetwork(NetworkChecks):
    num_groups = 32
    cifar_sizes = (True,)  # the large head has layers of 4096 channels: compared with torchvision's above

    def build(self, num_outputs: int = 10, cifar_size: bool = True, **options: Any) -> nn.Module:
        return VGG(SHALLOW, num_outputs, cifar_size=cifar_size, dropout=0.1, **options)


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_large_input_is_pooled_to_seven_positions_along_each_dimension(input_dim: int) -> None:
    with torch.device("meta"):
        network = VGG(SHALLOW, 10, input_dim=input_dim)
        assert network(torch.empty(2, 3, *(96,) * input_dim)).shape == (2, 10)
    assert network.classifier[0].in_features == 512 * 7**input_dim


# Options


def test_input_too_small_is_refused_with_its_size() -> None:
    with torch.device("meta"):
        network = VGG16().model
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        with pytest.raises(
            ConfigError, match=r"data\.input_size: VGG .* at least 32 .* got 40x31.*cifar_size"
        ):
            network(torch.empty(2, 3, 40, 31))


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [0.5, 0.5]),
        ({"resnet_dropout": 0.2}, [0.2, 0.2]),
        ({"cifar_size": True}, []),
        ({"cifar_size": True, "resnet_dropout": 0.2}, [0.2]),
    ],
)
def test_dropout_lies_in_the_classifier(options: dict[str, Any], rates: list[float]) -> None:
    with torch.device("meta"):
        network = VGG16(**options).model
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == rates
    assert not any(isinstance(m, nn.Dropout) for m in network.features)


@pytest.mark.parametrize(
    "option",
    [
        "stochastic_depth",
        "zero_init_residual",
        "shakedrop",
        "squeeze_excitation",
        "se_rd_ratio",
        "pretrained",
    ],
)
@pytest.mark.parametrize("variant", [VGG16, VGG19])
def test_options_that_the_family_lacks_are_errors(variant: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{option}=0\.5: VGG1\d has no such option"):
        variant(**{option: 0.5})


@pytest.mark.slow
def test_the_head_starts_as_torchvisions() -> None:
    torch.manual_seed(0)
    ours = [m for m in VGG(SHALLOW, 10).classifier if isinstance(m, nn.Linear)]
    theirs = [m for m in torchvision.models.VGG(nn.Identity(), 10).classifier if isinstance(m, nn.Linear)]
    assert len(ours) == len(theirs) == 3
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.weight.shape == reference.weight.shape
        assert mine.weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.02)
        assert abs(mine.weight.mean().item()) < 1e-4
        assert not mine.bias.any() and not reference.bias.any()


def test_the_one_layer_of_small_input_keeps_torchs_default() -> None:
    torch.manual_seed(0)
    (layer,) = VGG(SHALLOW, 10, cifar_size=True, dropout=0.0).classifier
    assert layer.weight.std().item() == pytest.approx((1 / (3 * 512)) ** 0.5, rel=0.05)
    assert layer.bias.any()


def test_convolutions_start_normal_and_without_bias() -> None:
    for module in VGG(SHALLOW, cifar_size=True).features:
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(
                (2 / (9 * module.out_channels)) ** 0.5, rel=0.05
            )
            assert (module.bias == 0).all()
