"""ResNets: torchvision's network in 2-D, the same design in 1-D and 3-D, and what each option does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from network_checks import assert_same_function, randomised
from torch import Tensor, nn

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet, ResNet18, ResNet34, ResNet50, ResNet101, ResNet152
from models.layers import BasicBlock, Bottleneck, ShakeDrop, SqueezeExcitation, drop_path
from models.non_local import NonLocal

SHALLOW = (1, 1, 1, 1)
SHAPES = {1: (64,), 2: (32, 32), 3: (16, 16, 16)}


def images(n: int = 2, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def shallow(**options: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, SHALLOW, 10, **options)


# torchvision's network

PAIRS = [
    (BasicBlock, (2, 2, 2, 2), torchvision.models.resnet18),
    (Bottleneck, (3, 4, 6, 3), torchvision.models.resnet50),
]


@pytest.mark.parametrize(("block", "layers", "reference"), PAIRS, ids=["resnet18", "resnet50"])
def test_keys_shapes_outputs_and_gradients_are_torchvisions(block: Any, layers: Any, reference: Any) -> None:
    theirs = reference(num_classes=10)
    ours = ResNet(block, layers, 10)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_function(ours, randomised(theirs))


def test_seresnet_is_timms_with_timms_weights() -> None:
    theirs = timm.create_model("seresnet18", num_classes=10).eval()
    ours = ResNet(BasicBlock, (2, 2, 2, 2), 10, se_rd_ratio=1 / 16).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("stem", "reference"), [("C", "resnet50c"), ("D", "resnet50d")])
def test_stems_c_and_d_are_timms_with_timms_weights(stem: Any, reference: str) -> None:
    theirs = randomised(timm.create_model(reference, num_classes=10))
    ours = ResNet(Bottleneck, (3, 4, 6, 3), 10, stem=stem)
    ours.load_state_dict(theirs.state_dict())
    x = images(size=65)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem", ["C", "D"])
def test_a_small_inputs_stem_c_keeps_the_resolution(stem: Any) -> None:
    network = shallow(stem=stem, cifar_size=True)
    assert network.conv1(images(size=32)).shape == (2, 64, 32, 32)
    assert [m.kernel_size for m in network.conv1 if isinstance(m, nn.Conv2d)] == [(3, 3)] * 3


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        (ResNet18, 11_689_512),
        (ResNet34, 21_797_672),
        (ResNet50, 25_557_032),
        (ResNet101, 44_549_160),
        (ResNet152, 60_192_808),
    ],
)
def test_variants_have_the_published_number_of_parameters(variant: Any, parameters: int) -> None:
    with torch.device("meta"):
        network = ResNet(variant.block, variant.layers, 1000)
    assert sum(p.numel() for p in network.parameters()) == parameters


# 1-D, 2-D, 3-D


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_maps_n_c_spatial_to_n_outputs(block: Any, input_dim: int) -> None:
    network = ResNet(block, SHALLOW, 7, input_dim=input_dim, input_channels=5, se_rd_ratio=0.25)
    x = torch.randn(2, 5, *SHAPES[input_dim])
    network(x).sum().backward()
    assert network(x).shape == (2, 7)
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("input_dim", [1, 3])
def test_kernels_and_norms_have_the_inputs_dimension(input_dim: int) -> None:
    plane, other = ResNet(BasicBlock, SHALLOW), ResNet(BasicBlock, SHALLOW, input_dim=input_dim)
    for (name, a), b in zip(plane.named_parameters(), other.parameters(), strict=True):
        assert b.shape == (*a.shape[:2], *a.shape[2:3] * input_dim), name


def test_a_2d_network_on_constant_rows_is_the_1d_network() -> None:
    line = ResNet(BasicBlock, SHALLOW, 10, input_dim=1).eval().double()
    plane = ResNet(BasicBlock, SHALLOW, 10).eval().double()
    state = {}
    for (name, a), b in zip(line.state_dict().items(), plane.state_dict().values(), strict=True):
        if a.ndim == 3:  # the 1-D kernel in the middle row, zeros elsewhere
            wide = torch.zeros_like(b)
            wide[:, :, b.shape[2] // 2] = a
            a = wide
        state[name] = a
    plane.load_state_dict(state)
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    torch.testing.assert_close(plane(x[:, :, None].expand(-1, -1, 64, -1)), line(x))


# Options


def test_cifar_size_keeps_the_resolution_through_the_stem() -> None:
    small, usual = shallow(cifar_size=True), shallow()
    sizes: list[tuple[int, ...]] = []
    for network in (small, usual):
        network.layer1.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape[2:])))
        network(images(size=32))
    assert sizes == [(32, 32), (8, 8)]
    assert small.conv1.weight.shape == (64, 3, 3, 3)


def test_dropout_zeroes_the_heads_input_at_its_rate_in_training_only() -> None:
    network = shallow(resnet_dropout=0.25, activation=nn.SiLU)  # which has no zeros of its own
    seen: list[Tensor] = []
    network.fc.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        network.train()(images(n=16))
        network.eval()(images(n=16))
    rate = (seen[0] == 0).float().mean()
    assert abs(rate - 0.25) < 4 * math.sqrt(0.25 * 0.75 / seen[0].numel())
    assert (seen[1] != 0).all()


def test_stochastic_depth_drops_whole_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    n, rate = 20_000, 0.3
    for shape in ((n, 2, 3), (n, 2, 3, 1), (n, 2, 3, 1, 1)):
        out = drop_path(rate).train()(torch.ones(shape)).reshape(n, -1)
        assert (out == out[:, :1]).all()
        survived = out[:, 0] != 0
        torch.testing.assert_close(out[survived], torch.full_like(out[survived], 1 / (1 - rate)))
        spread = 4 * math.sqrt(rate * (1 - rate) / n)
        assert abs(survived.float().mean() - (1 - rate)) < spread
        assert abs(out.mean() - 1) < spread / (1 - rate)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(drop_path(rate).eval()(x), x)


def test_drop_rates_grow_linearly_to_the_last_block() -> None:
    network = ResNet(BasicBlock, (2, 1, 1, 1), stochastic_depth=0.5)
    rates = [m.drop_path.p for m in network.modules() if isinstance(m, BasicBlock)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_dropped_block_is_its_shortcut(block: Any) -> None:
    torch.manual_seed(0)
    layer = block(8 * block.expansion, 8, drop_path_rate=0.5).double()
    x = torch.rand(64, 8 * block.expansion, 4, 4, dtype=torch.float64)
    shortcut = torch.isclose(layer(x), x).flatten(1).all(dim=1)
    assert 16 < shortcut.sum() < 48


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_squeeze_excitation_is_the_papers_formula(input_dim: int) -> None:
    layer = SqueezeExcitation(64, 0.25, input_dim).double()
    x = torch.randn(3, 64, *(4,) * input_dim, dtype=torch.float64)
    z = x.flatten(2).mean(dim=2)
    hidden = (z @ layer.fc1.weight.flatten(1).T + layer.fc1.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ layer.fc2.weight.flatten(1).T + layer.fc2.bias)))
    assert hidden.shape == (3, 16)
    torch.testing.assert_close(layer(x), x * gate.reshape(3, 64, *(1,) * input_dim))


@pytest.mark.parametrize("se_rd_ratio", [None, 0.25])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_zero_init_makes_each_block_its_shortcut(block: Any, se_rd_ratio: float | None) -> None:
    network = ResNet(block, (2, 1, 1, 1), zero_init_residual=True, se_rd_ratio=se_rd_ratio)
    blocks = [m for m in network.modules() if isinstance(m, block)]
    for layer in blocks:
        x = torch.rand(2, layer.conv1.in_channels, 8, 8)
        torch.testing.assert_close(layer(x), layer.downsample(x).relu())
    assert len(blocks) == 5
    plain = ResNet(block, (2, 1, 1, 1), se_rd_ratio=se_rd_ratio).layer1[1]
    x = torch.rand(2, plain.conv1.in_channels, 8, 8)
    assert not torch.equal(plain(x), x)


def test_the_activation_is_a_module_of_its_own_at_each_place() -> None:
    network = shallow(activation=nn.SiLU)
    assert sum(isinstance(m, nn.SiLU) for m in network.modules()) == 1 + 2 * len(SHALLOW)
    assert not any(isinstance(m, nn.ReLU) for m in network.modules())


def test_shakedrop_gates_each_block_up_to_one_half() -> None:
    network = ResNet(BasicBlock, (2, 1, 1), shakedrop=True, width=16)
    gates = [m for m in network.modules() if isinstance(m, ShakeDrop)]
    assert [gate.rate for gate in gates] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    with pytest.raises(ConfigError, match=r"model\.shakedrop=true and model\.stochastic_depth=0\.1"):
        ResNet18(shakedrop=True, stochastic_depth=0.1)


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_the_non_local_block_is_the_papers_embedded_gaussian(input_dim: int) -> None:
    torch.manual_seed(0)
    block = NonLocal(6, input_dim).double()
    x = torch.randn(2, 6, *(3,) * input_dim, dtype=torch.float64)
    assert torch.equal(block(x), x)  # it starts as the identity
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    flat = x.flatten(2)
    theta, phi, g = (
        torch.einsum("oc,ncp->nop", m.weight, flat) + m.bias[:, None]
        for m in (block.theta, block.phi, block.g)
    )
    weights = torch.einsum("ncp,ncq->npq", theta, phi).softmax(dim=2)
    y = torch.einsum("npq,ncq->ncp", weights, g)
    z = torch.einsum("oc,ncp->nop", block.z.weight, y) + block.z.bias[:, None]
    torch.testing.assert_close(block(x), x + block.norm(z.reshape_as(x)))


def test_non_local_blocks_follow_every_other_block_of_res3_and_res4() -> None:
    plain, network = ResNet50().model, ResNet50(non_local=True).model
    names = [name for name, m in network.named_modules() if isinstance(m, NonLocal)]
    expected = ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]  # the paper's five
    assert names == [f"{name}_non_local" for name in expected]
    network.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(network.eval()(images()), plain.eval()(images()))


# Initialisation


def test_convolutions_start_normal_with_the_fan_outs_variance() -> None:
    network = shallow()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
            assert abs(module.weight.mean()) < 5 * math.sqrt(2 / fan_out / module.weight.numel())
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert network.fc.weight.abs().max() <= 1 / math.sqrt(512)
    assert network.fc.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.05)


# Execution

EXTRAS = {"se_rd_ratio": 0.25, "stochastic_depth": 0.3, "resnet_dropout": 0.1, "stem": "D", "non_local": True}


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training: bool) -> None:
    torch._dynamo.reset()
    network = shallow(**EXTRAS).train(training)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = network(images())
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(images()), expected)


def test_compile_in_place_is_real_and_keeps_the_keys() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    network = shallow()
    keys = list(network.state_dict())
    network.compile(fullgraph=True, backend=counting)
    network(images())
    network(images())
    assert len(graphs) == 1
    assert list(network.state_dict()) == keys


def test_bfloat16_autocast_stays_near_float32() -> None:
    network = shallow(se_rd_ratio=0.25).eval()
    with torch.no_grad():
        expected = network(images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(images())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_channels_last_gives_the_same_outputs() -> None:
    network = shallow(**EXTRAS).eval()
    with torch.no_grad():
        expected = network(images())
        network.to(memory_format=torch.channels_last)
        out = network(images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_state_dict_round_trip(tmp_path: Path) -> None:
    network = shallow(**EXTRAS)
    network(images())
    torch.save(network.state_dict(), tmp_path / "w.pt")
    other = ResNet(BasicBlock, SHALLOW, 10, **EXTRAS)
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(other.eval()(images()), network.eval()(images()))


# The models


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_models_have_as_many_outputs_as_the_task_needs(task: Any) -> None:
    model = ResNet18(task=task, num_classes=4, cifar_size=True, input_channels=1)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4 if task == "classification" else 1)


def test_each_option_reaches_the_network() -> None:
    model = ResNet50(
        num_classes=4,
        cifar_size=True,
        zero_init_residual=True,
        resnet_dropout=0.1,
        stochastic_depth=0.2,
        squeeze_excitation=True,
        se_rd_ratio=0.125,
        stem="C",
        non_local=True,
    )
    last = model.model.layer4[-1]
    assert isinstance(last, Bottleneck)
    assert (last.bn3.weight == 0).all()
    assert last.drop_path.p == pytest.approx(0.2)
    assert last.se.fc1.out_channels == 256
    assert model.model.dropout.p == 0.1
    assert model.model.conv1[0].stride == (1, 1)
    assert isinstance(model.model.layer2[2], NonLocal)


def test_a_gate_width_without_gates_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.se_rd_ratio=0\.25 .* model\.squeeze_excitation"):
        ResNet18(se_rd_ratio=0.25)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"input_dim": 3}, "data.input_dim=3"),
        ({"input_channels": 1}, "data.input_channels=1"),
        ({"cifar_size": True}, "model.cifar_size"),
        ({"squeeze_excitation": True}, "model.squeeze_excitation"),
        ({"stem": "D"}, "model.stem=D"),
        ({"non_local": True}, "model.non_local"),
        ({"shakedrop": True}, "model.shakedrop"),
        ({"zero_init_residual": True}, "model.zero_init_residual"),
    ],
)
def test_pretrained_refuses_what_the_weights_do_not_fit(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ResNet18(pretrained=True, **options)


def test_pretrained_takes_torchvisions_weights_and_a_new_head(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *a, **k: theirs)
    model = ResNet18(num_classes=10, pretrained=True)
    assert "head of another size" in model.weights_report
    ours = model.model.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if not k.startswith("fc."))
    assert ours["fc.weight"].shape == (10, 512)
    ours = ResNet18(num_classes=1000, pretrained=True).model.state_dict()
    assert torch.equal(ours["fc.weight"], theirs["fc.weight"])


def test_pretrained_without_a_network_says_where_to_put_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        ConfigError, match=r"model\.pretrained=true: cannot download .*resnet18-.*checkpoints"
    ):
        ResNet18(pretrained=True)
