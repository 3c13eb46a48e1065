"""Policies for tiny grey pictures of digits, where a mirror image is another sign."""

from __future__ import annotations

from typing import Annotated, Literal

from augmentation.policies.base import ImagePolicy, Pixels, Positive


class _DigitsPolicy(ImagePolicy):
    """
    Args:
        mean: a value a channel, on the scale 0 to 1.
        std: a value a channel, on the scale 0 to 1.
        size: height and width in pixels; images of another size are resized first.
        channels: 1 grey, 3 colour, null as the images come.
        padding: random shifts of up to so many pixels along each axis.
    """

    def __init__(
        self,
        *,
        mean: list[float] | None = None,
        std: Positive = None,
        size: Annotated[int, "[1, inf)"] = 8,
        channels: Literal[1, 3] | None = None,
        padding: Pixels = None,
    ) -> None:
        super().__init__(mean=mean, std=std, size=size, channels=channels, options={"padding": padding})


class BaselineTransform(_DigitsPolicy):
    """Random shifts of up to 1 pixel, on the device."""

    defaults = {"padding": 1}

    def build_transform(self) -> None:
        self.shift_and_flip_batch()


class TestTransform(_DigitsPolicy):
    """No augmentation."""

    __test__ = False  # not a test case, whatever its name looks like to pytest
