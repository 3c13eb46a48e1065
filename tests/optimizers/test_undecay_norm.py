"""What `undecay_norm` spares: norms and vectors, and what a network exempts itself, which is another version."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from stages import optimizer_of
from timm.optim import param_groups_weight_decay
from torch import nn

from crucible.corrections import versions_of
from models.base_model import BaseModel
from optimizers.groups import UndecayNorm

EXEMPTING = (
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "crossvit_tiny_240", "efficientformer_l1",
    "efficientformerv2_s0", "eva02_tiny_patch14_224", "gcvit_xxtiny", "levit_128s", "maxvit_tiny_tf_224",
    "mvitv2_tiny", "nest_tiny", "pit_ti_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "test_vit",
    "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "twins_svt_small", "vit_tiny_patch16_224", "volo_d1_224",
    "xcit_nano_12_p16_224",
)  # fmt: skip
OTHERS = (
    "convmixer_768_32", "convnext_atto", "davit_tiny", "dm_nfnet_f0", "edgenext_xx_small", "efficientnet_b0",
    "focalnet_tiny_srf", "ghostnet_100", "mixer_s32_224", "mobilevit_xxs", "poolformer_s12", "regnety_002",
    "repvit_m1", "resnest14d", "resnet18",
)  # fmt: skip
IN_THE_QUICK_SUITE = ("levit_128s", "pit_ti_224", "resnet18", "test_vit", "xcit_nano_12_p16_224")
assert len(EXEMPTING + OTHERS) == 37


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def spared(module: nn.Module) -> set[nn.Parameter]:
    groups = optimizer_of(module, weight_decay=0.1, undecay_norm=True).param_groups
    return {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}


def version(target: str, **options: Any) -> int:
    model = {"_target_": target, "undecay_norm": True, "num_classes": 10, "seed": 0, **options}
    return versions_of(UndecayNorm.corrections, {"model": model}).get("model.undecay_norm", 1)


@pytest.mark.parametrize(
    "name",
    [
        n if n in IN_THE_QUICK_SUITE else pytest.param(n, marks=pytest.mark.nightly)
        for n in EXEMPTING + OTHERS
    ],
)
def test_networks_of_timm_are_decayed_as_timm_decays_them(name: str) -> None:
    network = build(name)
    own = getattr(network, "no_weight_decay", set)()
    theirs = param_groups_weight_decay(network, 0.1, no_weight_decay_list=own)
    reference = {p for group in theirs if group["weight_decay"] == 0 for p in group["params"]}
    wrapped = nn.ModuleDict({"criterion": nn.CrossEntropyLoss(), "model": network})  # as BaseModel holds it
    names = {p: n for n, p in network.named_parameters()}
    assert {names[p] for p in spared(wrapped)} == {names[p] for p in reference}
    # only where the network exempts something are the numbers others than before
    assert version("models.timm.TimmModel", type=name) == (2 if name in EXEMPTING else 1)


class Table(nn.Module):
    def __init__(self, *exempt: str) -> None:
        super().__init__()
        self.table, self.weight = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3, 3))
        self.exempt = exempt

    def no_weight_decay(self) -> set[str]:
        return set(self.exempt)


def test_of_networks_within_one_another_the_outermost_says_what_is_exempt() -> None:
    inner, outer = Table("weight"), Table("part.tab*")
    outer.part = inner
    beside = Table("table")
    assert spared(nn.ModuleList([outer, beside])) == {inner.table, beside.table}


class Exempting(BaseModel):
    """An own network, whose constructor looks at its weights."""

    def __init__(self, exempt: str = "table", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = Table(exempt)
        assert float(self.model.table.sum()) == 0.0


@pytest.mark.parametrize(("exempt", "expected"), [("table", 2), ("nothing", 1)])
def test_own_networks_are_of_the_version_that_they_need_and_no_random_number_is_drawn(
    exempt: str, expected: int
) -> None:
    state = torch.get_rng_state()
    assert version(f"{__name__}.Exempting", exempt=exempt) == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"undecay_norm": False}, {"pretrained": False, "init_from": "file.pt"}])
def test_runs_of_unchanged_numbers_keep_their_version(options: dict[str, Any]) -> None:
    assert version("models.dynamic_resnet.ResNet18", **options) == 1
