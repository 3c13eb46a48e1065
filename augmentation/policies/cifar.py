"""Policies for small colour images such as CIFAR. All take the same options: switch by `_target_` alone.

An option that a policy has no use for must be left null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from torchvision.transforms import v2

from augmentation.policies.base import PhotographPolicy, Pixels, auto_augment, rand_augment


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
