"""The optimizer by name, its options, and its parameter groups."""

from __future__ import annotations

import copy

import pytest
import torch
from stages import optimizer_of
from torch import Tensor, nn

from crucible.options import ConfigError, read_options
from optimizers import OptimizerOptions, build_optimizer

CLASSIC = ["SGD", "Adam", "AdamW", "Rmsprop", "Madgrad"]
TIMM = ["lamb", "lion", "adopt", "muon", "sgdw", "nadamw", "adafactor", "larc"]
RATES = {"SGD": 0.02, "sgdw": 0.02, "larc": 1.0}
GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(6, 6, generator=GENERATOR)


class Bowl(nn.Module):
    """A quadratic in a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self) -> Tensor:
        return (self.weight - A).square().mean()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.norm = nn.LayerNorm((4, 8, 8))  # parameters of three dimensions
        self.abnormal = nn.Linear(4, 4)  # a name that only looks like a norm's
        self.scale = nn.Parameter(torch.ones(4))
        self.norm_table = nn.Parameter(torch.ones(2, 4))


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = module()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", [*CLASSIC, "sgd", "ADAMW", *TIMM])
def test_every_name_reduces_a_quadratic(name):
    bowl = Bowl()
    options = OptimizerOptions(optimizer=name, lr=RATES.get(name, 0.02), weight_decay=0.0)
    optimizer = build_optimizer(bowl, options)
    losses = [step(bowl, optimizer) for _ in range(100)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", [*CLASSIC, *TIMM])
def test_a_resumed_copy_goes_on_in_lock_step(name):
    bowl = Bowl()
    options = OptimizerOptions(optimizer=name, lr=0.02)
    optimizer = build_optimizer(bowl, options)
    for _ in range(3):
        step(bowl, optimizer)
    other = copy.deepcopy(bowl)
    resumed = build_optimizer(other, options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(bowl, optimizer)
        step(other, resumed)
        assert torch.equal(bowl.weight, other.weight)


def by_hand(name: str, weight: Tensor, lr: float, decay: float, steps: int) -> Tensor:
    """The textbook rule in float64, on the gradient of `Bowl`."""
    w, first, second = weight.double(), torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    for t in range(1, steps + 1):
        g = 2 * (w - A.double()) / 36
        if name == "AdamW":
            w = w * (1 - lr * decay)
        else:
            g = g + decay * w
        if name == "SGD":
            first = 0.9 * first + g
            w = w - lr * first
        elif name == "nesterov":
            first = 0.9 * first + g
            w = w - lr * (g + 0.9 * first)
        else:
            first = 0.9 * first + 0.1 * g
            second = 0.999 * second + 0.001 * g**2
            w = w - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("name", ["SGD", "nesterov", "Adam", "AdamW"])
def test_steps_follow_the_textbook(name):
    bowl = Bowl().double()
    nesterov = name == "nesterov"
    optimizer = "SGD" if nesterov else name
    options = OptimizerOptions(optimizer=optimizer, lr=0.3, nesterov=nesterov, weight_decay=0.05)
    expected = by_hand(name, bowl.weight.detach(), 0.3, 0.05, steps=5)
    built = build_optimizer(bowl, options)
    for _ in range(5):
        step(bowl, built)
    torch.testing.assert_close(bowl.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_madgrad_is_that_of_its_authors():
    madgrad = pytest.importorskip("madgrad")
    ours, theirs = Bowl().double(), Bowl().double()
    built = build_optimizer(ours, OptimizerOptions(optimizer="Madgrad", lr=0.05, weight_decay=0.01))
    reference = madgrad.MADGRAD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        step(ours, built)
        step(theirs, reference)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)


def test_momentum_is_the_usual_unless_given():
    def momentum(**values: object) -> object:
        optimizer = build_optimizer(Bowl(), read_options(OptimizerOptions, values))
        return optimizer.param_groups[0].get("momentum")

    assert [momentum(optimizer=name) for name in CLASSIC] == [0.9, None, None, 0.9, 0.9]
    assert momentum(momentum=0.5) == 0.5


def test_further_arguments_reach_the_optimizer():
    options = OptimizerOptions(optimizer="adamw", optimizer_kwargs={"betas": [0.8, 0.9], "eps": 1e-6})
    group = build_optimizer(Bowl(), options).param_groups[0]
    assert list(group["betas"]) == [0.8, 0.9]
    assert group["eps"] == 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "AdmW"}, "model.optimizer='AdmW' is unknown; did you mean AdamW?"),
        ({"optimizer": "adahessian"}, "model.optimizer=adahessian needs second derivatives"),
        ({"optimizer": "Adam", "nesterov": True}, "model.nesterov=True: Adam has no nesterov"),
        ({"optimizer": "AdamW", "momentum": 0.9}, "model.momentum=0.9: AdamW has no momentum"),
        ({"nesterov": True, "momentum": 0.0}, "model.optimizer=SGD refuses its arguments: Nesterov"),
        (
            {"optimizer_kwargs": {"dampenning": 0.1}},
            "model.optimizer_kwargs.dampenning=0.1: SGD has no such argument; did you mean dampening?",
        ),
        ({"optimizer_kwargs": {"lr": 0.1}}, "model.optimizer_kwargs.lr=0.1: this is set as model.lr"),
        (
            {"optimizer": "Adam", "optimizer_kwargs": {"betas": [2.0, 0.9]}},
            "model.optimizer=Adam refuses its arguments: Invalid beta",
        ),
        ({"lr": 0.0}, r"model.lr must be in \(0, inf\), got 0.0"),
        ({"momentum": 1.0}, "model.momentum must be .*, got 1.0"),
        ({"weight_decay": -1e-4}, r"model.weight_decay must be in \[0, inf\), got -0.0001"),
    ],
)
def test_what_cannot_be_honoured_is_refused_when_the_options_are_read(values, message):
    with pytest.raises(ConfigError, match=message):
        read_options(OptimizerOptions, values)


def test_undecay_norm_spares_norms_biases_and_vectors_by_type_and_shape():
    network = Residual()
    groups = optimizer_of(network, weight_decay=0.01, undecay_norm=True).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    names = {p: name for name, p in network.named_parameters()}
    decayed, spared = ([names[p] for p in group["params"]] for group in groups)
    assert decayed == ["norm_table", "conv.weight", "shortcut.0.weight", "abnormal.weight"]
    assert spared == [
        "scale",
        "conv.bias",
        "shortcut.1.weight",
        "shortcut.1.bias",
        "norm.weight",
        "norm.bias",
        "abnormal.bias",
    ]


def test_without_undecay_norm_everything_decays_in_one_group():
    network = Residual()
    (group,) = build_optimizer(network, OptimizerOptions(weight_decay=0.01)).param_groups
    assert group["weight_decay"] == 0.01
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]


@pytest.mark.parametrize("undecay_norm", [False, True])
def test_frozen_parameters_are_left_out(undecay_norm):
    network = Residual()
    network.shortcut.requires_grad_(False)
    optimizer = optimizer_of(network, undecay_norm=undecay_norm)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters() if p.requires_grad}


def test_an_empty_group_is_left_out():
    (group,) = optimizer_of(nn.BatchNorm2d(3), undecay_norm=True).param_groups
    assert group["weight_decay"] == 0.0


def test_nothing_trainable_is_refused():
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerOptions())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_on_cuda_the_step_is_fused_and_leaves_unscaling_to_the_scaler(name):
    bowl, other = Bowl().cuda(), Bowl()
    other.load_state_dict(bowl.state_dict())
    target = A.cuda()
    fused = build_optimizer(bowl, OptimizerOptions(optimizer=name, lr=0.02))
    assert fused.param_groups[0]["fused"]
    plain = build_optimizer(other, OptimizerOptions(optimizer=name, lr=0.02))
    scaler = torch.amp.GradScaler("cuda")
    for _ in range(3):
        fused.zero_grad()
        scaler.scale((bowl.weight - target).square().mean()).backward()
        scaler.unscale_(fused)
        step(other, plain)
        torch.testing.assert_close(bowl.weight.grad.cpu(), other.weight.grad, rtol=1e-4, atol=1e-6)
        scaler.step(fused)
        scaler.update()
        torch.testing.assert_close(bowl.weight.detach().cpu(), other.weight.detach(), rtol=1e-4, atol=1e-5)
