"""Policies for photographs of any size. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from torchvision.transforms import v2

from augmentation.policies.base import ImagePolicy, Pixels, Positive, Probability, auto_augment, rand_augment


class _ImagenetPolicy(ImagePolicy):
    """
    Args:
        mean: a value a channel, on the scale 0 to 1.
        std: a value a channel, on the scale 0 to 1.
        size: height and width of the output in pixels.
        channels: 1 grey, 3 colour, null as the images come.
        min_area: the random crop covers at least this fraction of the picture.
        flip: probability of the mirror image.
        cutout_size: side of the square that is cut out, in pixels.
        num_ops: operations of RandAugment.
        magnitude: strength of RandAugment's operations, of 30.
    """

    def __init__(
        self,
        *,
        mean: list[float] | None = None,
        std: Positive = None,
        size: Annotated[int, "[1, inf)"] = 224,
        channels: Literal[1, 3] | None = None,
        min_area: Annotated[float | None, "(0, 1]"] = None,
        flip: Probability = None,
        cutout_size: Pixels = None,
        num_ops: Annotated[int | None, "[1, inf)"] = None,
        magnitude: Annotated[int | None, "[0, 30]"] = None,
    ) -> None:
        options = {
            "min_area": min_area,
            "flip": flip,
            "cutout_size": cutout_size,
            "num_ops": num_ops,
            "magnitude": magnitude,
        }
        super().__init__(mean=mean, std=std, size=size, channels=channels, options=options)

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


class AutoAugmentTransform(_ImagenetPolicy):
    """The baseline and the AutoAugment policy found on ImageNet."""

    defaults = {"min_area": 0.08, "flip": 0.5}

    def build_transform(self) -> Callable[[Any], Any]:
        return self.crop_and_flip(auto_augment(v2.AutoAugmentPolicy.IMAGENET))


class RandAugmentTransform(_ImagenetPolicy):
    """The baseline and RandAugment (2 operations at 9 of 30)."""

    defaults = {"min_area": 0.08, "flip": 0.5, "num_ops": 2, "magnitude": 9}

    def build_transform(self) -> Callable[[Any], Any]:
        return self.crop_and_flip(rand_augment(self.options))


class TestTransform(_ImagenetPolicy):
    """The shorter side resized to size / 0.875 (256 for 224), then the central square."""

    __test__ = False  # not a test case, whatever its name looks like to pytest

    def build_transform(self) -> Callable[[Any], Any]:
        return v2.Compose([v2.Resize(round(self.size / 0.875)), v2.CenterCrop(self.size)])
