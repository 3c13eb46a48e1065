"""Draws what each policy does with one picture.

python -m docs.policies          writes docs/policies.png

The picture is the one of a flower that scikit-learn ships (load_sample_image).
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from torch import Tensor

from augmentation.policies import imagenet
from crucible.keyed import keyed_rng, stream_key

PAGE = Path(__file__).resolve().parent / "policies.png"
SIDE, GAP, COLUMNS, LABEL = 96, 4, 8, 116  # pixels; pictures of a row; width of the names
POLICIES = (
    "TestTransform", "BaselineTransform", "BaselineCutoutTransform", "AutoAugmentTransform", "RandAugmentTransform",
    "TrivialAugmentTransform", "AugMixTransform",
)  # fmt: skip


def pictures(name: str, image: Image.Image) -> Tensor:
    """(COLUMNS, 3, SIDE, SIDE) uint8: the picture under a policy, each time with other draws."""
    options = {"cutout_size": SIDE // 2} if "Cutout" in name else {}
    policy = getattr(imagenet, name)(size=SIDE, **options)
    samples = []
    for index in range(COLUMNS):
        with keyed_rng(stream_key("picture", name, index)):
            samples.append(policy.sample(image))
    output = policy.batch(torch.stack(samples), torch.arange(COLUMNS), stream_key("pictures"))
    return (output * 255).round().to(torch.uint8)


def draw() -> Image.Image:
    """A row for each policy."""
    image = Image.fromarray(load_sample_image("flower.jpg")).convert("RGB")
    step = SIDE + GAP
    page = Image.new("RGB", (LABEL + COLUMNS * step, len(POLICIES) * step), "white")
    pen = ImageDraw.Draw(page)
    for row, name in enumerate(POLICIES):
        pen.text((4, row * step + SIDE // 2 - 6), name.removesuffix("Transform"), fill="black")
        for column, picture in enumerate(pictures(name, image)):
            page.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (LABEL + column * step, row * step))
    return page


if __name__ == "__main__":
    # fewer colours than a photograph has, for a file of a size to commit
    draw().quantize(192, dither=Image.Dither.FLOYDSTEINBERG).save(PAGE, optimize=True)
