"""Distortions of 2-D images on the device, drawn for each sample: colour, rotation, cutout, random erasing.

Colours are changed before the policy normalises, as they mean something only there. The rest comes after it,
where 0 is the mean colour. Every draw is a function of the key and the sample's index, at a place of its own:
switching one distortion on leaves the draws of the others as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor

from augmentation.operations import GREY
from augmentation.policies.base import cutout
from crucible.batch import Batch
from crucible.keyed import keyed_uniform
from crucible.options import ConfigError
from crucible.technique import BatchStage, Setting, Step, Technique

ERASED_AREA = (0.02, 0.33)  # part of the image
ERASED_ASPECT = (0.3, 3.3)  # height by width
ATTEMPTS = 10  # at a box that fits into the image
# where a sample's draws are
COLOUR, ROTATION, CUTOUT, NOISE, ERASING = slice(0, 3), 3, slice(4, 6), 6, slice(7, 10 + 2 * ATTEMPTS)
DRAWS = ERASING.stop
NOISE_STARTS = 1 << 16


@dataclass(frozen=True)
class Distort(Technique):
    """What is distorted; all is off by default."""

    cutout_size: Annotated[
        float,
        "[0, inf)",
        "side of the square set to 0: pixels, or below 1 a part of the shorter side (arXiv 1708.04552)",
    ] = 0.0
    random_erasing: Annotated[float, "[0, 1]", "chance that a box becomes noise (arXiv 1708.04896)"] = 0.0
    random_rotation: Annotated[float, "[0, 180]", "largest angle to either side, in degrees"] = 0.0
    color_jitter: Annotated[
        float, "[0, 1]", "largest relative change of brightness, contrast and saturation"
    ] = 0.0

    def check(self, setting: Setting) -> None:
        for name, value in vars(self).items():
            if value and setting.input_dim != 2:
                raise ConfigError(
                    f"model.{name}={value:g} distorts 2-D images: data.input_dim is {setting.input_dim}"
                )
        if self.color_jitter and setting.input_channels not in (1, 3):
            raise ConfigError(
                f"model.color_jitter={self.color_jitter:g} needs grey or RGB images: data.input_channels is "
                f"{setting.input_channels}"
            )
        if self.cutout_size:
            self._check_cutout(setting.data)

    def _check_cutout(self, data: Mapping[str, Any]) -> None:
        size = self.cutout_size
        if size > 1 and size != int(size):
            raise ConfigError(f"model.cutout_size={size:g} must be whole pixels, or a part below 1")
        if isinstance(pixels := data.get("input_size"), int):
            _cutout_pixels(size, pixels)
        policy = instantiate(data.get("module", {}).get("train_transforms"))
        if pixels := getattr(policy, "cutout_size", 0):
            raise ConfigError(
                f"model.cutout_size={size:g}: {type(policy).__name__} already cuts out {pixels} pixels "
                "(data.module.train_transforms.cutout_size); set one of the two to 0"
            )

    def attach(self, step: Step) -> None:
        distortions = Distortions(self)
        if self.color_jitter:
            step.raw.append(BatchStage("distortions", distortions.before, "sample"))
        if self.random_rotation or self.cutout_size or self.random_erasing:
            step.batch.append(BatchStage("distortions", distortions.after, "sample"))


def _cutout_pixels(size: float, side: int) -> int:
    pixels = max(1, round(size * side)) if size < 1 else int(size)
    if pixels >= side:
        raise ConfigError(
            f"model.cutout_size={size:g} must be smaller than the image, which has {side} pixels"
        )
    return pixels


def adjust_colors(input: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation, in this order; each blends the image with a plainer one.

    `factor * image + (1 - factor) * plain`, limited to the range of the values, where plain is black, then the
    mean of the image's grey, then the grey image. A grey image has no saturation.

    Args:
        input: (N, 1 or 3, H, W), uint8 or float in [0, 1].
        factors: (N, 3) of brightness, contrast and saturation, 0 or more; 1 changes nothing.

    Returns:
        the shape and dtype of `input`; uint8 is rounded once, at the end.
    """
    integer = input.dtype == torch.uint8
    bound = 255.0 if integer else 1.0
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)

    def grey(image: Tensor) -> Tensor:
        if image.shape[1] == 1:
            return image
        red, green, blue = image.split(1, dim=1)
        return GREY[0] * red + GREY[1] * green + GREY[2] * blue

    image = (input.float() * brightness).clamp_(0, bound)
    image = torch.lerp(grey(image).mean(dim=(2, 3), keepdim=True), image, contrast).clamp_(0, bound)
    if image.shape[1] == 3:
        image = torch.lerp(grey(image), image, saturation).clamp_(0, bound)
    return (image.round_() if integer else image).to(input.dtype)


def rotate(input: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image about its centre; bilinear, and 0 where nothing was.

    Args:
        input: (N, C, H, W) float.
        degrees: (N,) counter-clockwise.
    """
    h, w = input.shape[2:]
    angle = torch.deg2rad(degrees.float())
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    y = (torch.arange(h, device=input.device, dtype=torch.float32) + 0.5 - h / 2)[:, None]
    x = torch.arange(w, device=input.device, dtype=torch.float32) + 0.5 - w / 2
    # where each pixel comes from, from -1 to 1 between the outer edges
    grid = torch.stack(((cos * x - sin * y) * (2 / w), (sin * x + cos * y) * (2 / h)), dim=-1)
    turned = F.grid_sample(input.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return turned.to(input.dtype)


def erased_boxes(draws: Tensor, height: int, width: int, probability: float) -> tuple[Tensor, ...]:
    """A box for each image: area uniform in 0.02 to 0.33 of it, log aspect uniform in 0.3 to 3.3, all inside.

    Of ten attempts the first one that is smaller than the image in both directions counts.

    Args:
        draws: (N, 3 + 2 * ATTEMPTS) uniform in [0, 1).
        height: of the images, in pixels.
        width: of the images, in pixels.
        probability: that an image has a box.

    Returns:
        top, left, height and width in pixels, each (N,) float32; height and width are 0 where there is no box.
    """
    chance, row, column = draws[:, 0], draws[:, 1], draws[:, 2]
    area_draws, aspect_draws = draws[:, 3 : 3 + ATTEMPTS], draws[:, 3 + ATTEMPTS :]
    (small, large), (low, high) = ERASED_AREA, map(math.log, ERASED_ASPECT)
    side = ((small + (large - small) * area_draws) * (height * width)).sqrt()
    root_of_aspect = (0.5 * (low + (high - low) * aspect_draws)).exp()
    h, w = (side * root_of_aspect).round(), (side / root_of_aspect).round()
    fits = (h < height) & (w < width)
    # argmax of a float finds the first maximum on every device
    first = fits.float().argmax(dim=1, keepdim=True)
    erased = (chance < probability) & fits.any(dim=1)
    h, w = (torch.where(erased, sides.gather(1, first)[:, 0], 0) for sides in (h, w))
    return (row * (height - h + 1)).floor(), (column * (width - w + 1)).floor(), h, w


def erase(input: Tensor, boxes: tuple[Tensor, ...], noise: Tensor) -> Tensor:
    """Put the noise into the boxes.

    Args:
        input: (N, C, H, W) float.
        boxes: top, left, height and width in pixels, each (N,).
        noise: of the shape of `input`.
    """
    top, left, height, width = (side[:, None] for side in boxes)
    y, x = (torch.arange(side, device=input.device) for side in input.shape[2:])
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], noise.to(input.dtype), input)


def keyed_noise(key: Tensor, draw: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal noise, independent within each sample.

    A sample's noise is a stretch, from a place of its own, of one long row of numbers that the key stands for.
    Numbers drawn for every pixel cost twenty times as much on 64 images of 224 x 224 (CPU).

    Args:
        key: 0-dimensional int64.
        draw: (N,) uniform in [0, 1): where each sample's stretch starts.
        shape: (N, C, H, W).

    Returns:
        (N, C, H, W) float32.
    """
    length = shape[1:].numel()
    # an index that no sample has
    row = keyed_uniform(key, torch.full((1,), -1, device=draw.device), NOISE_STARTS + length)[0]
    # quantiles at the middles of the 2**24 steps, never 0 or 1: nothing is infinite. Exact in float32.
    normal = torch.erfinv(2 * row - (1 - 2.0**-24)) * math.sqrt(2)
    return normal.unfold(0, length, 1)[(draw * NOISE_STARTS).long()].view(shape)


class Distortions:
    """Distorts a batch as its key and the samples' visits say.

    Args:
        options: what is on.
    """

    def __init__(self, options: Distort) -> None:
        self.options = options
        self._range_is_known = False

    def before(self, batch: Batch, key: int) -> Batch:
        """The part before the policy's normalisation: colour jitter.

        Args:
            batch: input (N, C, H, W), uint8 or float in [0, 1], and the samples' visits.
            key: from `stream_key`, one an epoch.

        Returns:
            the batch, its input of the same shape and dtype.

        Raises:
            ConfigError: for float input outside [0, 1]; looked at in the first batch only, as that waits for
                the device.
        """
        input = batch.input
        if input.dtype != torch.uint8 and not self._range_is_known:
            low, high = (float(v) for v in input.aminmax())
            if not (low >= 0 and high <= 1):
                raise ConfigError(
                    f"model.color_jitter={self.options.color_jitter:g} needs images, uint8 or float in [0, 1]: "
                    f"the input goes from {low:.3g} to {high:.3g}"
                )
            self._range_is_known = True
        draws = keyed_uniform(_on_device(key, input), batch.visit, COLOUR.stop)
        colored = adjust_colors(input, 1 + self.options.color_jitter * (2 * draws - 1))
        return Batch(
            colored, batch.target, batch.visit
        )  # compiled by torch 2.11, _replace returns an empty tuple

    def after(self, batch: Batch, key: int) -> Batch:
        """The part on normalised input: rotation, then cutout, then random erasing.

        Args:
            batch: input (N, C, H, W) float, 0 the mean colour, and the samples' visits.
            key: as in `before`.

        Returns:
            the batch, its input of the same shape, dtype and memory format.

        Raises:
            ConfigError: for a cutout as large as the image.
        """
        options, input = self.options, batch.input
        on_device = _on_device(key, input)
        output, draws = input, keyed_uniform(on_device, batch.visit, DRAWS)
        if options.random_rotation:
            output = rotate(output, options.random_rotation * (2 * draws[:, ROTATION] - 1))
        if options.cutout_size:
            output = cutout(
                output, draws[:, CUTOUT], _cutout_pixels(options.cutout_size, min(input.shape[2:]))
            )
        if options.random_erasing:
            height, width = input.shape[2:]
            boxes = erased_boxes(draws[:, ERASING], height, width, options.random_erasing)
            output = erase(output, boxes, keyed_noise(on_device, draws[:, NOISE], input.shape))
        if input.is_contiguous(memory_format=torch.channels_last):
            output = output.contiguous(memory_format=torch.channels_last)
        return Batch(output, batch.target, batch.visit)


def _on_device(key: int, input: Tensor) -> Tensor:
    # filled there: a copied scalar would make the host wait for it
    return torch.full((), key, dtype=torch.int64, device=input.device)
