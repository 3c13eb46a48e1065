"""The list of techniques. Its order is the order in which they act within a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from inspect import isclass

from augmentation.augmix import AugMixConsistency
from augmentation.distortions import Distort
from augmentation.manifold_mixup import ManifoldMixup
from augmentation.mixing import Mix
from crucible.configuration import find_target
from crucible.options import ConfigError
from crucible.technique import Technique
from losses.binary import BinaryCrossEntropy
from losses.distillation import Distil
from losses.powergrad import LabelSmoothing, PowerGrad
from losses.weights import ClassWeights
from models.convert import ActivationSwap, BlurDownsampling
from norms import Norm
from optimizers.averaging import Averaging
from optimizers.centralization import GradientCentralization
from optimizers.freezing import Freeze
from optimizers.groups import HeadRate, LayerDecay, UndecayNorm
from optimizers.lookahead import Lookahead
from optimizers.sam import Sam

TECHNIQUES: tuple[type[Technique], ...] = (
    Norm, ActivationSwap, BlurDownsampling, BinaryCrossEntropy, PowerGrad, LabelSmoothing, ClassWeights, Distil,
    Distort, AugMixConsistency, Mix, ManifoldMixup, Freeze, UndecayNorm, LayerDecay, HeadRate, GradientCentralization,
    Lookahead, Sam, Averaging,
)  # fmt: skip


def technique_kinds(stages: Mapping[str, str] | None = None) -> tuple[type[Technique], ...]:
    """All techniques: those above, then the user's own.

    Args:
        stages: `model.stages`, `{name: module.Class}`.

    Raises:
        ConfigError: for a class that is not there or no technique, or an option that another one has.
    """
    kinds = list(TECHNIQUES)
    owners = {field.name: kind for kind in kinds for field in fields(kind)}
    for name, path in (stages or {}).items():
        kind = find_target(path, f"model.stages.{name}")
        if not (isclass(kind) and issubclass(kind, Technique)):
            raise ConfigError(
                f"model.stages.{name}={path}: must be a subclass of crucible.technique.Technique",
                see="docs/extending.md",
            )
        for field in fields(kind):
            if (owner := owners.setdefault(field.name, kind)) is not kind:
                raise ConfigError(
                    f"model.stages.{name}={path}: its option {field.name} is one of {owner.__name__}",
                    see="docs/extending.md",
                )
        kinds.append(kind)
    return tuple(kinds)
