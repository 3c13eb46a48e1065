"""timm's networks by name: what reaches them, and what they cannot honour."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
import yaml
from timm.layers import DropPath
from torch import nn

import models.timm
from crucible.options import ConfigError, check_arguments, signature_options
from models.base_model import BaseModel
from models.convnext import ConvNext
from models.efficientnetv2 import EfficientNetV2
from models.timm import GhostNet, MobileNet, RegNet, ResNeSt, TimmModel

CONFIGS = Path(models.timm.__file__).parents[1] / "cli_configs" / "model"


@pytest.mark.parametrize(("task", "outputs"), [("classification", 4), ("regression", 1)])
def test_the_network_fits_the_data(task: Any, outputs: int) -> None:
    model = TimmModel(type="test_resnet", task=task, num_classes=4, input_channels=2)
    assert model(torch.randn(2, 2, 32, 32)).shape == (2, outputs)


def test_it_is_timms_own_network() -> None:
    ours = TimmModel(type="test_resnet", num_classes=4).eval()
    theirs = timm.create_model("test_resnet", num_classes=4).eval()
    theirs.load_state_dict(ours.model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def drop_rates(network: nn.Module) -> list[float]:
    return [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]


def test_stochastic_depth_is_the_last_blocks_drop_path() -> None:
    model = TimmModel(type="test_vit", stochastic_depth=0.3)
    assert max(drop_rates(model.model)) == pytest.approx(0.3)
    assert not drop_rates(TimmModel(type="test_vit").model)


def test_null_keeps_the_networks_own_rate_and_zero_turns_it_off() -> None:
    own = "swin_tiny_patch4_window7_224"
    with torch.device("meta"):
        assert max(drop_rates(TimmModel(type=own).model)) == pytest.approx(0.1)
        assert not drop_rates(TimmModel(type=own, stochastic_depth=0.0).model)


@pytest.mark.parametrize("name", ["test_vit", "resnet10t"])  # a dropout module; F.dropout
def test_dropout_changes_the_training_outputs_only(name: str) -> None:
    kwargs = {"img_size": 32} if name == "test_vit" else None
    model = TimmModel(type=name, resnet_dropout=0.5, timm_kwargs=kwargs)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_further_arguments_reach_the_network() -> None:
    model = TimmModel(type="test_vit", timm_kwargs={"img_size": 32})
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.type=resnet81: .*did you mean .*resnet18"):
        TimmModel(type="resnet81")
    with pytest.raises(ConfigError, match=r"model\.type=zzz: .*timm\.list_models"):
        TimmModel(type="zzz")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"input_dim": 1}, "data.input_dim=1"),
        ({"input_dim": 3}, "data.input_dim=3"),
        (
            {"type": "vgg11", "stochastic_depth": 0.1},
            "model.stochastic_depth=0.1: timm's vgg11 does not take it",
        ),
        ({"timm_kwargs": {"colour": 1}}, "model.timm_kwargs.colour=1"),
        ({"timm_kwargs": {"num_classes": 3}}, "set data.num_classes instead"),
        ({"timm_kwargs": {"drop_path_rate": 0.1}}, "set model.stochastic_depth instead"),
        ({"type": "resnet18.no_such_tag"}, "model.type=resnet18.no_such_tag"),
        ({"type": "efficientnetv2_s", "pretrained": True}, "no weights for model.type=efficientnetv2_s"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        TimmModel(**options)
    assert named in str(caught.value)


@pytest.mark.parametrize("option", ["stochastic_depth", "resnet_dropout"])
def test_a_rate_that_is_taken_but_has_no_effect_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: nn.Sequential(nn.Dropout(0.0)))
    with pytest.raises(ConfigError, match=rf"model\.{option}=0\.1 has no effect"):
        TimmModel(**{option: 0.1})


def test_weights_that_cannot_be_fetched_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match=r"^model\.pretrained=true: .*resnet18 \(no route\)$"):
        TimmModel(pretrained=True)


@pytest.mark.parametrize("option", ["squeeze_excitation", "zero_init_residual", "cifar_size"])
def test_options_of_other_families_are_unknown(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{option}"):
        TimmModel(type="test_resnet", **{option: True})


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_compiles_without_a_graph_break(training: bool) -> None:
    torch._dynamo.reset()
    network = TimmModel(type="test_resnet", stochastic_depth=0.2, resnet_dropout=0.1).model.train(training)
    network.compile(fullgraph=True, backend="eager")
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 10)


# EfficientNetV2


@pytest.mark.parametrize(
    ("size", "parameters", "dropout"),
    [("S", 21_458_488, 0.2), ("M", 54_139_356, 0.3), ("L", 118_515_272, 0.4)],
)
def test_efficientnetv2_sizes(size: Any, parameters: int, dropout: float) -> None:
    with torch.device("meta"):
        network = EfficientNetV2(type=size, num_classes=1000).model
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.drop_rate == dropout
    assert 0.19 < max(drop_rates(network)) <= 0.2


def test_efficientnetv2_options_reach_the_network() -> None:
    with torch.device("meta"):
        network = EfficientNetV2(stochastic_depth=0.0, resnet_dropout=0.0, input_channels=1).model
    assert network.conv_stem.in_channels == 1
    assert network.drop_rate == 0
    assert not any(drop_rates(network))


def test_efficientnetv2_maps_images_to_logits() -> None:
    model = EfficientNetV2(num_classes=4, input_channels=1).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)


# the families


FAMILIES = {
    "timm": TimmModel,
    "regnet": RegNet,
    "resnest": ResNeSt,
    "mobilenet": MobileNet,
    "ghostnet": GhostNet,
    "efficientnetv2": EfficientNetV2,
    "convnext": ConvNext,
}


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.variants])
def test_each_variant_is_a_network_of_timm(family: Any) -> None:
    assert all(timm.is_model(name) for name in family.variants.values())
    check_arguments(family, {"type": next(iter(family.variants))}, "model")
    offered = get_args(get_args(signature_options(family)["type"][0])[0])
    assert list(offered) == list(family.variants)


@pytest.mark.parametrize(
    ("family", "variant", "parameters"),
    [
        (RegNet, "X-4.0GF", 22_118_248),
        (RegNet, "Y-4.0GF", 20_646_656),
        (RegNet, "Y-6.4GF", 30_583_252),
        (ResNeSt, 50, 27_483_240),
        (MobileNet, "v1", 4_231_976),
        (MobileNet, "v2", 3_504_872),
        (MobileNet, "v3-large", 5_483_032),
        (MobileNet, "v3-small", 2_542_856),
        (GhostNet, 1.3, 7_358_820),
        (ConvNext, "tiny", 28_589_128),
        (ConvNext, "large", 197_767_336),
    ],
)
def test_sizes_of_the_families(family: Any, variant: Any, parameters: int) -> None:
    with torch.device("meta"):
        network = family(type=variant, num_classes=1000).model
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("variant", "rate"), [("atto", 0.0), ("tiny", 0.1), ("small", 0.4), ("base", 0.5), ("large", 0.5)]
)
def test_convnexts_drop_rates_are_the_papers(variant: Any, rate: float) -> None:
    with torch.device("meta"):
        assert max(drop_rates(ConvNext(type=variant).model), default=0) == pytest.approx(rate)
        assert not drop_rates(ConvNext(type=variant, stochastic_depth=0.0).model)


@pytest.mark.parametrize(
    ("family", "variant"), [(MobileNet, "v1"), (GhostNet, 1.3), *((ResNeSt, n) for n in (14, 50))]
)
def test_a_family_that_cannot_drop_paths_says_so(family: Any, variant: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model\.stochastic_depth=0\.1"), torch.device("meta"):
        family(type=variant, stochastic_depth=0.1)


@pytest.mark.parametrize(("name", "target"), FAMILIES.items())
def test_the_configs_name_exactly_the_models_own_options(name: str, target: Any) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config.pop("_target_") == f"{target.__module__}.{target.__name__}"
    check_arguments(target, config, "model")
    known = signature_options(target)
    assert config.keys() == known.keys() - signature_options(BaseModel).keys()
    assert all((config[key] or None) == (known[key][1] or None) for key in config)
