"""Five crops of each image, for the mean of their predictions."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from augmentation.policies.base import Policy
from crucible.options import ConfigError


class FiveCrops(Policy):
    """The four corners and the centre of what an evaluation policy takes its central square from.

    Args:
        policy: has `five_crops`, as `augmentation.policies.imagenet.TestTransform`.

    Raises:
        ConfigError: for a policy that shows the whole picture.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        if not hasattr(policy, "five_crops"):
            raise ConfigError(
                f"tta=five_crops: {type(policy).__module__}.{type(policy).__name__} takes the whole picture, of which "
                "there are no other crops; tta=flip is for any",
                see="docs/use.md",
            )
        self.policy = policy

    def sample(self, image: Image.Image | Tensor) -> Tensor:
        """`image` to uint8 (5, C, size, size): top left, top right, bottom left, bottom right, centre."""
        return self.policy.five_crops(image)  # type: ignore[operator]

    def keeps(self, input: Tensor) -> bool:
        return False

    def batch(self, input: Tensor, index: Tensor, key: int | Tensor) -> Tensor:
        """uint8 (N, 5, C, size, size) to float32 of the same shape."""
        several = input.shape[1]
        made = self.policy.batch(input.flatten(0, 1), index.repeat_interleave(several), key)
        return made.unflatten(0, (-1, several))
