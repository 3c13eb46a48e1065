"""Policies for small colour images such as CIFAR. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from torchvision.transforms import v2

from augmentation.policies.base import ImagePolicy, Pixels, Positive, Probability, auto_augment, rand_augment


class _CifarPolicy(ImagePolicy):
    """
    Args:
        mean: a value a channel, on the scale 0 to 1.
        std: a value a channel, on the scale 0 to 1.
        size: height and width in pixels; images of another size are resized first.
        channels: 1 grey, 3 colour, null as the images come.
        padding: random shifts of up to so many pixels along each axis.
        flip: probability of the mirror image.
        cutout_size: side of the square that is cut out, in pixels (paper: 16 for CIFAR-10, 8 for CIFAR-100).
        num_ops: operations of RandAugment.
        magnitude: strength of RandAugment's operations, of 30.
    """

    def __init__(
        self,
        *,
        mean: list[float] | None = None,
        std: Positive = None,
        size: Annotated[int, "[1, inf)"] = 32,
        channels: Literal[1, 3] | None = None,
        padding: Pixels = None,
        flip: Probability = None,
        cutout_size: Pixels = None,
        num_ops: Annotated[int | None, "[1, inf)"] = None,
        magnitude: Annotated[int | None, "[0, 30]"] = None,
    ) -> None:
        options = {
            "padding": padding,
            "flip": flip,
            "cutout_size": cutout_size,
            "num_ops": num_ops,
            "magnitude": magnitude,
        }
        super().__init__(mean=mean, std=std, size=size, channels=channels, options=options)

    def crop_and_flip(self, *further: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Crop and flip each sample, for policies whose `further` operations must come after."""
        return v2.Compose(
            [
                v2.Resize((self.size, self.size)),
                v2.RandomCrop(self.size, padding=self.options["padding"]),
                v2.RandomHorizontalFlip(self.options["flip"]),
                *further,
            ]
        )


class BaselineTransform(_CifarPolicy):
    """Random shifts (padding 4) and flips, on the device."""

    defaults = {"padding": 4, "flip": 0.5}

    def build_transform(self) -> None:
        self.shift_and_flip_batch()


class BaselineCutoutTransform(BaselineTransform):
    """The baseline and cutout (16 pixels)."""

    defaults = {"padding": 4, "flip": 0.5, "cutout_size": 16}


class AutoAugmentTransform(_CifarPolicy):
    """Shifts, flips, the AutoAugment policy found on CIFAR-10, and cutout, as in its paper."""

    defaults = {"padding": 4, "flip": 0.5, "cutout_size": 16}

    def build_transform(self) -> Callable[[Any], Any]:
        return self.crop_and_flip(auto_augment(v2.AutoAugmentPolicy.CIFAR10))


class RandAugmentTransform(_CifarPolicy):
    """Shifts, flips, RandAugment (2 operations at 9 of 30), and cutout, as in its paper."""

    defaults = {"padding": 4, "flip": 0.5, "cutout_size": 16, "num_ops": 2, "magnitude": 9}

    def build_transform(self) -> Callable[[Any], Any]:
        return self.crop_and_flip(rand_augment(self.options))


class TestTransform(_CifarPolicy):
    """No augmentation."""

    __test__ = False  # not a test case, whatever its name looks like to pytest
