"""Policies for photographs of any size. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from augmentation.crops import DRAWS, corners_and_centre, crop_box, crop_boxes, resized_crops
from augmentation.policies.base import (
    AUGMIX,
    RAND_AUGMENT,
    RESAMPLING,
    AutomaticAugMix,
    AutomaticAutoAugment,
    AutomaticRandAugment,
    AutomaticTrivialAugment,
    PhotographPolicy,
    resized,
)
from crucible.corrections import Correction
from crucible.keyed import keyed_uniform
from crucible.pictures import Shape


class _ImagenetPolicy(PhotographPolicy):
    """
    Args:
        size: height and width of the output in pixels.
        min_area: the random crop covers at least this fraction of the picture.
        dct_scaling: decode a large JPEG at 1/2, 1/4 or 1/8 of its size where that leaves pixels enough: quicker, and
            other pixels (docs/data.md); only with simplejpeg, elsewhere without effect.
        common: what every policy for photographs takes.
    """

    corrections: ClassVar = (
        Correction(
            "data.module.train_transforms",
            2,
            lambda config: True,
            "crops were resized by PIL, and drawn with the flip one by one",
        ),
    )

    def __init__(
        self,
        *,
        size: Annotated[int, "[1, inf)"] = 224,
        min_area: Annotated[float | None, "(0, 1]"] = None,
        dct_scaling: bool = False,
        **common: Any,
    ) -> None:
        super().__init__({"min_area": min_area}, size=size, **common)
        self.dct_scaling = dct_scaling

    def large_enough(self, draws: Sequence[float]) -> Callable[[Shape], Shape] | None:
        if not self.dct_scaling:
            return None

        def of(shape: Shape) -> Shape:
            scale = self.scale_of(shape, draws)
            return Shape(*(math.ceil(side * scale) for side in shape))

        return of

    def scale_of(self, shape: Shape, draws: Sequence[float]) -> float:
        """By how much `resample` scales a picture of this shape, in the side where it is more."""
        return self.size / min(shape)


class BaselineTransform(_ImagenetPolicy):
    """Random resized crops (8 to 100 % of the area, aspect 3:4 to 4:3) and, on the device, flips."""

    defaults = {"min_area": 0.08, "flip": 0.5}
    crop_draws = DRAWS

    def build_transform(self) -> None:
        self.shift_and_flip_batch()

    def resample(self, pixels: Tensor, draws: Sequence[float]) -> Tensor:
        """uint8 (C, H, W) to (C, size, size): a random part of it, resized."""
        top, left, height, width = crop_box(pixels.shape[1], pixels.shape[2], draws, self.options["min_area"])
        return resized(pixels[:, top : top + height, left : left + width], self.size, self.size)

    def scale_of(self, shape: Shape, draws: Sequence[float]) -> float:
        box = crop_box(*shape, draws, self.options["min_area"])
        return self.size / min(box.height, box.width)

    def keeps(self, input: Tensor) -> bool:
        # of images in memory (N, C, H, W) the batch part makes the crops; what has the size already is cropped, and
        # would not be told from them
        fits = input.ndim == 4 and input.dtype == torch.uint8 and self.channels in (None, input.shape[1])
        return fits and input.shape[2:] != (self.size, self.size)

    def augment(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        """As that of every policy; images in memory, of another size, are cropped first."""
        if input.shape[2:] != (self.size, self.size):
            # behind the draws of all else
            draws = keyed_uniform(key, index, self.first_draw + DRAWS)[
                :, self.first_draw :
            ]  # as in the loader
            boxes = crop_boxes(draws, input.shape[2], input.shape[3], self.options["min_area"])
            input = resized_crops(input, boxes, self.size)
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

    def resample(self, pixels: Tensor, draws: Sequence[float]) -> Tensor:
        """uint8 (C, H, W) to (C, size, size)."""
        whole = self.enlarged(pixels)
        top, left = (round((side - self.size) / 2) for side in whole.shape[1:])
        return whole[:, top : top + self.size, left : left + self.size]

    def enlarged(self, pixels: Tensor) -> Tensor:
        """uint8 (C, H, W) at the size that the squares are cut from."""
        height, width = pixels.shape[1:]
        short = round(self.size / 0.875)
        if height < width:
            height, width = short, short * width // height
        else:
            height, width = short * height // width, short
        return resized(pixels, height, width)

    def five_crops(self, image: Image.Image | Tensor) -> Tensor:
        """`image` to uint8 (5, channels, size, size): the corners, and the central square last."""
        return corners_and_centre(self.enlarged(self._pixels(image)), self.size)

    def scale_of(self, shape: Shape, draws: Sequence[float]) -> float:
        return round(self.size / 0.875) / min(shape)

    def keeps(self, input: Tensor) -> bool:
        return False  # even of the right size, its border is cut off
