"""Random resized crops, each with a box of its own (Szegedy et al., arXiv 1409.4842), of one picture or of a batch.

Boxes are distributed as torchvision's: area and logarithm of the aspect uniform, of ten attempts the first that fits,
else all of the image or its middle. Where a crop is made larger or smaller, the filter is a triangle as wide as the
step from pixel to pixel (antialiased bilinear), or Keys's cubic with a = -1/2, twice as wide (antialiased bicubic): as
two products with matrices of its weights on a device, in one form for all images; image by image on a CPU, where those
products cost ten times as much. Both are within a level of each other (bicubic: two), as torchvision's own kernel
rounds once in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ASPECT = (3 / 4, 4 / 3)  # width by height
ATTEMPTS = 10  # at a box that fits into the image
DRAWS = 2 * ATTEMPTS + 2  # areas, aspects, row, column
Mode = Literal["bilinear", "bicubic"]  # of resizing
MODES: tuple[Mode, Mode] = ("bilinear", "bicubic")


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_box(
    height: int,
    width: int,
    draws: Sequence[float],
    min_area: float,
    aspects: tuple[float, float] = ASPECT,
) -> Box:
    """As `crop_boxes`, for one picture of any size, on the host.

    Args:
        height: of the picture, in pixels.
        width: of the picture.
        draws: `DRAWS` numbers, uniform in [0, 1); what is behind them is not looked at.
        min_area: the least part of the picture.
        aspects: least and largest, width by height.
    """
    low, high = map(math.log, aspects)
    row, column = draws[2 * ATTEMPTS : DRAWS]
    for attempt in range(ATTEMPTS):
        area = height * width * (min_area + (1 - min_area) * draws[attempt])
        aspect = math.exp(low + (high - low) * draws[ATTEMPTS + attempt])
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(row * (height - h + 1)), int(column * (width - w + 1)), h, w)
    h, w = _middle(height, width, aspects)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _middle(height: int, width: int, aspects: tuple[float, float]) -> tuple[int, int]:
    return min(height, round(width / aspects[0])), min(width, round(height * aspects[1]))


def crop_boxes(
    draws: Tensor, height: int, width: int, min_area: float, aspects: tuple[float, float] = ASPECT
) -> Tensor:
    """A box for each image, all inside.

    Args:
        draws: (N, DRAWS) uniform in [0, 1).
        height: of the images, in pixels.
        width: of the images.
        min_area: the least part of the image.
        aspects: least and largest, width by height.

    Returns:
        (N, 4) int64: top, left, height and width in pixels.
    """
    low, high = map(math.log, aspects)
    if draws.device.type != "mps":  # which has no float64; elsewhere the boxes are those of `crop_box`
        draws = draws.double()
    area = (min_area + (1 - min_area) * draws[:, :ATTEMPTS]) * (height * width)
    aspect = (low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS]).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    # argmax of a float finds the first maximum on every device
    first = fits.float().argmax(dim=1, keepdim=True)
    middle = _middle(height, width, aspects)
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


def resized_crops(images: Tensor, boxes: Tensor, size: int, bicubic: Tensor | None = None) -> Tensor:
    """The boxes of the images, each brought to size x size.

    Args:
        images: (N, C, H, W) uint8.
        boxes: (N, 4) int64: top, left, height and width in pixels.
        size: of the output, in pixels.
        bicubic: (N,) bool: which are resized so; None: all of them bilinear.

    Returns:
        (N, C, size, size) uint8.
    """
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        modes: list[Mode] = (
            ["bilinear"] * len(images) if bicubic is None else [MODES[b] for b in bicubic.tolist()]
        )
        places = zip(images, boxes.tolist(), modes, strict=True)
        # uint8 and antialias: torchvision's kernel
        crops = [
            F.interpolate(image[None, :, t : t + h, left : left + w], (size, size), mode=mode, antialias=True)
            for image, (t, left, h, w), mode in places
        ]
        return torch.cat(crops)
    return _by_matrices(images, boxes, size, bicubic)


def _by_matrices(images: Tensor, boxes: Tensor, size: int, bicubic: Tensor | None = None) -> Tensor:
    top, left, h, w = boxes.float().unbind(1)
    rows = _weights(top, h, images.shape[2], size, bicubic)[:, None]
    columns = _weights(left, w, images.shape[3], size, bicubic)[:, None]
    return (rows @ images.float() @ columns.transpose(2, 3)).round().clamp(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, side: int, size: int, bicubic: Tensor | None) -> Tensor:
    """(N, size, side) float32: how much of each pixel is in each of the output."""
    start, length = start[:, None, None], length[:, None, None]
    step = length / size
    place = torch.arange(side, device=start.device, dtype=torch.float32) + 0.5 - start
    centre = (torch.arange(size, device=start.device, dtype=torch.float32)[:, None] + 0.5) * step
    distance = (place - centre).abs() / step.clamp(min=1)
    weight = (1 - distance).clamp(min=0)
    if bicubic is not None:
        weight = torch.where(bicubic[:, None, None], _cubic(distance), weight)
    weight = weight * ((place > 0) & (place < length))
    return weight / weight.sum(dim=2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys's kernel with a = -1/2 at distances x >= 0; 0 from 2 on."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def corners_and_centre(pixels: Tensor, size: int) -> Tensor:
    """(C, H, W) to its five squares, (5, C, size, size)."""
    height, width = pixels.shape[1:]
    bottom, right = height - size, width - size
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return torch.stack([pixels[:, top : top + size, left : left + size] for top, left in places])
