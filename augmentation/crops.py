"""Random resized crops, each with a box of its own (Szegedy et al., arXiv 1409.4842), of one picture or of a batch.

Boxes are distributed as torchvision's: area and logarithm of the aspect uniform, of ten attempts the first that fits,
else all of the image or its middle. Where a crop is made larger or smaller, the filter is a triangle as wide as the
step from pixel to pixel (antialiased bilinear): as two products with matrices of its weights on a device, in one form
for all images; image by image on a CPU, where those products cost ten times as much. Both are within one level of each
other, as torchvision's own kernel rounds once in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ASPECT = (3 / 4, 4 / 3)  # width by height
ATTEMPTS = 10  # at a box that fits into the image
DRAWS = 2 * ATTEMPTS + 2  # areas, aspects, row, column


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_box(height: int, width: int, draws: Sequence[float], min_area: float) -> Box:
    """As `crop_boxes`, for one picture of any size, on the host.

    Args:
        height: of the picture, in pixels.
        width: of the picture.
        draws: `DRAWS` numbers, uniform in [0, 1).
        min_area: the least part of the picture.
    """
    low, high = map(math.log, ASPECT)
    row, column = draws[2 * ATTEMPTS :]
    for attempt in range(ATTEMPTS):
        area = height * width * (min_area + (1 - min_area) * draws[attempt])
        aspect = math.exp(low + (high - low) * draws[ATTEMPTS + attempt])
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(row * (height - h + 1)), int(column * (width - w + 1)), h, w)
    h, w = _middle(height, width)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _middle(height: int, width: int) -> tuple[int, int]:
    return min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))


def crop_boxes(draws: Tensor, height: int, width: int, min_area: float) -> Tensor:
    """A box for each image, all inside.

    Args:
        draws: (N, DRAWS) uniform in [0, 1).
        height: of the images, in pixels.
        width: of the images.
        min_area: the least part of the image.

    Returns:
        (N, 4) int64: top, left, height and width in pixels.
    """
    low, high = map(math.log, ASPECT)
    if draws.device.type != "mps":  # which has no float64; elsewhere the boxes are those of `crop_box`
        draws = draws.double()
    area = (min_area + (1 - min_area) * draws[:, :ATTEMPTS]) * (height * width)
    aspect = (low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS]).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    # argmax of a float finds the first maximum on every device
    first = fits.float().argmax(dim=1, keepdim=True)
    middle = _middle(height, width)
    fitted = fits.any(dim=1)
    h, w = (
        torch.where(fitted, side.gather(1, first)[:, 0], float(m))
        for side, m in zip((h, w), middle, strict=True)
    )
    row, column = draws[:, 2 * ATTEMPTS], draws[:, 2 * ATTEMPTS + 1]
    top, left = (
        torch.where(fitted, draw * (rest + 1), rest / 2).floor()
        for draw, rest in ((row, height - h), (column, width - w))
    )
    return torch.stack((top, left, h, w), dim=1).long()


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The boxes of the images, each brought to size x size.

    Args:
        images: (N, C, H, W) uint8.
        boxes: (N, 4) int64: top, left, height and width in pixels.
        size: of the output, in pixels.

    Returns:
        (N, C, size, size) uint8.
    """
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        places = zip(images, boxes.tolist(), strict=True)
        crops = [image[None, :, t : t + h, left : left + w] for image, (t, left, h, w) in places]
        # uint8 and antialias: torchvision's kernel
        return torch.cat([F.interpolate(c, (size, size), mode="bilinear", antialias=True) for c in crops])
    return _by_matrices(images, boxes, size)


def _by_matrices(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    top, left, h, w = boxes.float().unbind(1)
    rows = _weights(top, h, images.shape[2], size)[:, None]
    columns = _weights(left, w, images.shape[3], size)[:, None]
    return (rows @ images.float() @ columns.transpose(2, 3)).round().clamp(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(N, size, side) float32: how much of each pixel is in each of the output."""
    start, length = start[:, None, None], length[:, None, None]
    step = length / size
    place = torch.arange(side, device=start.device) + 0.5 - start
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    weight = (1 - (place - centre).abs() / step.clamp(min=1)).clamp(min=0) * ((place > 0) & (place < length))
    return weight / weight.sum(dim=2, keepdim=True)


def corners_and_centre(pixels: Tensor, size: int) -> Tensor:
    """(C, H, W) to its five squares, (5, C, size, size)."""
    height, width = pixels.shape[1:]
    bottom, right = height - size, width - size
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return torch.stack([pixels[:, top : top + size, left : left + size] for top, left in places])
