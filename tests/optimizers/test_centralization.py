"""Gradient centralization: which gradients, what is left of them, and when in the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from stages import assembled
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from crucible.options import ConfigError
from optimizers.centralization import centralise_gradients, centralised_weights
from optimizers.sam import Sam, sam_closure


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 4))  # a parameter of no convolution
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)  # one input per output
        self.norm = nn.LayerNorm((4, 4, 4))
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.head = nn.Linear(64, 3)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("conv", {"conv.weight"}),
        ("all", {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}),
    ],
)
def test_the_weights_are_told_by_module_type(which, expected):
    network = Network()
    names = {p: name for name, p in network.named_parameters()}
    assert {names[w] for w in centralised_weights(network, which)} == expected


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_outputs_gradient_loses_its_mean(dim, dtype):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](4, 6, 3).to(dtype)
    gradient = torch.randn(conv.weight.shape, dtype=torch.float64) + 3
    conv.weight.grad = gradient.to(dtype)
    conv.bias.grad = torch.ones_like(conv.bias)
    rows = conv.weight.grad.double().flatten(1)
    expected = (rows - rows.mean(1, keepdim=True)).view_as(gradient)
    held = conv.weight.grad
    centralise_gradients(centralised_weights(conv, "all"))
    assert conv.weight.grad is held
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(held.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(conv.bias.grad, torch.ones_like(conv.bias))


def test_channels_last_gradients_keep_their_layout():
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.grad = torch.randn_like(conv.weight).to(memory_format=torch.channels_last)
    centralise_gradients(centralised_weights(conv, "conv"))
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv.weight.grad.mean((1, 2, 3)), torch.zeros(6))


def test_a_weight_without_a_gradient_is_passed_over():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[0].weight.grad = torch.ones(3, 3)
    centralise_gradients(centralised_weights(network, "all"))
    assert network[0].weight.grad.abs().max() == 0
    assert network[1].weight.grad is None


@pytest.mark.parametrize(
    ("network", "which", "message"),
    [
        (nn.Linear(3, 3), "conv", "model.gradient_centralization=conv: the network has no trainable conv"),
        (nn.BatchNorm2d(3), "all", "model.gradient_centralization=all: the network has no trainable conv"),
        (nn.Conv2d(3, 3, 3).requires_grad_(False), "all", "no trainable convolution or linear layer"),
    ],
)
def test_a_network_without_such_weights_is_refused(network, which, message):
    with pytest.raises(ConfigError, match=message):
        centralised_weights(network, which)


def test_another_value_is_refused():
    with pytest.raises(ConfigError, match=r"model.gradient_centralization must be one of all, conv or null"):
        assembled(gradient_centralization="linear")


# The step: unscale, statistics, centralise, clip

CLIP, SCALE = 0.1, 2.0**10


class Model(LightningModule):
    """A LightningModule that centralises in `on_before_optimizer_step`, as BaseModel does."""

    step_pass = 1

    def __init__(self, sam: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        self.sam = sam
        self.calls = 0

    def reseed(self) -> None:
        """Nothing random is in it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self.sam:
            optimizer_closure = sam_closure(self, optimizer_closure, Sam(sam=True))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls += 1
        centralise_gradients(centralised_weights(self, "all"))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Statistics(Callback):
    """What a gradient-statistics callback sees: the raw, unscaled gradient."""

    def __init__(self) -> None:
        self.raw: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.raw = {n: p.grad.clone() for n, p in pl_module.net.named_parameters()}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sam", [False, True])
def test_it_acts_once_a_step_on_the_unscaled_gradient_before_clipping(scaled, sam):
    model, statistics = Model(sam), Statistics()
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    plugin.forward_context = torch.enable_grad  # the scaler alone, in float64
    Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=CLIP,
        callbacks=[statistics],
        plugins=[plugin] if scaled else None,
    ).fit(model, DataLoader(TensorDataset(x, torch.arange(8) % 3), batch_size=8))
    expected = {
        n: g - g.mean(1, keepdim=True) if n.endswith("weight") else g for n, g in statistics.raw.items()
    }
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert norm > CLIP
    assert model.calls == 1
    for name, p in model.net.named_parameters():
        torch.testing.assert_close(before[name] - p, expected[name] * CLIP / norm, rtol=1e-4, atol=1e-9)
    if not sam:
        plain = Model(False)
        F.cross_entropy(plain.net(x), torch.arange(8) % 3).backward()
        for name, p in plain.net.named_parameters():
            torch.testing.assert_close(statistics.raw[name], p.grad, rtol=1e-10, atol=1e-12)


def test_weight_decay_stands_behind_it_as_in_the_paper():
    """The mean of an output's weights decays; in the authors' SGD, which centralises the L2 term too, it stays."""
    network = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.5)
    before = network.weight.detach().clone()
    network.weight.grad = torch.randn(3, 6)
    centralised = network.weight.grad - network.weight.grad.mean(1, keepdim=True)
    centralise_gradients(centralised_weights(network, "all"))
    optimizer.step()
    torch.testing.assert_close(network.weight, before - 0.1 * (centralised + 0.5 * before))
    torch.testing.assert_close(network.weight.mean(1), 0.95 * before.mean(1))
