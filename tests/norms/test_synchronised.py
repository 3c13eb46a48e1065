"""What `trainer.sync_batchnorm` makes of a network: the norms of all processes, and else the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from technique_runs import composed
from torch import nn

from crucible.corrections import versions_of
from crucible.seams import insert_seams
from lab.build import build_trainer
from models.dynamic_resnet import ResNet18
from models.timm import TimmFamily
from norms import Norm, SynchronisedNorms, convert_norm

TIMM = ["efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "ghostnet_050", "resnet18"]


def settled(network: nn.Module) -> nn.Module:
    """With statistics that are no defaults, so that each norm does something in evaluation."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


@torch.no_grad()
def output(network: nn.Module) -> torch.Tensor:
    return network.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("name", TIMM)
def test_a_network_computes_the_same_before_within_and_after(name: str, norm: str | None) -> None:
    network = timm.create_model(name, num_classes=5)
    network = settled(network if norm is None else convert_norm(network, norm))
    expected, keys = output(network), network.state_dict().keys()
    sync = SynchronisedNorms()
    within = sync.apply(network)
    assert within.state_dict().keys() == keys
    norms = [m for m in within.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    torch.testing.assert_close(output(within), expected)
    for module in norms:
        module.running_mean.add_(0.1)
    moved = output(within)
    after = sync.revert(within)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in after.modules())
    torch.testing.assert_close(output(after), moved)


class Mine(nn.BatchNorm2d):
    """With a forward pass of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_norms_that_are_something_else_stay_what_they_are() -> None:
    model: Any = ResNet18(num_classes=5, norm="ghost")
    model.convert()
    network = nn.Sequential(model.model, nn.Identity(), Mine(3))
    before = [type(m) for m in network.modules()]
    assert [type(m) for m in SynchronisedNorms().apply(network).modules()] == before


def test_a_seam_behind_a_norm_stays() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)
    )
    seams = insert_seams(network, 2)
    within = SynchronisedNorms().apply(network)
    assert isinstance(within[1], nn.SyncBatchNorm)  # type: ignore[index]
    for seam in seams:
        seam.set(0.5, torch.tensor([1, 0]))
    (hook,) = within[1]._forward_hooks.values()  # type: ignore[index]
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(hook(within[1].train(), (), x), (x + x.flip(0)) / 2)  # type: ignore[index]


def test_a_trainer_of_several_processes_has_them_where_it_is_asked_to(tmp_path: Path) -> None:
    config = composed()
    for sync, devices, has in [(True, 2, True), (False, 2, False), (True, 1, False)]:
        config["trainer"].update(sync_batchnorm=sync, devices=devices, strategy="ddp")
        trainer: Any = build_trainer(config, tmp_path, [], [])
        assert isinstance(trainer.strategy._layer_sync, SynchronisedNorms) == has


@pytest.mark.parametrize(
    ("owner", "norm", "devices", "concerned"),
    [
        (Norm, "ghost", 2, True),
        (Norm, "ghost", 1, False),
        (Norm, None, 2, False),
        (TimmFamily, None, 2, True),
    ],
)
def test_only_runs_whose_norms_were_others_are_other_runs(
    owner: Any, norm: str | None, devices: int, concerned: bool
) -> None:
    trainer = {"sync_batchnorm": True, "devices": devices, "num_nodes": 1, "accelerator": "gpu"}
    config = {"model": {"norm": norm}, "trainer": trainer}
    assert ("trainer.sync_batchnorm" in versions_of(owner.corrections, config)) == concerned
