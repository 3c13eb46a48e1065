"""Layer-wise learning-rate decay: what the layers are, their rates, and how they compose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stages import optimizer_of
from torch import nn

from crucible.options import ConfigError
from models.dynamic_resnet import ResNet18
from optimizers.schedules import ScheduleOptions, build_scheduler

DECAY, LR = 0.5, 0.08


def build(module: nn.Module, **values: Any) -> torch.optim.Optimizer:
    return optimizer_of(module, **{"lr": LR, "layer_decay": DECAY, **values})


def scales(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rate relative to `LR`, by name of the parameter."""
    names = {p: name for name, p in module.named_parameters()}
    return {names[p]: group["lr"] / LR for group in optimizer.param_groups for p in group["params"]}


class Vision(nn.Module):
    """The shape of many networks: own parameters, a norm first, a list of blocks, a last norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.BatchNorm2d(3)
        self.patch = nn.Conv2d(3, 4, 2)
        self.position = nn.Parameter(torch.zeros(1, 4, 4))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(4, 1, 8) for _ in range(2)])
        self.norm = nn.LayerNorm((2, 4))
        self.head = nn.Linear(4, 3)


def test_of_a_generic_network_the_layers_are_its_children_and_the_blocks_of_its_lists():
    network = Vision()
    found = scales(network, build(network))
    expected = {
        "input_norm": 3,
        "patch": 3,
        "position": 3,
        "blocks.0": 2,
        "blocks.1": 1,
        "norm": 1,
        "head": 0,
    }
    for name, scale in found.items():
        (depth,) = [d for prefix, d in expected.items() if name.startswith(prefix)]
        assert scale == pytest.approx(DECAY**depth), name


@pytest.mark.parametrize("norm", [None, "group", "switchable"])
def test_our_resnet_has_the_layers_of_timms(norm):
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("resnet18", num_classes=10)
    names = {p: name for name, p in theirs.named_parameters()}
    reference = {
        names[p].replace("downsample", "shortcut"): group["lr_scale"]
        for group in param_groups_layer_decay(theirs, layer_decay=DECAY)
        for p in group["params"]
    }
    ours = ResNet18(num_classes=10, norm=norm)
    ours.convert()
    found = scales(ours.model, build(ours))
    assert len(set(found.values())) == 10  # stem, 8 blocks, head
    for name, scale in found.items():
        key = name.replace("downsample", "shortcut")
        if key in reference:
            assert scale == pytest.approx(reference[key]), name
    assert "layer3.1.conv2.weight" in found.keys() & reference.keys()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
@pytest.mark.parametrize("undecay_norm", [False, True])
def test_networks_of_timm_are_grouped_as_timm_groups_them(name, undecay_norm):
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    network = timm.create_model(name, num_classes=10)
    names = {p: n for n, p in network.named_parameters()}
    expected = {
        names[p]: group["lr_scale"]
        for group in param_groups_layer_decay(network, layer_decay=DECAY)
        for p in group["params"]
    }
    wrapped = nn.ModuleDict({"criterion": nn.CrossEntropyLoss(), "model": network})  # as BaseModel holds it
    found = scales(network, build(wrapped, undecay_norm=undecay_norm))
    assert found == pytest.approx(expected)


def test_the_head_comes_first_and_has_the_learning_rate_itself():
    network = Vision()
    optimizer = build(network)
    assert optimizer.param_groups[0]["params"] == [network.head.weight, network.head.bias]
    assert optimizer.param_groups[0]["lr"] == LR


def test_it_composes_with_undecay_norm():
    network = Vision()
    optimizer = build(network, undecay_norm=True, weight_decay=0.01)
    rates = scales(network, optimizer)
    assert rates == pytest.approx(scales(network, build(network)))
    names = {p: name for name, p in network.named_parameters()}
    decayed = {names[p] for g in optimizer.param_groups if g["weight_decay"] == 0.01 for p in g["params"]}
    spared = {names[p] for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert {"patch.weight", "position", "head.weight"} < decayed
    assert {"patch.bias", "norm.weight", "norm.bias", "head.bias"} < spared
    assert decayed | spared == set(names.values())


def test_the_schedule_scales_every_layers_own_rate():
    network = Vision()
    optimizer = build(network)
    first = [group["lr"] for group in optimizer.param_groups]
    scheduler = build_scheduler(optimizer, ScheduleOptions(warmstart=0), epochs=4, steps_per_epoch=1)
    for epoch in range(1, 5):
        optimizer.step()
        scheduler["scheduler"].step()
        factor = optimizer.param_groups[0]["lr"] / LR
        assert factor < 1 - epoch / 10
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([factor * lr for lr in first])


def test_a_layer_moves_by_its_own_rate():
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = build(network, weight_decay=0.0)
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for start, p, rate in zip(before, network.parameters(), (LR * DECAY, LR), strict=True):
        torch.testing.assert_close(start - p, torch.full((2, 2), rate))


def test_frozen_layers_still_count():
    network = Vision()
    network.blocks.requires_grad_(False)
    found = scales(network, build(network))
    assert found["patch.weight"] == pytest.approx(DECAY**3)
    assert not any(name.startswith("blocks") for name in found)


def test_off_gives_the_groups_of_before():
    network = Vision()
    (group,) = build(network, layer_decay=1.0).param_groups
    assert group["lr"] == LR
    assert group["params"] == list(network.parameters())


def head_only() -> nn.Module:
    network = Vision().requires_grad_(False)
    network.head.requires_grad_(True)
    return network


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), head_only()])
def test_one_layer_is_refused(network):
    with pytest.raises(
        ConfigError, match=r"model.layer_decay=0.5: all trainable parameters are in one layer"
    ):
        build(network)


@pytest.mark.parametrize("value", [0.0, 1.1])
def test_a_decay_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"model.layer_decay must be in \(0, 1\]"):
        build(Vision(), layer_decay=value)
