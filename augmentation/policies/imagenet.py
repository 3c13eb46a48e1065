"""Policies for photographs of any size. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from torchvision.transforms import v2

from augmentation.policies.base import (
    AUGMIX,
    RAND_AUGMENT,
    RESAMPLING,
    AutomaticAugMix,
    AutomaticAutoAugment,
    AutomaticRandAugment,
    AutomaticTrivialAugment,
    PhotographPolicy,
)


class _ImagenetPolicy(PhotographPolicy):
    """
    Args:
        size: height and width of the output in pixels.
        min_area: the random crop covers at least this fraction of the picture.
        common: what every policy for photographs takes.
    """

    def __init__(
        self,
        *,
        size: Annotated[int, "[1, inf)"] = 224,
        min_area: Annotated[float | None, "(0, 1]"] = None,
        **common: Any,
    ) -> None:
        super().__init__({"min_area": min_area}, size=size, **common)

    def crop_and_flip(self, *further: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A random resized crop and a flip of each sample, then the `further` operations."""
        return v2.Compose(
            [
                v2.RandomResizedCrop(self.size, scale=(self.options["min_area"], 1.0)),
                v2.RandomHorizontalFlip(self.options["flip"]),
                *further,
            ]
        )


class BaselineTransform(_ImagenetPolicy):
    """Random resized crops (8 to 100 % of the area, aspect 3:4 to 4:3) and flips."""

    defaults = {"min_area": 0.08, "flip": 0.5}

    def build_transform(self) -> Callable[[Any], Any]:
        return self.crop_and_flip()


class BaselineCutoutTransform(BaselineTransform):
    """The baseline and cutout (112 pixels: half the side, as 16 of 32 in CIFAR-10)."""

    defaults = {"min_area": 0.08, "flip": 0.5, "cutout_size": 112}


class AutoAugmentTransform(BaselineTransform, AutomaticAutoAugment):
    """The baseline and the AutoAugment policy found on ImageNet."""

    defaults = {"min_area": 0.08, "flip": 0.5, **RESAMPLING}
    found_on = "imagenet"


class RandAugmentTransform(BaselineTransform, AutomaticRandAugment):
    """The baseline and RandAugment (2 operations at 9 of 30)."""

    defaults = {"min_area": 0.08, "flip": 0.5, **RAND_AUGMENT}


class TrivialAugmentTransform(BaselineTransform, AutomaticTrivialAugment):
    """The baseline and TrivialAugment Wide (one operation at any of 31 strengths)."""

    defaults = {"min_area": 0.08, "flip": 0.5, **RESAMPLING}


class AugMixTransform(BaselineTransform, AutomaticAugMix):
    """The baseline and AugMix (3 chains of 1 to 3 operations, severity 3); its consistency loss is a technique."""

    defaults = {"min_area": 0.08, "flip": 0.5, **AUGMIX}


class TestTransform(_ImagenetPolicy):
    """The shorter side resized to size / 0.875 (256 for 224), then the central square."""

    __test__ = False  # not a test case, whatever its name looks like to pytest

    def build_transform(self) -> Callable[[Any], Any]:
        return v2.Compose([v2.Resize(round(self.size / 0.875)), v2.CenterCrop(self.size)])
