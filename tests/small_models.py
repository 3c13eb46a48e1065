"""The families of cli_configs/model, each as its smallest variant that has all of its parts."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from crucible import configuration
from lab.config import check, resolve_network
from models.deformable_resnet import DeformableResNet18
from models.dynamic_resnet import ResNet18
from models.dynamic_vgg import VGG16
from models.fixup_resnet import ResNet18WithoutNorm
from models.lip_resnet import LIPResNet50
from models.oct_resnet import OctResNet18
from models.preact_resnet import PreActResNet18
from models.resnext import ResNeXt50
from models.se_resnet import SEResNet18

FAMILIES = sorted(file.stem for file in (ROOT / "cli_configs" / "model").glob("*.yaml"))
SIZE = 32  # pixels, the least that every family takes


class SmallResNet(ResNet18):
    layers = (1, 1, 1)


class SmallSEResNet(SEResNet18):
    layers = (1, 1, 1)


class SmallResNeXt(ResNeXt50):
    layers = (1, 1, 1)


class SmallLIPResNet(LIPResNet50):
    layers = (1, 1, 1)


class SmallOctResNet(OctResNet18):
    layers = (1, 1, 1)


class SmallPreActResNet(PreActResNet18):
    layers = (1, 1, 1, 1)


class SmallResNetWithoutNorm(ResNet18WithoutNorm):
    layers = (1, 1, 1, 1)


class SmallVGG(VGG16):
    layers = (1, 1, 1, 1, 1)


class SmallDeformableResNet(DeformableResNet18):
    layers = (1, 1, 1, 1)


# a family that is not named here is used as its file has it
SMALL: dict[str, list[str]] = {
    "cifar_resnet": ["model.depth=8"],
    "convnext": ["model.type=atto"],
    "deformable_resnet": ["model._target_=small_models.SmallDeformableResNet", "model.cifar_size=false"],
    "efficientnetv2": ["model.type=B0"],
    "ghostnet": ["model.type=0.5"],
    "lip_resnet": ["model._target_=small_models.SmallLIPResNet", "model.cifar_size=false"],
    "mobilenet": ["model.type=v3-small"],
    "oct_resnet": ["model._target_=small_models.SmallOctResNet", "model.cifar_size=false"],
    "preact_resnet": ["model._target_=small_models.SmallPreActResNet", "model.cifar_size=false"],
    "pyramidnet": ["model.depth=8", "model.alpha=12"],
    "regnet": ["model.type=Y-0.2GF"],
    "resnest": ["model.type=14"],
    "resnet": ["model._target_=small_models.SmallResNet", "model.cifar_size=false"],
    "resnet18_wobn": ["model._target_=small_models.SmallResNetWithoutNorm", "model.cifar_size=false"],
    "resnext": ["model._target_=small_models.SmallResNeXt", "model.cifar_size=false"],
    "se_resnet": ["model._target_=small_models.SmallSEResNet", "model.cifar_size=false"],
    "timm": ["model.type=test_efficientnet"],
    "vgg": ["model._target_=small_models.SmallVGG"],
    "wide_resnet": ["model.depth=10", "model.widen_factor=1"],
}


def small(family: str, *overrides: str) -> dict[str, Any]:
    """The checked plain configuration of a family's small variant on CIFAR-10, with further overrides."""
    return copy.deepcopy(_small(family, overrides))


@cache
def _small(family: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    typed = [f"model={family}", "data=cifar10", *SMALL.get(family, []), *overrides]
    with initialize_config_dir(str(ROOT / "cli_configs"), version_base="1.3"):
        config = configuration.to_plain(compose("train", typed))
    check(config, typed)
    resolve_network(config)
    return config
