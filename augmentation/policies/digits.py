"""Policies for tiny grey pictures of digits, where a mirror image is another sign."""

from __future__ import annotations

from typing import Annotated, Any

from augmentation.policies.base import ImagePolicy, Pixels


class _DigitsPolicy(ImagePolicy):
    """
    Args:
        size: height and width in pixels; images of another size are resized first.
        padding: random shifts of up to so many pixels along each axis.
        common: what every image policy takes.
    """

    def __init__(
        self, *, size: Annotated[int, "[1, inf)"] = 8, padding: Pixels = None, **common: Any
    ) -> None:
        super().__init__({"padding": padding}, size=size, **common)


class BaselineTransform(_DigitsPolicy):
    """Random shifts of up to 1 pixel, on the device."""

    defaults = {"padding": 1}

    def build_transform(self) -> None:
        self.shift_and_flip_batch()


class TestTransform(_DigitsPolicy):
    """No augmentation."""

    __test__ = False  # not a test case, whatever its name looks like to pytest
