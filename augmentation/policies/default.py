"""For input that is not an image: float tensors of any dimension."""

from __future__ import annotations

from augmentation.policies.base import Policy


class IdentityTransform(Policy):
    """Input as it comes, in float32; normalised where `mean` or `std` are given.

    Args:
        mean: subtracted, a value a channel.
        std: divided by, a value a channel.
    """
