"""Another activation and anti-aliased downsampling, in our networks and timm's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from network_checks import images
from stages import assembled
from timm.layers import BlurPool2d
from torch import Tensor, nn

from crucible.options import ConfigError, read_options
from crucible.technique import Setting
from models.cifar_resnet import CifarResNet
from models.convert import ACTIVATIONS, ActivationSwap, BlurPool
from models.dynamic_resnet import ResNet
from models.layers import AVG_POOL, CONV, MAX_POOL, BasicBlock, Bottleneck
from norms import convert_norm

TIMM = ["resnet18", "efficientnet_b0", "mobilenetv3_small_100", "convnext_atto"]


def convert_network(network: nn.Module, input_dim: int, **values: Any) -> nn.Module:
    """What the stages of a step for these values make of a network."""
    for change in assembled(Setting(input_dim=input_dim), **values).network:
        network = change(network)
    return network


def converted(network: nn.Module, input_dim: int = 2, **options: Any) -> nn.Module:
    return convert_network(copy.deepcopy(network), input_dim, **options)


def resnet(**options: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), 10, se_rd_ratio=0.25, **options)


def of_timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10)


def kinds(network: nn.Module) -> list[str]:
    return [type(m).__name__ for m in network.modules()]


# Activation


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_takes_the_place_of_each_relu(name: str) -> None:
    network = converted(resnet(), activation=name)
    relus = kinds(resnet()).count("ReLU")
    assert kinds(network).count(ACTIVATIONS[name].__name__) == relus == 1 + 4 * 2 + 4
    network(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_network_computes_with_it() -> None:
    torch.manual_seed(0)
    built = ResNet(BasicBlock, (1, 1, 1, 1), 10, activation=nn.SiLU)
    torch.manual_seed(0)
    swapped = converted(ResNet(BasicBlock, (1, 1, 1, 1), 10), activation="silu")
    assert torch.equal(swapped(images()), built(images()))


@pytest.mark.parametrize("network", TIMM)
def test_timms_networks_swap_theirs_and_keep_their_gates(network: str) -> None:
    before, x = of_timm(network).eval(), images()
    after = converted(before, activation="elu")
    gates = ("Sigmoid", "Hardsigmoid", "HardSigmoid", "Softmax")
    assert not {"ReLU", "SiLU", "Swish", "Hardswish", "HardSwish", "GELU"} & set(kinds(after))
    assert [k for k in kinds(after) if k in gates] == [k for k in kinds(before) if k in gates]
    assert list(after.state_dict()) == list(before.state_dict())
    with torch.no_grad():
        assert not torch.equal(after(x), before(x))


def test_timms_fused_norm_and_activation_keep_the_norm() -> None:
    network = of_timm("test_efficientnet")
    after = converted(network, activation="relu")
    assert isinstance(after.bn1.act, nn.ReLU)
    assert after.bn1.act.inplace == network.bn1.act.inplace
    converted_twice = convert_norm(converted(network, activation="relu"), "group", num_groups=4)
    assert isinstance(converted_twice.bn1.act, nn.ReLU)


@pytest.mark.parametrize("order", [("norm", "activation"), ("activation", "norm")])
def test_it_is_safe_in_place_where_the_norms_are_none(order: tuple[str, str]) -> None:
    steps = {
        "norm": lambda network: convert_norm(network, "none"),
        "activation": lambda network: converted(network, activation="leaky_relu"),
    }
    network = steps[order[1]](steps[order[0]](of_timm("test_resnet").double()))
    x = images(n=1, spatial=(33, 33), dtype=torch.float64)
    expected = copy.deepcopy(network)
    for module in expected.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    assert torch.equal(network(x), expected(x))


def test_one_module_used_in_many_places_stays_one() -> None:
    shared = nn.ReLU()
    network = converted(nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared), activation="prelu")
    assert network[1] is network[3]
    assert isinstance(network[1], nn.PReLU)


def test_what_it_is_already_is_left_alone() -> None:
    network = resnet()
    after = convert_network(network, 2, activation="relu")
    assert after is network and after.act is network.act


def test_a_network_without_activation_modules_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.activation=gelu: Linear has no activation module"):
        convert_network(nn.Linear(2, 2), 2, activation="gelu")


def test_options_are_checked_by_name() -> None:
    assert read_options(ActivationSwap, {"activation": "gelu", "lr": 1.0}) == ActivationSwap("gelu")
    with pytest.raises(
        ConfigError, match=r"^model\.activation must be one of relu, .*, got 'geluu'; did you mean"
    ):
        read_options(ActivationSwap, {"activation": "geluu"})


# Blur pool


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_the_blur_is_the_binomial_filter_along_each_dimension(input_dim: int) -> None:
    x = torch.randn(2, 3, *(7,) * input_dim, dtype=torch.float64)
    expected = x
    for dim in range(2, x.ndim):
        size = expected.shape[dim]
        around = [abs(i) if i < size else 2 * size - 2 - i for i in range(-1, size + 1)]  # reflected
        left, here, right = (
            expected.index_select(dim, torch.tensor(around[k : k + size : 2])) for k in range(3)
        )
        expected = (left + 2 * here + right) / 4
    torch.testing.assert_close(BlurPool((2,) * input_dim).double()(x), expected)


def test_the_blur_is_timms() -> None:
    x = images(channels=5)
    torch.testing.assert_close(BlurPool((2, 2))(x), BlurPool2d(5, filt_size=3, stride=2)(x))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("input_dim", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (5, 2), (7, 3)])
def test_sizes_stay(kernel: int, padding: int, input_dim: int, ceil_mode: bool) -> None:
    window: dict[str, Any] = {"kernel_size": kernel, "stride": 2, "padding": padding}
    layers = [CONV[input_dim](2, 2, **window)]
    layers += [pool[input_dim](**window, ceil_mode=ceil_mode) for pool in (MAX_POOL, AVG_POOL)]
    for layer in layers:
        blurred = converted(nn.Sequential(layer), input_dim, blur_pool=True)
        smallest = 1 if ceil_mode and isinstance(layer, MAX_POOL[input_dim]) and kernel == 2 else kernel
        for size in range(smallest, 9):
            x = torch.randn(1, 2, *(size,) * input_dim)
            assert blurred(x).shape == layer(x).shape, (layer, size)
            assert blurred(x).isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_maps_too_small_to_be_reflected_are_repeated(size: int) -> None:
    x = torch.full((1, 2, size, size), 3.0)
    torch.testing.assert_close(BlurPool((2, 2))(x), torch.full((1, 2, (size + 1) // 2, (size + 1) // 2), 3.0))


def test_a_strided_convolution_runs_at_stride_1_and_is_blurred() -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    x = images()
    expected = BlurPool2d(4, filt_size=3, stride=2)(F.conv2d(x, layer.weight, layer.bias, padding=1))
    torch.testing.assert_close(converted(nn.Sequential(layer), blur_pool=True)(x), expected)


def test_a_pointwise_convolution_may_follow_the_blur() -> None:
    layer = nn.Conv2d(3, 4, 1, stride=2)
    x = images(spatial=(9, 9))
    expected = BlurPool2d(4, filt_size=3, stride=2)(F.conv2d(x, layer.weight, layer.bias))
    sizes: list[Any] = []
    network = converted(nn.Sequential(layer), blur_pool=True)
    network[0].register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[2:]))
    torch.testing.assert_close(network(x), expected)
    assert sizes == [(5, 5)]  # the product is taken where it is cheap


def test_a_max_pool_is_dense_and_then_blurred() -> None:
    x = images(channels=4)
    expected = BlurPool2d(4, filt_size=3, stride=2)(F.max_pool2d(x, 3, stride=1, padding=1))
    pool = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1))
    torch.testing.assert_close(converted(pool, blur_pool=True)(x), expected)


def test_strides_in_some_dimensions_blur_those() -> None:
    layer = nn.Conv3d(2, 2, 3, stride=(1, 2, 2), padding=1)
    network = converted(nn.Sequential(layer), 3, blur_pool=True)
    x = images(channels=2, spatial=(4, 8, 8))
    flat = F.conv3d(x, layer.weight, layer.bias, padding=1).transpose(1, 2).flatten(0, 1)
    expected = BlurPool2d(2, filt_size=3, stride=2)(flat).unflatten(0, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("network", TIMM)
def test_timms_networks_keep_keys_and_shape_and_change_their_outputs(network: str) -> None:
    before, x = of_timm(network).eval(), images(spatial=(64, 64))
    after = converted(before, blur_pool=True)
    assert list(after.state_dict()) == list(before.state_dict())
    layers = [m for m in after.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    assert not any(m.stride in (2, (2, 2)) for m in layers)
    with torch.no_grad():
        assert after(x).shape == before(x).shape
        assert not torch.equal(after(x), before(x))


def shift_consistency(network: nn.Module, x: Tensor) -> float:
    """How alike the features of an image and of its shift by a pixel are: cosine, averaged (1 is the best)."""
    with torch.no_grad():
        a, b = (network(x.roll(shift, dims=3)) for shift in (0, 1))
    return F.cosine_similarity(a - a.mean(0), b - b.mean(0)).mean().item()


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_outputs_change_less_when_the_input_is_shifted(block: Any) -> None:
    torch.manual_seed(0)
    network = ResNet(block, (1, 1, 1), 64, width=16)
    x = images(n=32)
    network(x)  # norm statistics that fit the images
    plain, blurred = network.eval(), converted(network, blur_pool=True)
    blurred.train()(x)
    assert 1 - shift_consistency(blurred.eval(), x) < 0.5 * (1 - shift_consistency(plain, x))


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_our_resnet_in_every_dimension(input_dim: int) -> None:
    network = converted(resnet(input_dim=input_dim, stem="D"), input_dim, blur_pool=True, activation="mish")
    x = images(spatial={1: (64,), 2: (32, 32), 3: (16, 16, 16)}[input_dim])
    network(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["ours", "test_efficientnet"])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    built = ResNet(BasicBlock, (1, 1), 10) if name == "ours" else of_timm(name)
    network = converted(built, blur_pool=True, activation="silu").eval()
    x = images()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), network(x))


def test_channels_last_bfloat16_and_copies() -> None:
    network = converted(resnet(), blur_pool=True).eval()
    with torch.no_grad():
        expected = network(images())
        twin = copy.deepcopy(network).to(memory_format=torch.channels_last)
        out = twin(images().contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(images())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_weights_of_the_plain_network_load() -> None:
    plain, blurred = CifarResNet(depth=8, shortcut="B"), CifarResNet(depth=8, shortcut="B")
    network = converted(blurred.model, blur_pool=True)
    network.load_state_dict(plain.model.state_dict())
    assert list(network.state_dict()) == list(plain.model.state_dict())


@pytest.mark.parametrize(
    "network", [nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 16, stride=16), nn.ConvTranspose2d(3, 8, 2, stride=2)]
)
def test_a_network_that_halves_nothing_is_refused(network: nn.Module) -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.blur_pool=true: .* has no convolution or pool of stride 2"
    ):
        convert_network(network, 2, blur_pool=True)
