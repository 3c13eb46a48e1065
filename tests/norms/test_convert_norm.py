"""`convert_norm` gives any network any norm and keeps what the norms share; each norm is what its paper says."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from stages import assembled
from torch import Tensor, nn

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet18
from norms import OnlineNorm, convert_norm
from norms.convert import NORMS
from norms.modules import GhostBatchNorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm, SwitchNorm

BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OPTIONS = {"group": {"num_groups": 2}, "ghost": {"ghost_size": 2}}
TECHNIQUES = {
    "online_norm": "online",
    "group_norm": "group",
    "layer_norm": "layer",
    "instance_norm": "instance",
    "no_norm": "none",
    "switchable_norm": "switchable",
    "ghost_norm": "ghost",
}


def small_network(dims: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        CONV[dims](3, 4, 3, padding=1),
        BATCH_NORM[dims](4),
        nn.ReLU(),
        CONV[dims](4, 6, 3),
        BATCH_NORM[dims](6),
    )
    for norm in (network[1], network[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_a_network_of_every_dimension(norm, dims):
    network = convert_norm(small_network(dims), norm, **OPTIONS.get(norm, {}))
    assert type(network[1]) is type(network[4]) is NORMS[norm]
    x = torch.randn(5, 3, *(6,) * dims)
    out = network(x)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.eval()(x).isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_compiles_whole(norm):
    torch._dynamo.reset()
    eager = convert_norm(small_network(), norm, **OPTIONS.get(norm, {}))
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="eager")
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(compiled(x), eager(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "none"])
def test_scale_and_shift_stay_the_same_parameters(norm):
    network = small_network()
    weight, bias = network[1].weight, network[1].bias
    convert_norm(network, norm, **OPTIONS.get(norm, {}))
    assert network[1].weight is weight
    assert network[1].bias is bias


@pytest.mark.parametrize("norm", ["batch", "sync", "ghost", "switchable", "online"])
def test_running_statistics_pass_on(norm):
    network = small_network()
    mean, var = network[1].running_mean.clone(), network[1].running_var.clone()
    convert_norm(network, norm)
    kept = ("m", "var") if norm == "online" else ("running_mean", "running_var")
    assert torch.equal(getattr(network[1], kept[0]), mean)
    assert torch.equal(getattr(network[1], kept[1]), var)
    convert_norm(network, "batch")
    assert torch.equal(network[1].running_mean, mean)


def test_online_norm_evaluates_as_the_batch_norm_that_it_replaces():
    network, x = small_network().eval(), torch.randn(5, 3, 6, 6)
    expected = network(x)
    torch.testing.assert_close(convert_norm(network, "online", ecm="none")(x), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_device_dtype_mode_and_eps_are_kept(norm):
    network = small_network().double().eval()
    network[1].eps = 1e-3
    convert_norm(network, norm, **OPTIONS.get(norm, {}))
    assert not network[1].training
    tensors = [t for t in [*network[1].parameters(), *network[1].buffers()] if t.is_floating_point()]
    assert all(t.dtype == torch.float64 for t in tensors)
    if norm != "none":
        assert network[1].eps == 1e-3
        convert_norm(network, norm, eps=0.1, **OPTIONS.get(norm, {}))
        assert network[1].eps == 0.1


def test_a_norm_without_scale_and_shift_stays_without():
    assert not list(convert_norm(nn.Sequential(nn.BatchNorm2d(4, affine=False)), "online").parameters())


def test_our_resnet_converts_whole_and_zero_initialised_norms_stay_zero():
    network = ResNet18(zero_init_residual=True).model
    last = [
        name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()
    ]
    assert len(last) == 8
    convert_norm(network, "online")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert not any(network.get_submodule(name).weight.any() for name in last)


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name in ("test_resnet", "test_efficientnet") for norm in NORMS]
    + [("densenet121", "online"), ("densenet121", "none")],  # in-place activations beside skip connections
)
def test_timm_networks_keep_their_fused_activations(name, norm):
    network = timm.create_model(name, num_classes=3)
    activations = [m for m in network.modules() if isinstance(m, (nn.ReLU, nn.SiLU))]
    keys = {key for key in network.state_dict() if key.endswith(("weight", "bias"))}
    convert_norm(network, norm, **({"num_groups": 1} if norm == "group" else {}))
    assert [m for m in network.modules() if isinstance(m, (nn.ReLU, nn.SiLU))] == activations
    if norm != "none":
        assert {key for key in network.state_dict() if key.endswith(("weight", "bias"))} - keys == (
            {k for k in network.state_dict() if k.endswith(("mean_weight", "var_weight"))}
        )
    network = pickle.loads(pickle.dumps(network))
    out = network(torch.randn(2, 3, 64, 64))
    out.sum().backward()
    assert out.isfinite().all()


def test_a_fused_activation_acts_on_the_new_norm():
    fused = timm.layers.BatchNormAct2d(4, act_layer=nn.ReLU)
    converted, plain = convert_norm(fused, "group", num_groups=2), nn.GroupNorm(2, 4)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(converted(x), plain(x).relu())
    again = convert_norm(converted, "layer")
    torch.testing.assert_close(again(x), nn.GroupNorm(1, 4)(x).relu())


def test_without_a_norm_an_activation_does_not_overwrite_the_skip_connection():
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.norm(x))

    x = torch.randn(4, 3)
    torch.testing.assert_close(convert_norm(PreActivation(), "none")(x.clone()), x + x.relu())


def test_no_norm_can_be_given_a_norm_again():
    network = convert_norm(convert_norm(small_network(), "none"), "online")
    assert isinstance(network[1], OnlineNorm)
    assert network[1].weight.eq(1).all()


def test_a_shared_norm_stays_shared_and_a_lone_norm_is_returned():
    norm = nn.BatchNorm2d(4)
    network = convert_norm(nn.Sequential(norm, nn.Sequential(norm)), "online")
    assert network[0] is network[1][0]
    assert isinstance(convert_norm(nn.BatchNorm2d(4), "online"), OnlineNorm)


def test_norms_that_are_not_of_the_batch_kind_stay():
    network = nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.LayerNorm(4))
    convert_norm(network, "online")
    assert type(network[0]) is nn.GroupNorm
    assert type(network[2]) is nn.LayerNorm


@pytest.mark.parametrize(
    ("network", "norm", "kwargs", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            "online",
            {},
            r"model\.norm=online: Sequential has no norm to convert",
        ),
        (
            nn.Sequential(nn.LayerNorm(4)),
            "group",
            {},
            r"model\.norm=group: Sequential has no norm to convert",
        ),
        (
            nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(12)),
            "group",
            {"num_groups": 8},
            r"model\.norm_kwargs\.num_groups must divide 4, .* got 8: 1 has 12",
        ),
        (nn.BatchNorm2d(4), "onlin", {}, r"model\.norm must be one of .* did you mean online"),
        (
            nn.BatchNorm2d(4),
            "online",
            {"alpha_fw": 0.9},
            r"norm_kwargs\.alpha_fw=0\.9: .* did you mean alpha_fwd",
        ),
        (
            nn.BatchNorm2d(4),
            "online",
            {"alpha_fwd": 1.5},
            r"norm_kwargs\.alpha_fwd must be in \[0, 1\), got 1\.5",
        ),
        (nn.BatchNorm2d(4), "online", {"ecm": "lss"}, r"norm_kwargs\.ecm must be one of ls, ac, none"),
        (nn.BatchNorm2d(4), "online", {"num_features": 3}, r"norm_kwargs\.num_features=3"),
        (
            nn.BatchNorm2d(4),
            "none",
            {"eps": 1e-3},
            r"norm_kwargs\.eps=0\.001: model\.norm=none has no such option",
        ),
        (
            nn.BatchNorm2d(4),
            "group",
            {"num_groups": 0},
            r"norm_kwargs\.num_groups must be in \[1, inf\), got 0",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(network, norm, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        convert_norm(network, norm, **kwargs)


def test_a_refused_conversion_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(12))
    with pytest.raises(ConfigError):
        convert_norm(network, "group", num_groups=8)
    assert all(type(norm) is nn.BatchNorm2d for norm in network)


def test_options_are_checked_without_a_network():
    assembled()
    assembled(norm="group", norm_kwargs={"num_groups": 16})
    for values, message in (
        ({"norm": "grup"}, r"model\.norm must be .* did you mean group"),
        ({"norm": "group", "norm_kwargs": {"groups": 16}}, r"model\.norm_kwargs\.groups=16: .*num_groups"),
        ({"norm_kwargs": {"num_groups": 16}}, r"model\.norm_kwargs\.num_groups=16 needs model\.norm"),
    ):
        with pytest.raises(ConfigError, match=message):
            assembled(**values)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_file_sets_its_norm_and_records_it(technique):
    config = OmegaConf.load(f"cli_configs/technique/{technique}.yaml")
    assert config.model.norm == TECHNIQUES[technique]
    record = dict(config.techniques[technique])
    assert record.pop("model.norm") == config.model.norm
    kwargs = dict(config.model.get("norm_kwargs") or {})
    assert record == {f"model.norm_kwargs.{name}": value for name, value in kwargs.items()}
    assembled(norm=config.model.norm, norm_kwargs=kwargs or None)


# The norms themselves


def test_group_layer_and_instance_norm_are_torchs():
    x = torch.randn(3, 6, 5, 5)
    torch.testing.assert_close(GroupNorm(6, num_groups=3)(x), F.group_norm(x, 3))
    torch.testing.assert_close(LayerNorm(6)(x), F.layer_norm(x, x.shape[1:]))
    torch.testing.assert_close(InstanceNorm(6)(x), F.instance_norm(x))
    assert isinstance(LayerNorm(6), nn.GroupNorm)
    with pytest.raises(ValueError, match="instance norm needs"):
        InstanceNorm(6)(torch.randn(3, 6))


@pytest.mark.parametrize("n", [4, 8, 11, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghost_batch_norm_is_batch_norm_of_each_part(n, momentum):
    ghost = GhostBatchNorm(3, ghost_size=4, momentum=momentum).double()
    nn.init.normal_(ghost.weight)
    x = torch.randn(n, 3, 2, 2, dtype=torch.float64)
    out = ghost(x)
    parts = -(-n // 4)
    size, more = divmod(n, parts)
    first = more * (size + 1)
    members = [torch.arange(i, first, more) for i in range(more)]
    members += [torch.arange(first + i, n, parts - more) for i in range(parts - more)]
    assert max(map(len, members)) <= 4
    expected = torch.empty_like(x)
    single = nn.BatchNorm2d(3, momentum=1.0).double()
    single.weight = ghost.weight
    means, variances = [], []
    for rows in members:
        expected[rows] = single(x[rows])
        means.append(single.running_mean.clone())
        variances.append(single.running_var.clone())
    torch.testing.assert_close(out, expected)
    rate = 1.0 if momentum is None else momentum
    torch.testing.assert_close(ghost.running_mean, rate * torch.stack(means).mean(0))
    torch.testing.assert_close(ghost.running_var, 1 - rate + rate * torch.stack(variances).mean(0))
    ghost.eval()
    plain = F.batch_norm(x, ghost.running_mean, ghost.running_var, ghost.weight, ghost.bias)
    torch.testing.assert_close(ghost(x), plain)


@pytest.mark.parametrize("chosen", range(3))
def test_switch_norm_with_all_weight_on_one_is_instance_layer_or_batch_norm(chosen):
    norm = SwitchNorm(6).double()
    with torch.no_grad():
        norm.mean_weight[chosen] = norm.var_weight[chosen] = 60.0
        norm.weight.normal_()
        norm.bias.normal_()
    x = 2 * torch.randn(4, 6, 5, 5, dtype=torch.float64) + 1
    limit = (
        F.instance_norm(x, weight=norm.weight, bias=norm.bias),
        F.group_norm(x, 1, norm.weight, norm.bias),
        F.batch_norm(x, None, None, norm.weight, norm.bias, training=True),
    )[chosen]
    torch.testing.assert_close(norm(x), limit)


def test_switch_norm_and_its_gradient_weigh_the_statistics_and_running_ones_are_the_batchs():
    norm = SwitchNorm(3, momentum=0.2).double()
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor([0.3, -1.0, 0.5]))
        norm.var_weight.copy_(torch.tensor([1.0, 0.0, -0.4]))
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + torch.arange(3).view(3, 1, 1)
    x.requires_grad_()

    def expected(batch_mean: Tensor, batch_var: Tensor) -> Tensor:
        axes = [(2, 3), (1, 2, 3)]
        means = [x.mean(a, keepdim=True) for a in axes] + [batch_mean]
        variances = [x.var(a, correction=0, keepdim=True) for a in axes] + [batch_var]
        mean = sum(w * m for w, m in zip(norm.mean_weight.softmax(0), means, strict=True))
        var = sum(w * v for w, v in zip(norm.var_weight.softmax(0), variances, strict=True))
        scale, shift = norm.weight.view(3, 1, 1), norm.bias.view(3, 1, 1)
        return (x - mean) / (var + norm.eps).sqrt() * scale + shift

    def same(out: Tensor, definition: Tensor) -> None:
        torch.testing.assert_close(out, definition)
        into, above = (x, *norm.parameters()), torch.randn(x.shape, dtype=x.dtype)
        gradients = (torch.autograd.grad(y, into, above) for y in (out, definition))
        torch.testing.assert_close(*gradients)

    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    same(norm(x), expected(mean, var))
    torch.testing.assert_close(norm.running_mean, 0.2 * mean.flatten())
    torch.testing.assert_close(norm.running_var, 0.8 + 0.2 * var.flatten())
    norm.eval()
    running = norm.running_mean.view(1, 3, 1, 1), norm.running_var.view(1, 3, 1, 1)
    same(norm(x), expected(*running))


def test_none_is_the_identity():
    x = torch.randn(3, 4)
    assert NoNorm(4)(x) is x
