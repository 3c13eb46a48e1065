"""Policies for photographs of any size. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2F

from augmentation.crops import ASPECT, DRAWS, MODES, corners_and_centre, crop_box, crop_boxes, resized_crops
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
    resized,
)
from crucible.configuration import select
from crucible.corrections import Correction
from crucible.keyed import keyed_uniform
from crucible.options import ConfigError
from crucible.pictures import Shape

CROPS = {"min_area": 0.08, "ratio": list(ASPECT)}
CROP_PCT = 0.875
_PIL_FILTERS = {name: Image.Resampling[name.upper()] for name in (*MODES, "lanczos")}


class _ImagenetPolicy(PhotographPolicy):
    """
    Args:
        size: height and width of the output in pixels.
        min_area: the random crop covers at least this fraction of the picture.
        ratio: least and largest aspect of the random crop, width by height; null: 3/4 and 4/3.
        crop_pct: in evaluation, side of the central square by that of the resized picture, which is size / crop_pct,
            rounded down, as in timm.
        crop_mode: in evaluation, center: the shorter side is resized to that, and the aspect stays; squash: both are.
        resize_by: in evaluation, torch: torchvision's kernel for tensors; pil: PIL's, a level apart here and there, as
            timm and torchvision evaluate; with it interpolation=lanczos, too.
        dct_scaling: decode a large JPEG at 1/2, 1/4 or 1/8 of its size where that leaves pixels enough: quicker, and
            other pixels (docs/data.md); only with simplejpeg, elsewhere without effect.
        common: what every policy for photographs takes.
    """

    corrections: ClassVar[tuple[Correction, ...]] = (
        Correction(
            "data.module.train_transforms",
            2,
            lambda config: True,
            "crops were resized by PIL, and drawn with the flip one by one",
        ),
    )

    @property
    def resizings(self) -> tuple[str, ...]:
        """The filters that pictures may be resized by."""
        return (*MODES, "random")

    def __init__(
        self,
        *,
        size: Annotated[int, "[1, inf)"] = 224,
        min_area: Annotated[float | None, "(0, 1]"] = None,
        ratio: Annotated[list[float] | None, "(0, inf)"] = None,
        crop_pct: Annotated[float | None, "(0, 1]"] = None,
        crop_mode: Literal["center", "squash"] | None = None,
        resize_by: Literal["torch", "pil"] | None = None,
        dct_scaling: bool = False,
        **common: Any,
    ) -> None:
        if ratio is not None and (len(ratio) != 2 or ratio[0] > ratio[1]):
            raise ConfigError(
                f"ratio={ratio}: give the least and the largest aspect, [0.75, 1.333]", "docs/data.md"
            )
        own = {
            "min_area": min_area, "ratio": ratio, "crop_pct": crop_pct, "crop_mode": crop_mode, "resize_by": resize_by,
        }  # fmt: skip
        super().__init__(own, size=size, **common)
        self.dct_scaling = dct_scaling
        interpolation = self.options.get("interpolation", "bilinear")
        if self.automatic is None and interpolation not in self.resizings:
            raise ConfigError(
                f"interpolation={interpolation}: {type(self).__name__} resizes by {', '.join(self.resizings)}",
                "docs/data.md",
            )
        # nearest is of the operations alone
        self.resizing = "bilinear" if interpolation == "nearest" else interpolation

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

    defaults = {**CROPS, **FLIPS, "interpolation": "bilinear"}

    @property
    def crop_draws(self) -> int:
        return DRAWS + (self.resizing == "random")

    @property
    def boxes(self) -> tuple[float, tuple[float, float]]:
        """What the random boxes are drawn by: the least part of the picture, and the aspects."""
        return self.options["min_area"], tuple(self.options["ratio"])

    def build_transform(self) -> None:
        self.shift_and_flip_batch()

    def resample(self, pixels: Tensor, draws: Sequence[float]) -> Tensor:
        """uint8 (C, H, W) to (C, size, size): a random part of it, resized."""
        top, left, height, width = crop_box(pixels.shape[1], pixels.shape[2], draws, *self.boxes)
        bicubic = draws[DRAWS] < 0.5 if self.resizing == "random" else self.resizing == "bicubic"
        part = pixels[:, top : top + height, left : left + width]
        return resized(part, self.size, self.size, MODES[bicubic])

    def scale_of(self, shape: Shape, draws: Sequence[float]) -> float:
        box = crop_box(*shape, draws, *self.boxes)
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
            draws = keyed_uniform(key, index, self.first_draw + self.crop_draws)[
                :, self.first_draw :
            ]  # as in the loader
            boxes = crop_boxes(draws, input.shape[2], input.shape[3], *self.boxes)
            bicubic = {
                "bilinear": None,
                "bicubic": torch.ones_like(index, dtype=torch.bool),
                "random": draws[:, -1] < 0.5,
            }
            input = resized_crops(input, boxes, self.size, bicubic[self.resizing])
        return super().augment(input, index, key)


class BaselineCutoutTransform(BaselineTransform):
    """The baseline and cutout (112 pixels: half the side, as 16 of 32 in CIFAR-10)."""

    defaults = {**CROPS, **FLIPS, "interpolation": "bilinear", "cutout_size": 112}


class AutoAugmentTransform(BaselineTransform, AutomaticAutoAugment):
    """The baseline and the AutoAugment policy found on ImageNet."""

    defaults = {**CROPS, **FLIPS, **RESAMPLING}
    found_on = "imagenet"


class RandAugmentTransform(BaselineTransform, AutomaticRandAugment):
    """The baseline and RandAugment (2 operations at 9 of 30)."""

    defaults = {**CROPS, **FLIPS, **RAND_AUGMENT}


class TrivialAugmentTransform(BaselineTransform, AutomaticTrivialAugment):
    """The baseline and TrivialAugment Wide (one operation at any of 31 strengths)."""

    defaults = {**CROPS, **FLIPS, **RESAMPLING}


class AugMixTransform(BaselineTransform, AutomaticAugMix):
    """The baseline and AugMix (3 chains of 1 to 3 operations, severity 3); its consistency loss is a technique."""

    defaults = {**CROPS, **FLIPS, **AUGMIX}


def _resized_side(size: int, crop_pct: float) -> int:
    return math.floor(size / crop_pct)


def _rounds_otherwise(config: Mapping[str, Any]) -> bool:
    """Whether the resized side was the nearest whole number, one above today's."""
    size = select(config, "data.module.test_transforms.size") or 224
    return round(size / CROP_PCT) != _resized_side(size, CROP_PCT)


class TestTransform(_ImagenetPolicy):
    """The shorter side resized to size / crop_pct (256 for 224 and 0.875), then the central square."""

    __test__ = False  # not a test case, whatever its name looks like to pytest
    corrections: ClassVar = (
        *_ImagenetPolicy.corrections,
        Correction(
            "data.module.test_transforms", 2, _rounds_otherwise, "the resized side was rounded up, not down"
        ),
    )
    defaults = {
        "crop_pct": CROP_PCT, "interpolation": "bilinear", "crop_mode": "center", "resize_by": "torch",
    }  # fmt: skip

    @property
    def resizings(self) -> tuple[str, ...]:
        # it draws nothing
        return tuple(_PIL_FILTERS) if self.options["resize_by"] == "pil" else MODES

    @property
    def resized_side(self) -> int:
        """Of the resized picture, in pixels."""
        return _resized_side(self.size, self.options["crop_pct"])

    def resample(self, pixels: Tensor, draws: Sequence[float]) -> Tensor:
        """uint8 (C, H, W) to (C, size, size)."""
        whole = self.enlarged(pixels)
        top, left = (round((side - self.size) / 2) for side in whole.shape[1:])
        return whole[:, top : top + self.size, left : left + self.size]

    def enlarged(self, pixels: Tensor) -> Tensor:
        """uint8 (C, H, W) at the size that the squares are cut from."""
        height, width = pixels.shape[1:]
        short = self.resized_side
        if self.options["crop_mode"] == "squash":
            height, width = short, short
        elif height < width:
            height, width = short, short * width // height
        else:
            height, width = short * height // width, short
        if self.options["resize_by"] == "pil":
            picture = v2F.to_pil_image(pixels).resize((width, height), _PIL_FILTERS[self.resizing])
            return v2F.pil_to_tensor(picture)
        return resized(pixels, height, width, MODES[self.resizing == "bicubic"])

    def five_crops(self, image: Image.Image | Tensor) -> Tensor:
        """`image` to uint8 (5, channels, size, size): the corners, and the central square last."""
        return corners_and_centre(self.enlarged(self._pixels(image)), self.size)

    def scale_of(self, shape: Shape, draws: Sequence[float]) -> float:
        return self.resized_side / min(shape)

    def keeps(self, input: Tensor) -> bool:
        return False  # even of the right size, its border is cut off
