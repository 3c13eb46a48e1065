"""Policies for photographs of any size. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from augmentation.crops import DRAWS, crop_boxes, resized_crops
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
from crucible.keyed import keyed_uniform


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

    def keeps(self, input: Tensor) -> bool:
        # of images in memory (N, C, H, W) the batch part makes the crops; what has the size already is cropped, and
        # would not be told from them
        fits = input.ndim == 4 and input.dtype == torch.uint8 and self.channels in (None, input.shape[1])
        return fits and input.shape[2:] != (self.size, self.size)

    def augment(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        """As that of every policy; images in memory, of another size, are cropped and flipped first."""
        if input.shape[2:] != (self.size, self.size):
            # behind the draws of all else
            draws = keyed_uniform(key, index, self.draws + DRAWS + 1)[:, self.draws :]
            boxes = crop_boxes(draws[:, :DRAWS], input.shape[2], input.shape[3], self.options["min_area"])
            crops = resized_crops(input, boxes, self.size)
            mirrored = (draws[:, DRAWS] < self.options["flip"]).view(-1, 1, 1, 1)
            input = torch.where(mirrored, crops.flip(3), crops)
        return super().augment(input, index, key)


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
