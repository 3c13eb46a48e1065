"""Policies for small colour images such as CIFAR. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor

from augmentation.crops import MODES
from augmentation.policies.base import (
    AUGMIX,
    FLIPS,
    RAND_AUGMENT,
    RESAMPLING,
    AutomaticAugMix,
    AutomaticAutoAugment,
    AutomaticRandAugment,
    AutomaticTrivialAugment,
    PhotographPolicy,
    Pixels,
    resized,
)
from crucible.options import ConfigError


class _CifarPolicy(PhotographPolicy):
    """
    Args:
        size: height and width in pixels; images of another size are resized first.
        padding: random shifts of up to so many pixels along each axis.
        common: what every policy for photographs takes.
    """

    def __init__(
        self, *, size: Annotated[int, "[1, inf)"] = 32, padding: Pixels = None, **common: Any
    ) -> None:
        super().__init__({"padding": padding}, size=size, **common)

    def build_transform(self) -> None:
        self.shift_and_flip_batch()


class BaselineTransform(_CifarPolicy):
    """Random shifts (padding 4) and flips, on the device."""

    defaults = {"padding": 4, **FLIPS}


class BaselineCutoutTransform(BaselineTransform):
    """The baseline and cutout (16 pixels)."""

    defaults = {"padding": 4, **FLIPS, "cutout_size": 16}


class AutoAugmentTransform(_CifarPolicy, AutomaticAutoAugment):
    """Shifts, flips, the AutoAugment policy found on CIFAR-10, and cutout, as in its paper."""

    defaults = {"padding": 4, **FLIPS, "cutout_size": 16, **RESAMPLING, "operations": "torchvision"}
    found_on = "cifar10"


class RandAugmentTransform(_CifarPolicy, AutomaticRandAugment):
    """Shifts, flips, RandAugment (2 operations at 9 of 30), and cutout, as in its paper."""

    defaults = {"padding": 4, **FLIPS, "cutout_size": 16, **RAND_AUGMENT, "operations": "torchvision"}


class TrivialAugmentTransform(_CifarPolicy, AutomaticTrivialAugment):
    """Shifts, flips, TrivialAugment Wide (one operation at any of 31 strengths), and cutout, as in its paper."""

    defaults = {"padding": 4, **FLIPS, "cutout_size": 16, **RESAMPLING}


class AugMixTransform(_CifarPolicy, AutomaticAugMix):
    """Shifts, flips and AugMix (3 chains of 1 to 3 operations, severity 3); its consistency loss is a technique."""

    defaults = {"padding": 4, **FLIPS, **AUGMIX}


class TestTransform(_CifarPolicy):
    """No augmentation; images of another size are resized by `interpolation`, bilinear or bicubic."""

    __test__ = False  # not a test case, whatever its name looks like to pytest
    defaults = {"interpolation": "bilinear"}

    def resample(self, pixels: Tensor, draws: Sequence[float]) -> Tensor:
        """uint8 (C, H, W) to (C, size, size): the whole picture resized."""
        return resized(pixels, self.size, self.size, MODES[self.options["interpolation"] == "bicubic"])

    def build_transform(self) -> None:
        if (interpolation := self.options["interpolation"]) not in MODES:
            raise ConfigError(
                f"interpolation={interpolation}: {type(self).__name__} resizes by {', '.join(MODES)}",
                "docs/data.md",
            )
