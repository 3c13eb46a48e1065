"""The operations of AutoAugment and its successors, on whole batches: each image has its own operation and strength.

A `Drawer` says which of a table's cells each image gets, a cell being an operation with its strength and sign; the
table holds what a cell's kernel needs, as plain numbers. Every kernel takes its numbers image by image, so that one
kernel serves all images of an operation. `Operations` runs them in one of two forms with the same results:

- on a device every kernel of the table runs on all images, and each image takes its own result. Nothing is grouped,
  so that nothing has to come back to the host, it compiles with fullgraph, and bucket indices need not be sent along;
- on a CPU, which waits for nobody, images are sorted by kernel, and each kernel runs on its own images only.

On uint8 images the results are those of torchvision 0.29's v2 kernels for *tensors* (those for PIL images differ),
pixel by pixel, run eagerly, as a training does. Compiled by inductor, which fuses and reorders, some pixels differ:
2.8 % of those of RandAugment's operations on images of 8 x 8 (CPU, one operation each), in part by the neighbour that a
position halfway between two pixels takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Interpolation = Literal["nearest", "bilinear"]
GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)
LEVELS = 256
# the kernels, by number; all moves of pixels are one of them
KERNELS = (
    "identity", "affine", "brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast",
    "equalize", "invert", "shear_x", "shear_y", "hole",
)  # fmt: skip
AFFINE, SHEAR_X, SHEAR_Y = (KERNELS.index(name) for name in ("affine", "shear_x", "shear_y"))
MOST_PLACES = 1 << 22  # numbers of pixels that a CPU keeps ready, 32 MiB
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
HOLE = (125, 122, 113)  # levels of what Cutout covers, about CIFAR-10's mean, as in UDA's augmentation


class Cell(NamedTuple):
    """An operation with its strength.

    Attributes:
        name: of the operation, as in torchvision: `ShearX`, ..., `Invert`, or `Identity`.
        magnitude: signed, in the operation's own unit: the tangent of a shear, pixels of a translation, degrees,
            1 less than the factor of a blend, bits of Posterize, the part of 255 from which Solarize inverts, half the
            side of Cutout in pixels.
        bicubic: a shear by PIL's bicubic kernel, whatever the others are done by.
        centre: row and column of Cutout's first pixel behind its middle.
    """

    name: str
    magnitude: float = 0.0
    bicubic: bool = False
    centre: tuple[int, int] = (0, 0)


def inverse_affine(cell: Cell, height: int, width: int) -> list[float]:
    """The six numbers that say where an output pixel comes from, in pixels from the centre of the image.

    Shears keep the upper left corner, as in the published AutoAugment; rotations are counter-clockwise.
    """
    name, magnitude = cell[:2]
    if name.startswith("Translate"):
        by = -float(int(magnitude))
        return [1.0, 0.0, by, 0.0, 1.0, 0.0] if name == "TranslateX" else [1.0, 0.0, 0.0, 0.0, 1.0, by]
    if name.startswith("Shear"):
        tangent = math.tan(math.radians(math.degrees(math.atan(magnitude))))
        if name == "ShearX":
            return [1.0, tangent, tangent * (0.5 * height), 0.0, 1.0, 0.0]
        return [1.0, 0.0, 0.0, tangent, 1.0, tangent * (0.5 * width)]
    angle = math.radians(-(magnitude % 360))
    return [math.cos(angle), math.sin(angle), 0.0, -math.sin(angle), math.cos(angle), 0.0]


def _numbers(cell: Cell, height: int, width: int) -> tuple[int, list[float]]:
    """The kernel of a cell, and its numbers, six at most: those of a transformation on the scale of `grid_sample`."""
    name, magnitude = cell[:2]
    if cell.bicubic:
        return KERNELS.index("shear_x" if name == "ShearX" else "shear_y"), [magnitude]
    if name == "Cutout":
        row, column = cell.centre
        return KERNELS.index("hole"), [row, column, magnitude]
    if name in GEOMETRIC:
        matrix = torch.tensor(inverse_affine(cell, height, width), dtype=torch.float32)
        half = torch.tensor([0.5 * width] * 3 + [0.5 * height] * 3, dtype=torch.float32)
        return AFFINE, (matrix / half).tolist()
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        factor = 1.0 + magnitude
        return KERNELS.index(name.lower()), [factor, 1.0 - factor]
    if name == "Posterize":
        bits = int(magnitude)
        return KERNELS.index("posterize"), [float(((1 << bits) - 1) << (8 - bits))]
    if name == "Solarize":
        # of whole levels, those from the next whole one on
        threshold = math.ceil(torch.tensor(255.0 * magnitude, dtype=torch.float32).item())
        return KERNELS.index("solarize" if threshold <= 255 else "identity"), [threshold]
    return KERNELS.index(name.lower()), []


class Operations(nn.Module):
    """Applies to each image of a batch the cell of a table that was drawn for it.

    Args:
        cells: the table.
        height: of the images, in pixels; strengths and centres depend on it.
        width: of the images.
        interpolation: where pixels are moved by parts of one.
        fill: level of what was outside of the image, 0 to 255.
    """

    kernel: Tensor
    numbers: Tensor

    def __init__(
        self,
        cells: Sequence[Cell],
        height: int,
        width: int,
        interpolation: Interpolation = "nearest",
        fill: int = 0,
    ) -> None:
        super().__init__()
        rows = [_numbers(cell, height, width) for cell in cells]
        self.cells = list(cells)
        self.interpolation = interpolation
        self.fill = fill
        self.used = sorted({kernel for kernel, _ in rows} - {KERNELS.index("identity")})
        padded = [numbers + [0.0] * (6 - len(numbers)) for _, numbers in rows]
        self.register_buffer("kernel", torch.tensor([kernel for kernel, _ in rows]), persistent=False)
        self.register_buffer("numbers", torch.tensor(padded, dtype=torch.float32), persistent=False)
        moving = sum(kernel == AFFINE for kernel, _ in rows)
        self._keeps_places = interpolation == "nearest" and moving * height * width <= MOST_PLACES
        self._places: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor, cells: Tensor) -> Tensor:
        """The images, each changed by its cells one after the other.

        Args:
            images: (N, 1 or 3, H, W) uint8.
            cells: (N, layers) int64, numbers of rows of the table.

        Returns:
            (N, C, H, W) uint8.
        """
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.by_bucket(images, cells)
        return self.by_mask(images, cells)

    def by_mask(self, images: Tensor, cells: Tensor) -> Tensor:
        """As `forward`, by each kernel on all images."""
        for layer in cells.unbind(1):
            kernel, numbers = self.kernel[layer].view(-1, 1, 1, 1), self.numbers[layer]
            output = images
            for number in self.used:
                output = torch.where(kernel == number, self._run(number, images, numbers), output)
            images = output
        return images

    def by_bucket(self, images: Tensor, cells: Tensor) -> Tensor:
        """As `forward`, by each kernel on its own images; waits for the device."""
        n, order = len(images), None
        for layer in cells.unbind(1):
            layer = layer if order is None else layer[order]
            kernels, permutation = self.kernel[layer].sort(stable=True)
            counts = kernels.bincount(minlength=len(KERNELS)).tolist()
            if counts[0] == n:
                continue
            images, layer = images.index_select(0, permutation), layer[permutation]
            numbers = self.numbers[layer]
            order = permutation if order is None else order[permutation]
            parts, start = [], 0
            for number, count in enumerate(counts):
                stop = start + count
                part = images[start:stop]
                if count and number == AFFINE and self._keeps_places:
                    part = self._moved(part, layer[start:stop])
                elif count and number:
                    part = self._run(number, part, numbers[start:stop])
                parts.append(part)
                start = stop
            images = torch.cat(parts)
        if order is None:
            return images
        return images.index_select(0, order.argsort())  # index_copy_ goes byte by byte

    def _run(self, number: int, images: Tensor, numbers: Tensor) -> Tensor:
        if number == AFFINE:
            return affine(images, numbers, self.interpolation, self.fill)
        if number == SHEAR_X:
            return shear(images, numbers[:, 0], self.fill)
        if number == SHEAR_Y:
            return shear(images.mT, numbers[:, 0], self.fill).mT
        if number == KERNELS.index("hole"):
            return hole(images, numbers)
        first, second = (numbers[:, i].view(-1, 1, 1, 1) for i in (0, 1))
        return _POINTWISE[number](images, first, second)

    def _moved(self, images: Tensor, cells: Tensor) -> Tensor:
        """As `affine` at the nearest pixel, by the places that are kept: a fifth of its time for small images."""
        n, c, h, w = images.shape
        if self._places is None:
            self._places = self._all_places(h, w)
        rows, places = self._places
        place = places[rows[cells]][:, None].expand(n, c, h * w)
        # pixel 0 is what was outside
        pixels = F.pad(images.reshape(n, c, h * w), (1, 0), value=self.fill)
        return pixels.gather(2, place).view(n, c, h, w)

    def _all_places(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """For each cell of the table a row, and the rows: (moving cells, H * W) int64, the pixels' places."""
        moving = self.kernel == AFFINE
        grid = _grid(self.numbers[moving], h, w)
        pixels = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, 1, h, w).expand(len(grid), 1, h, w)
        places = F.grid_sample(pixels, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return moving.cumsum(0) - 1, places.view(len(grid), h * w).long()


def _grid(numbers: Tensor, h: int, w: int) -> Tensor:
    """(N, H, W, 2) float32: where each pixel comes from, from -1 to 1 between the outer edges."""
    x = torch.arange(w, device=numbers.device, dtype=torch.float32) - (w - 1) / 2
    y = (torch.arange(h, device=numbers.device, dtype=torch.float32) - (h - 1) / 2)[:, None]
    a, b, c, d, e, f = numbers.view(-1, 6, 1, 1).unbind(1)
    # in this order of sums it is torchvision's matrix product to the last bit, on which halves depend
    return torch.stack((x * a + y * b + c, x * d + y * e + f), dim=-1)


def affine(images: Tensor, numbers: Tensor, interpolation: Interpolation, fill: int) -> Tensor:
    """Resample each image by its transformation.

    Args:
        images: (N, C, H, W) uint8.
        numbers: (N, 6) float32, of a cell of the table.
        interpolation: of a position between pixels.
        fill: level outside of the image.
    """
    grid = _grid(numbers, *images.shape[2:])
    source = images.float()
    if fill:
        source = torch.cat((source, torch.ones_like(source[:, :1])), dim=1)
    moved = F.grid_sample(source, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    if fill:
        moved, inside = moved[:, :-1], moved[:, -1:]
        if interpolation == "nearest":
            moved = torch.where(inside < 0.5, float(fill), moved)
        else:
            moved = moved.sub(fill).mul(inside).add(fill)
    return moved.round().to(torch.uint8)


def shear(images: Tensor, tangent: Tensor, fill: int) -> Tensor:
    """Shear each image along its rows, bicubic as PIL's `transform`: Keys' kernel with a = -1, results rounded down.

    Args:
        images: (N, C, H, W) uint8.
        tangent: (N,) float32; the upper left corner keeps its place.
        fill: level outside of the image.
    """
    n, c, h, w = images.shape
    row = torch.arange(h, device=images.device, dtype=torch.float32)[:, None] + 0.5
    place = torch.arange(w, device=images.device, dtype=torch.float32) + tangent.view(n, 1, 1, 1) * row
    left = place.floor()
    d = place - left
    before, here, after, last = (
        images.gather(3, (left.long() + k).clamp(0, w - 1).expand(n, c, h, w)).float() for k in (-1, 0, 1, 2)
    )
    square, cube = 2 * (before - here) + after - last, here - before + last - after
    value = here + d * (after - before + d * (square + d * cube))
    inside = (place >= -0.5) & (place < w - 0.5)
    return torch.where(inside, value, float(fill)).clamp_(0, 255).to(torch.uint8)


def hole(images: Tensor, numbers: Tensor) -> Tensor:
    """Cover a square, as far as it lies inside, with the colour `HOLE`, or its grey.

    Args:
        images: (N, 1 or 3, H, W) uint8.
        numbers: (N, 3 or more) float32: row and column of the centre, half the side.
    """
    row, column, half = numbers[:, :3, None].unbind(1)
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows, columns = ((at >= to - half) & (at < to + half) for at, to in ((y, row), (x, column)))
    # the levels are made there: a copied tensor would make the host wait for it
    levels = (
        HOLE
        if images.shape[1] == 3
        else (int(sum(part * level for part, level in zip(GREY, HOLE, strict=True))),)
    )
    covered = rows[:, :, None] & columns[:, None, :]
    parts = [torch.where(covered, level, images[:, i]) for i, level in enumerate(levels)]
    return torch.stack(parts, dim=1)


def _blend(images: Tensor, plain: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    # one rounding for product and sum, as in torchvision's sum with a factor
    return torch.addcmul(images * factor, plain, rest).clamp_(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """(N, 1, H, W) float32, whole levels from 0 to 255; rounded down."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return red.float().mul_(GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).floor_()


def brightness(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    """A blend with black."""
    return (images * factor).clamp_(0, 255).to(torch.uint8)


def color(images: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    """A blend with the grey image; a grey image stays as it is."""
    return images if images.shape[1] == 1 else _blend(images, grey(images), factor, rest)


def contrast(images: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    """A blend with the mean of the grey image."""
    # a sum of whole numbers is the same in any order as long as it is exact
    total = grey(images).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend(images, total.float() / (images.shape[2] * images.shape[3]), factor, rest)


def sharpness(images: Tensor, _: Tensor, rest: Tensor) -> Tensor:
    """A blend with the mean over 3 x 3 pixels, the middle one counting five times; the rim stays as it is."""
    if min(images.shape[2:]) <= 2:
        return images
    source = images.float()
    rows = source[:, :, :-2] + source[:, :, 1:-1] + source[:, :, 2:]
    inner = source[:, :, 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    # thirteenths are never halves: any way to round gives the same level
    away = (total * (1 / 13)).round_().sub_(inner)
    blended = torch.addcmul(inner, away, rest).clamp_(0, 255)
    output = images.clone()
    output[:, :, 1:-1, 1:-1] = blended.to(torch.uint8)
    return output


def posterize(images: Tensor, mask: Tensor, _: Tensor) -> Tensor:
    """The upper bits alone."""
    return images & mask.to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor, _: Tensor) -> Tensor:
    """Levels from the threshold on are inverted."""
    # a fifth of the time of `where` on a CPU
    return images ^ ((images >= threshold.to(torch.uint8)).to(torch.uint8) * 255)


def autocontrast(images: Tensor, *_: Tensor) -> Tensor:
    """The levels of each channel are stretched to 0 to 255; a channel of one level stays as it is."""
    source = images.float()  # inductor's least of uint8 is wrong (torch 2.14, AVX-512)
    low, high = source.amin(dim=(2, 3), keepdim=True), source.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return ((source - torch.where(flat, 0.0, low)) / scale).clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor, *_: Tensor) -> Tensor:
    """The levels of each channel are spread so that each is about as frequent; as in PIL."""
    n, c, h, w = images.shape
    row = torch.arange(n * c, device=images.device, dtype=torch.int32)[:, None] * LEVELS
    place = (images.reshape(n * c, h * w) + row).view(-1)
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = place.bincount(minlength=n * c * LEVELS)
    else:
        # in one dimension, where it is deterministic on request; bincount would wait
        ones = torch.ones(1, dtype=torch.int32, device=images.device).expand(place.shape)
        zeros = torch.zeros(n * c * LEVELS, dtype=torch.int32, device=images.device)
        counts = zeros.scatter_add(0, place.long(), ones)
    counts = counts.to(torch.int32).view(n * c, LEVELS)
    below = counts.cumsum(1, dtype=torch.int32)
    last = counts.gather(1, below.argmax(dim=1, keepdim=True))  # of the highest level that there is
    step = (h * w - last).div(255, rounding_mode="floor").to(torch.int32)
    # what a level becomes goes by the pixels below it
    levels = (below - counts + step.div(2, rounding_mode="floor")).div(
        step.clamp(min=1), rounding_mode="floor"
    )
    same = torch.arange(LEVELS, device=images.device, dtype=torch.int32)
    table = torch.where(step == 0, same, levels.clamp(0, 255)).to(torch.uint8)
    return table.view(-1).index_select(0, place).view(n, c, h, w)


def invert(images: Tensor, *_: Tensor) -> Tensor:
    """255 - level."""
    return ~images


_POINTWISE: dict[int, Callable[..., Tensor]] = {
    KERNELS.index(function.__name__): function
    for function in (
        brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize, invert,
    )
}  # fmt: skip
